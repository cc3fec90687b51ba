"""What is asked of the planner, and its answer. Imports no JAX."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llama_jax.config import LlamaConfig
from llama_jax.costs.calibration import Calibration
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import Gpu
from llama_jax.costs.tick_time import TickModel
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.layouts import layouts
from llama_jax.plan.replica import Replica
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
      kv_cache_dtype: as of a `Deployment`.
      layout: the only one to consider; None for all.
      max_chunk: the largest chunk in tokens; None to choose it.
      calibration: what was measured on the machine, for one layout; None for nothing.
      calibration_file: that it was read from.
      fp8_activations: as of a `Deployment`.
      stored: the config of the checkpoint at the path `model`; None if that is a name.
    """

    model: str
    config: LlamaConfig
    gpu: Gpu
    gpus: int
    workload: Workload
    targets: Targets
    kv_cache_dtype: str = "auto"
    layout: Layout | None = None
    max_chunk: int | None = None
    calibration: Calibration | None = None
    fp8_activations: bool = False
    calibration_file: Path | None = None
    stored: LlamaConfig | None = None

    def deployment(self, layout: Layout) -> Deployment:
        """The model on these GPUs in a layout."""
        return Deployment(self.config, self.gpu, layout, self.kv_cache_dtype, self.fp8_activations)

    def tick_model(self, layout: Layout) -> TickModel:
        """The times of the ticks of one replica in a layout, calibrated if that is possible."""
        deployment = self.deployment(layout._replace(replicas=1))
        measured = self.calibration
        if measured is not None and measured.mismatch(deployment) is None:
            return TickModel(deployment, measured)
        return _tick_model(deployment)

    def candidate(self, layout: Layout) -> Candidate:
        """A layout under the load that is asked for."""
        model = self.tick_model(layout)
        replica = Replica(model, self.workload, self.targets, self.max_chunk)
        return Candidate(replica, self.workload.rate, layout.replicas)


@lru_cache(maxsize=256)  # making one takes milliseconds, and plans look at some layouts often
def _tick_model(deployment: Deployment) -> TickModel:
    return TickModel(deployment)


@dataclass(frozen=True)
class Plan:
    """The answer to a question.

    Attributes:
      question: that was asked.
      candidates: the layouts that are possible, with their figures, the best first.
    """

    question: Question
    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The best layout; the one that misses the targets least if none holds."""
        return self.candidates[0]


def make_plan(question: Question) -> Plan:
    """Plans every layout, or the only one that is asked for.

    Raises:
      LayoutError: there is none.
      BadCalibration: the calibration holds for none of them.
    """
    only = question.layout
    found = [only] if only is not None else layouts(question.config, question.gpus)
    measured = question.calibration
    if measured is not None and all(measured.mismatch(question.deployment(x)) for x in found):
        measured.check(question.deployment(found[0]))
    return Plan(question, tuple(sorted(map(question.candidate, found), key=lambda c: c.order)))
