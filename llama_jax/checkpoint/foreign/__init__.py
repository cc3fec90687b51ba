"""Matrices quantized by other tools, translated to the formats of `llama_jax.quantization`.

A layout describes the tensors in which a tool stores a matrix, and computes any slice of the
translated arrays from the memory-mapped tensors. Integers, zero points and scales are kept exactly,
so the matrix is (q - zero) · scale, in float32, without rounding in between.
"""

from llama_jax.checkpoint.foreign.awq import Awq
from llama_jax.checkpoint.foreign.gptq import Gptq
from llama_jax.checkpoint.foreign.layout import Layout
from llama_jax.checkpoint.foreign.packed import Packed
from llama_jax.checkpoint.foreign.scaled_rows import ScaledRows
from llama_jax.checkpoint.foreign.translation import Translated, translate

LAYOUTS: dict[str, Layout] = {
    "fp8": ScaledRows("float8_e4m3fn"),
    "int8": ScaledRows("int8"),
    "packed": Packed(symmetric=True),
    "packed_asymmetric": Packed(symmetric=False),
    "gptq": Gptq(subtracted=1),
    "gptq_ordered": Gptq(subtracted=1, ordered=True),
    "gptq_v2": Gptq(subtracted=0),
    "gptq_v2_ordered": Gptq(subtracted=0, ordered=True),
    "awq": Awq(),
}

__all__ = ["LAYOUTS", "Translated", "translate"]
