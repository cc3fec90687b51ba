"""A parameter whose weights have an array each. Imports no JAX."""

from typing import Any, NamedTuple


class Unfused(NamedTuple):
    """A parameter of several weights that cannot share an array.

    One of them is quantized and another is not, or their format has an array that does not run
    along the rows.

    Attributes:
      weights: in their order, each an array or a quantized matrix.
    """

    weights: tuple[Any, ...]
