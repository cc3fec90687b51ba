"""The interface of another tool's layout, and helpers that several layouts share."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

# Tools also store how they quantize activations and the KV cache; neither is quantized here.
OF_ACTIVATIONS = (
    ".act_scale",
    ".activation_scale",
    ".input_global_scale",
    ".input_scale",
    ".input_scale_ub",
    ".input_zero_point",
    ".k_scale",
    ".k_zero_point",
    ".kv_scale",
    ".output_scale",
    ".output_zero_point",
    ".prob_output_scale",
    ".prob_scale",
    ".q_scale",
    ".q_zero_point",
    ".v_scale",
    ".v_zero_point",
)
# Those of the KV cache, after the name of a layer's attention or of one of its projections.
OF_KV_CACHE = (
    ".k_scale",
    ".k_zero_point",
    ".kv_scale",
    ".v_scale",
    ".v_zero_point",
    *(f".{name}_proj.output_{part}" for name in "kv" for part in ("scale", "zero_point")),
)
G_IDX = ".g_idx"  # the group of each column, whatever a tool calls it

Arrays = Mapping[str, np.ndarray]
Index = tuple[slice, ...]


class ForeignTensor(NamedTuple):
    """A tensor that a tool stores as part of a matrix.

    Attributes:
      suffix: of its name, after the name of the module.
      shapes: all shapes that it may have.
      dtypes: all dtypes that it may have.
      required: whether it must be present.
      alias: another suffix that it may have.
    """

    suffix: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    required: bool = True
    alias: str | None = None


class ContentError(ValueError):
    """Stored values that cannot be translated; the message completes a sentence."""


class Layout(Protocol):
    """How a tool stores a matrix [out, in].

    It also has one method per field of the format that it is translated to, with the field's name.
    The method takes the stored arrays by suffix and an index, and returns that slice of the field.
    Fields with groups have the groups of the tool.
    """

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Suffixes of tensors that are ignored if present, besides `OF_ACTIVATIONS`."""
        ...

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix [out, in] with one scale per `group` input columns."""
        ...


def per_word(bits: int) -> int:
    """Numbers of so many bits in an int32."""
    return 32 // bits


def covering(part: slice, size: int) -> tuple[slice, slice]:
    """The blocks of `size` elements that cover a slice, and the slice's place within them."""
    first, last = part.start // size, -(-part.stop // size)
    return slice(first, last), slice(part.start - first * size, part.stop - first * size)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The 4-bit or 8-bit numbers of words, lowest first: int32 [n, w] → uint8 [n, 32 w / bits]."""
    pairs = as_bytes(words)
    if bits == 8:
        return pairs
    return np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(len(words), -1)


def as_bytes(words: np.ndarray) -> np.ndarray:
    """The four bytes of each word, lowest first: int32 [n, w] → uint8 [n, 4 w]."""
    return np.ascontiguousarray(words).view(np.uint8)


def as_unsigned(values: np.ndarray) -> np.ndarray:
    """Signed bytes plus 128: int8 → uint8."""
    return values.view(np.uint8) ^ np.uint8(0x80)


def is_act_order(arrays: Arrays, group: int) -> bool:
    """Whether the columns of a group are not adjacent.

    compressed-tensors fills a `g_idx` that it does not use with -1.
    """
    order = arrays.get(G_IDX)
    if order is None or (order == -1).all():
        return False
    return bool((order != np.arange(len(order)) // group).any())
