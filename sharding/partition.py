"""Which mesh axis each logical axis of a weight is split over, and how layers fall to stages."""

from collections.abc import Sequence

from jax.sharding import PartitionSpec as P

from sharding.mesh import MODEL, STAGE

# Logical axis → mesh axes. Column-parallel matrices are split over their rows ([out, in]), the
# row-parallel ones after them over their columns, so that a layer needs two all-reduces. The
# vocabulary is split over every rank, not given to the first and last stage: it makes memory and
# work equal on all of them.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "embed": None,
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "vocab": (STAGE, MODEL),
}


def partition_spec(axes: Sequence[str], stacked: bool = False) -> P:
    """The spec of a weight with these logical axes; `stacked` puts a `stage` axis before them."""
    return P(*((STAGE,) if stacked else ()), *(RULES[axis] for axis in axes))


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


def padded(size: int, parts: int) -> int:
    """The least multiple of `parts` that is not below `size`."""
    return -(-size // parts) * parts
