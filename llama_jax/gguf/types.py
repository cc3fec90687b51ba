"""The tensor types of GGUF that can be read, and what they become.

Blocks of integers with shared scales are dequantized by the `gguf` package, in float32. Q5_0 and
Q5_1 are included because files of type Q4_K_M or Q5_K_M use them for matrices whose rows are not
multiples of 256.
"""

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_blocks

from llama_jax.gguf.header import GgufTensor

_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
SUPPORTED = (*_PLAIN, *_QUANTIZED)


def stored_dtype(tensor: GgufTensor) -> str:
    """The dtype that a tensor counts as.

    A quantized tensor counts as bfloat16, the dtype in which Llama 3 was trained: dequantized
    values are computed in float32 and rounded only to the dtype that they are read into.
    """
    return _PLAIN.get(tensor.type, "bfloat16")


def block_sizes(kind: str) -> tuple[int, int]:
    """The number of elements in a block of a supported type, and its bytes."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def decode(rows: np.ndarray, kind: str) -> np.ndarray:
    """Decodes whole blocks: uint8 [n, bytes] → [n, elements], plain or float32."""
    if kind in _PLAIN:
        name = _PLAIN[kind]
        return rows.view(np.dtype(getattr(ml_dtypes, name, name)))
    return dequantize_blocks(rows, GGMLQuantizationType[kind])
