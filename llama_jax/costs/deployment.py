"""What is planned: a model on a mesh of GPUs. Imports no JAX."""

from dataclasses import dataclass
from typing import NamedTuple

from llama_jax.config import LlamaConfig
from llama_jax.costs.gpus import Gpu

# Bytes of one number; in 8 bits the scales come on top.
KV_BYTES = {"bf16": 2, "fp8": 1, "int8": 1, "fp32": 4}
_KV_AUTO = {"bfloat16": "bf16", "float32": "fp32"}


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

    @property
    def mesh(self) -> str:
        """The mesh of one replica, such as "4x2"."""
        return f"{self.num_stages}x{self.num_ranks}"

    def __str__(self) -> str:
        return self.mesh if self.replicas == 1 else f"{self.replicas} replicas of {self.mesh}"


@dataclass(frozen=True)
class Deployment:
    """A model on a mesh of GPUs.

    Attributes:
      config: the model; its `quantization` says how the matrices of the layers are stored.
      gpu: of which all are.
      layout: how it lies on them.
      kv_cache_dtype: "bf16", "fp8", "int8", or "auto" for the dtype of the activations.
      fp8_activations: whether the products of ticks with a chunk multiply fp8 by fp8, as the option
        of the server with this name says. All others multiply weights of any format in the dtype of
        the activations.
    """

    config: LlamaConfig
    gpu: Gpu
    layout: Layout
    kv_cache_dtype: str = "bf16"
    fp8_activations: bool = False

    @property
    def weights(self) -> str:
        """The format of the layers' matrices: "bfloat16", or a name from `quantization.FORMATS`."""
        quantization = self.config.quantization
        return self.dtype if quantization is None else quantization.format

    @property
    def dtype(self) -> str:
        """The dtype of activations, norms, embedding and head, as an engine chooses it.

        It is float32 on CPUs, and bfloat16 for a checkpoint in float16.
        """
        wide = self.gpu.platform == "cpu" or self.config.dtype == "float32"
        return "float32" if wide else "bfloat16"

    @property
    def kv_dtype(self) -> str:
        """`kv_cache_dtype` without "auto": a key of `KV_BYTES`."""
        return _KV_AUTO[self.dtype] if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
