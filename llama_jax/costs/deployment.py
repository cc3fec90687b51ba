"""What is planned: a model on a mesh of GPUs. Imports no JAX."""

from dataclasses import dataclass
from typing import NamedTuple

from llama_jax.config import LlamaConfig
from llama_jax.costs.gpus import Gpu

KV_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}  # of one number; in 8 bits the scales come on top


class Layout(NamedTuple):
    """How a model lies on GPUs.

    Attributes:
      num_stages: P, the pipeline stages.
      num_ranks: the tensor-parallel ranks of each stage.
      replicas: copies of the model, each with GPUs and requests of its own.
    """

    num_stages: int
    num_ranks: int
    replicas: int = 1

    @property
    def gpus(self) -> int:
        """The GPUs of all replicas together."""
        return self.num_stages * self.num_ranks * self.replicas

    def __str__(self) -> str:
        mesh = f"{self.num_stages}x{self.num_ranks}"
        return mesh if self.replicas == 1 else f"{self.replicas} replicas of {mesh}"


@dataclass(frozen=True)
class Deployment:
    """A model on a mesh of GPUs.

    Attributes:
      config: the model; its `quantization` says how the matrices of the layers are stored.
      gpu: of which all are.
      layout: how it lies on them.
      kv_cache_dtype: "bf16", "fp8" or "int8".
    """

    config: LlamaConfig
    gpu: Gpu
    layout: Layout
    kv_cache_dtype: str = "bf16"

    @property
    def weights(self) -> str:
        """The format of the layers' matrices: "bfloat16", or a name from `quantization.FORMATS`."""
        quantization = self.config.quantization
        return "bfloat16" if quantization is None else quantization.format
