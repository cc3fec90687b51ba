"""Random quantized matrices, and their values by definition."""

from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.quantization import FORMATS, Int4, Int4ActOrder, Part


def random_quantized(name: str, rows: int, columns: int, group: int) -> Any:
    """Random arrays of a format."""
    rng = np.random.default_rng(0)

    def array(field: str, part: Part) -> np.ndarray:
        if field == "scale":
            return rng.uniform(1e-3, 1, part.shape).astype(np.float32)
        if field == "group":
            return (rng.permutation(columns) // group).astype(np.int32)
        codes = rng.integers(0, 256 if part.dtype != "float8_e4m3fn" else 127, part.shape)
        if field == "zero" and name.startswith("int4"):
            codes %= 16
        return codes.astype(np.uint8).view(getattr(ml_dtypes, part.dtype, part.dtype))

    parts = FORMATS[name].parts((rows, columns), group)
    return type(parts)(*map(array, parts._fields, parts))


def exact(quantized: Any) -> np.ndarray:
    """`dequantize` by the definition of each layout, element by element, in float64."""
    values, scale, zero, group = (
        np.asarray(getattr(quantized, field)) if hasattr(quantized, field) else None
        for field in ("values", "scale", "zero", "group")
    )
    packed = isinstance(quantized, Int4 | Int4ActOrder)
    matrix = np.empty((len(values), values.shape[1] * (2 if packed else 1)))
    scale = scale.reshape(len(values), -1).astype(np.float64)
    if group is None:
        group = np.arange(matrix.shape[1]) // (matrix.shape[1] // scale.shape[1])
    for row, column in np.ndindex(matrix.shape):
        value = values[row, column // 2 if packed else column].item()
        if packed:
            value = value // 16 if column % 2 else value % 16
        where = row, group[column]
        matrix[row, column] = (value - (0 if zero is None else int(zero[where]))) * scale[where]
    return matrix
