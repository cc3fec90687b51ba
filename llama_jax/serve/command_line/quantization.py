"""Checks that a checkpoint is quantized as the command line says."""

from pathlib import Path

from llama_jax.config.huggingface import CheckpointConfig
from sharding.errors import UserError


class QuantizationMismatch(UserError):
    """The checkpoint is quantized by another method than --quantization says, or not at all."""


def check_quantization(declared: CheckpointConfig, path: Path, wanted: str | None) -> None:
    """Checks the method by which the checkpoint at `path` is quantized.

    Args:
      declared: its settings.
      path: a directory or a GGUF file.
      wanted: the value of --quantization. The kernels that vLLM names do not count: gptq_marlin is
        gptq.

    Raises:
      QuantizationMismatch: it is another.
    """
    if wanted is None:
        return
    method = declared.quantization.method if declared.quantization else None
    if path.is_file():
        method = "gguf"
    if _plain(wanted) != _plain(method or "none"):
        found = f"quantized by {method}" if method else "not quantized"
        raise QuantizationMismatch(
            f"--quantization is {wanted}, but {path} is {found}: leave the flag out, or quantize "
            "the checkpoint with `python -m convert quantize`."
        )


def _plain(method: str) -> str:
    return method.lower().replace("_", "-").removesuffix("-marlin")
