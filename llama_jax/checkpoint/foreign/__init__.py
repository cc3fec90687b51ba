"""Matrices quantized by other tools, translated to the formats of `llama_jax.quantization`.

A layout describes the tensors in which a tool stores a matrix, and computes any slice of the
translated arrays from the memory-mapped tensors. Integers, zero points and scales are kept exactly,
so the matrix is (q - zero) · scale, in float32, without rounding in between.
"""

from llama_jax.checkpoint.foreign.awq import Awq
from llama_jax.checkpoint.foreign.gptq import Gptq
from llama_jax.checkpoint.foreign.layout import OF_ACTIVATIONS, Layout
from llama_jax.checkpoint.foreign.packed import Packed, PackedRows
from llama_jax.checkpoint.foreign.scaled_groups import ScaledBlocks, ScaledGroups
from llama_jax.checkpoint.foreign.scaled_rows import ScaledRows
from llama_jax.checkpoint.foreign.translation import Dequantized, Translated, translate
from llama_jax.config.huggingface_quantization import StoredQuantization

LAYOUTS: dict[str, Layout] = {
    "fp8": ScaledRows("float8_e4m3fn"),
    "int8": ScaledRows("int8"),
    "int8_groups": ScaledGroups(symmetric=True),
    "int8_groups_asymmetric": ScaledGroups(symmetric=False),
    "packed_rows": PackedRows(),
    "awq": Awq(),
}
for _bits in (4, 8):
    for _ordered, _suffix in ((False, ""), (True, "_ordered")):
        LAYOUTS |= {
            f"packed{_bits}{_suffix}": Packed(_bits, True, _ordered),
            f"packed{_bits}_asymmetric{_suffix}": Packed(_bits, False, _ordered),
            f"gptq{_bits}{_suffix}": Gptq(_bits, 1, _ordered),
            f"gptq{_bits}_v2{_suffix}": Gptq(_bits, 0, _ordered),
        }

__all__ = ["LAYOUTS", "OF_ACTIVATIONS", "Dequantized", "Translated", "layout_of", "translate"]


def layout_of(stored: StoredQuantization) -> Layout | None:
    """The layout of a checkpoint; None if its tensors are those of this package."""
    if stored.layout == "fp8_blocks":
        return ScaledBlocks(stored.block_rows)
    return LAYOUTS.get(stored.layout)
