"""What is asked of the planner, and its answer. Imports no JAX."""

from dataclasses import dataclass
from pathlib import Path

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import Gpu
from llama_jax.plan.layouts import layouts
from llama_jax.plan.targets import Targets, Workload


@dataclass(frozen=True)
class Question:
    """What is to be planned.

    Attributes:
      model: its name or path, as it was given.
      config: the model; its `quantization` is that of the weights to plan for.
      gpu: of which all are.
      gpus: their number, of all replicas together.
      workload: what arrives.
      targets: what must hold.
      kv_cache_dtype: "bf16", "fp8" or "int8".
      layout: the only one to consider; None for all.
      max_chunk: the largest chunk in tokens; None to choose it.
      calibration: a file of measured times that replace those of the table; None for none.
    """

    model: str
    config: LlamaConfig
    gpu: Gpu
    gpus: int
    workload: Workload
    targets: Targets
    kv_cache_dtype: str = "bf16"
    layout: Layout | None = None
    max_chunk: int | None = None
    calibration: Path | None = None

    def deployment(self, layout: Layout) -> Deployment:
        """The model on these GPUs in a layout."""
        return Deployment(self.config, self.gpu, layout, self.kv_cache_dtype)


@dataclass(frozen=True)
class Plan:
    """The answer to a question.

    Attributes:
      question: that was asked.
      layouts: that are possible, the best first.
    """

    question: Question
    layouts: tuple[Layout, ...]

    @property
    def best(self) -> Deployment:
        """The model in the best layout."""
        return self.question.deployment(self.layouts[0])


def make_plan(question: Question) -> Plan:
    """Plans every layout.

    Raises:
      LayoutError: there is none.
    """
    only = question.layout
    found = [only] if only is not None else layouts(question.config, question.gpus)
    return Plan(question, tuple(found))
