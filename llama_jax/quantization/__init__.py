"""Weight-only quantization formats, one file each. Imports no JAX.

A quantized matrix is a named tuple of arrays. The same class holds NumPy arrays during conversion
and JAX arrays in the model, and its arithmetic uses only methods that both have. `parts` declares
the arrays of a matrix: their names, shapes and dtypes. The tensors of a checkpoint, the partition
specs and the memory follow from it.

A new format is one such file and one entry in `FORMATS`.
"""

from llama_jax.quantization.format import Part, Quantized
from llama_jax.quantization.fp8 import Fp8
from llama_jax.quantization.int4 import Int4
from llama_jax.quantization.int8 import Int8

FORMATS: dict[str, type[Quantized]] = {"int8": Int8, "fp8": Fp8, "int4": Int4}

__all__ = ["FORMATS", "Fp8", "Int4", "Int8", "Part", "Quantized"]
