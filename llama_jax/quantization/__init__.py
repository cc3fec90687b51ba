"""Weight-only quantization formats, one file each. Imports no JAX.

A quantized matrix is a named tuple of arrays. The same class holds NumPy arrays during conversion
and JAX arrays in the model, and its arithmetic uses only methods that both have. `parts` declares
the arrays of a matrix: their names, shapes and dtypes. The tensors of a checkpoint, the partition
specs and the memory follow from it.

`--quantize` offers the formats in `QUANTIZERS`. The others store what the tools of other projects
write and these cannot.

A new format is one class and one entry in `FORMATS` or `QUANTIZERS`.
"""

from llama_jax.quantization.act_order import Int4ActOrder, Int8ActOrder
from llama_jax.quantization.format import Part, Quantized, Quantizer
from llama_jax.quantization.fp8 import Fp8, Fp8Activations
from llama_jax.quantization.grouped import Fp8Grouped, Int8Grouped
from llama_jax.quantization.int4 import Int4
from llama_jax.quantization.int8 import Int8

QUANTIZERS: dict[str, type[Quantizer]] = {"int8": Int8, "fp8": Fp8, "int4": Int4}
FORMATS: dict[str, type[Quantized]] = {
    **QUANTIZERS,
    "int8_grouped": Int8Grouped,
    "fp8_grouped": Fp8Grouped,
    "int4_act_order": Int4ActOrder,
    "int8_act_order": Int8ActOrder,
}
# A format with groups → its form for act-order, where the columns of a group are not adjacent.
ACT_ORDER = {"int4": "int4_act_order", "int8_grouped": "int8_act_order"}
# The formats whose columns form groups that share a scale.
GROUPED = ("int4", "int8_grouped", "fp8_grouped", *ACT_ORDER.values())
# The formats that GPUs hold in another layout, to which `for_gpu` converts a matrix.
GPU_LAYOUTS = (Int4, Int4ActOrder, Int8ActOrder, Int8Grouped)

__all__ = [
    "ACT_ORDER",
    "FORMATS",
    "GPU_LAYOUTS",
    "GROUPED",
    "QUANTIZERS",
    "Fp8",
    "Fp8Activations",
    "Fp8Grouped",
    "Int4",
    "Int4ActOrder",
    "Int8",
    "Int8ActOrder",
    "Int8Grouped",
    "Part",
    "Quantized",
    "Quantizer",
]
