"""The memory that arrays take on a device."""

import math
from typing import Any

import jax


def shard_bytes(array: Any) -> int:
    """Bytes of one device's share of an array, or of a `ShapeDtypeStruct` with a sharding.

    Integers of 4 bits count half a byte, as on GPUs, where XLA packs them. `nbytes` counts a byte.
    """
    count = math.prod(array.sharding.shard_shape(array.shape))
    return int(count * jax.dtypes.itemsize_bits(array.dtype)) // 8
