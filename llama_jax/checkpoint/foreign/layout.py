"""The interface of another tool's layout, and helpers that several layouts share."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

# Tools also store how they quantize activations and the KV cache; neither is quantized here.
OF_ACTIVATIONS = (
    ".input_scale",
    ".input_scale_ub",
    ".input_zero_point",
    ".output_scale",
    ".k_scale",
    ".v_scale",
)
PER_WORD = 8  # nibbles in an int32

Arrays = Mapping[str, np.ndarray]
Index = tuple[slice, ...]


class ForeignTensor(NamedTuple):
    """A tensor that a tool stores as part of a matrix.

    Attributes:
      suffix: of its name, after the name of the module.
      shapes: all shapes that it may have.
      dtypes: all dtypes that it may have.
      required: whether it must be present.
    """

    suffix: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    required: bool = True


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
        """Suffixes of tensors that are ignored if present."""
        ...

    def tensors(self, shape: tuple[int, int], group: int) -> tuple[ForeignTensor, ...]:
        """The stored tensors of a matrix [out, in] with one scale per `group` input columns."""
        ...

    def check(self, arrays: Arrays, group: int) -> None:
        """Checks the contents of small tensors; raises ContentError."""
        ...


def covering(part: slice, size: int) -> tuple[slice, slice]:
    """The blocks of `size` elements that cover a slice, and the slice's place within them."""
    first, last = part.start // size, -(-part.stop // size)
    return slice(first, last), slice(part.start - first * size, part.stop - first * size)


def nibbles(words: np.ndarray) -> np.ndarray:
    """The eight 4-bit numbers of each word, lowest first: int32 [n, w] → uint8 [n, 8 w]."""
    pairs = as_bytes(words)
    return np.stack((pairs & 15, pairs >> 4), axis=-1).reshape(len(words), -1)


def as_bytes(words: np.ndarray) -> np.ndarray:
    """The four bytes of each word, lowest first: int32 [n, w] → uint8 [n, 4 w]."""
    return np.ascontiguousarray(words).view(np.uint8)
