"""Partition specs from logical axes, and how layers fall to stages."""

from collections.abc import Mapping, Sequence

from jax.sharding import PartitionSpec as P

from sharding.axes import STAGE

# Logical axis → the mesh axis or axes that it is split over; None keeps it whole.
Rules = Mapping[str, str | tuple[str, ...] | None]


def partition_spec(axes: Sequence[str], rules: Rules, stacked: bool = False) -> P:
    """The spec of an array with these logical axes; `stacked` puts a `stage` axis before them."""
    return P(*((STAGE,) if stacked else ()), *(rules[axis] for axis in axes))


def split_layers(num_layers: int, num_stages: int) -> tuple[tuple[int | None, ...], ...]:
    """Which layer stands at each position of each stage, in order; None is a padding layer.

    Every stage has the same number of positions, since all run one program. Where layers do not
    divide, the first stages have one more than the last: 22 on 4 fall as 6, 6, 5, 5.
    """
    fewest, extra = divmod(num_layers, num_stages)
    positions = fewest + (extra > 0)
    stages, first = [], 0
    for stage in range(num_stages):
        count = fewest + (stage < extra)
        layers = [*range(first, first + count), *[None] * (positions - count)]
        stages.append(tuple(layers))
        first += count
    return tuple(stages)


def round_up(size: int, multiple: int) -> int:
    """`size`, rounded up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple
