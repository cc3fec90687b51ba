"""Partition specs from logical axes."""

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec as P

from sharding.axes import STAGE

# Logical axis → the mesh axis or axes that split it; None for an axis that is not split.
Rules = Mapping[str, str | tuple[str, ...] | None]


def partition_spec(axes: Sequence[str], rules: Rules, stacked: bool = False) -> P:
    """The spec of an array with these logical axes, after an axis over `stage` if `stacked`."""
    return P(*((STAGE,) if stacked else ()), *(rules[axis] for axis in axes))
