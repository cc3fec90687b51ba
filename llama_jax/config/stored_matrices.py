"""How the quantized matrices of a Hugging Face checkpoint are stored. Imports no JAX."""

from typing import Any, NamedTuple

from llama_jax.config.errors import ConfigError
from llama_jax.config.json_values import quoted
from llama_jax.config.llama_config import Quantization
from llama_jax.config.quantization_settings import is_size

HEAD = "lm_head"
PLAIN = "plain"  # no weight is quantized, but something else is, such as the KV cache


class StoredMatrices(NamedTuple):
    """How matrices are stored.

    Attributes:
      layout: a name from `checkpoint.foreign.LAYOUTS`, "fp8_blocks", `QUANT_METHOD`, or `PLAIN`.
      quantization: their format once they are loaded, as far as the settings say. A reader also
        knows which matrices are not quantized, and whether GPTQ's columns are in act-order. None
        for `PLAIN`.
      block_rows: output channels that share their scales.
    """

    layout: str
    quantization: Quantization | None
    block_rows: int = 1


class Parsed(NamedTuple):
    """The settings of one tool.

    Attributes:
      layers: how the matrices of the layers are stored.
      unknown: keys that this package does not know.
      head: how the LM head is stored if it is quantized otherwise than the layers; None if not.
    """

    layers: StoredMatrices
    unknown: list[str]
    head: StoredMatrices | None = None


FP8_ROWS = StoredMatrices("fp8", Quantization(format="fp8"))  # one scale per row or matrix


def grouped(format: str, group_size: Any) -> Quantization:
    """A format with groups; raises ConfigError if it cannot have groups of this size."""
    return Quantization(format=format, group_size=group_size)


def fp8_blocks(block: Any) -> StoredMatrices:
    """FP8 in blocks, given as [rows, columns] or, by old versions, as "128x128"."""
    if isinstance(block, str):
        block = [int(part) if part.isdecimal() else 0 for part in block[:20].split("x")]
    if not isinstance(block, list) or len(block) != 2 or not all(map(is_size, block)):
        raise ConfigError(
            f"The blocks of a quantization must be [rows, columns], got {quoted(block)}."
        )
    return StoredMatrices("fp8_blocks", grouped("fp8_grouped", block[1]), block[0])
