"""How layers are divided among stages, and sizes among devices. Imports no JAX."""


def positions_per_stage(num_layers: int, num_stages: int) -> int:
    """Layer positions of each stage, padding layers included."""
    return -(-num_layers // num_stages)


def split_layers(num_layers: int, num_stages: int) -> tuple[tuple[int | None, ...], ...]:
    """Assigns layers to stages: the layer at each position of each stage, None for padding.

    All stages run the same program, so all have the same number of positions. If the layers do not
    divide evenly, the first stages get one more: 22 layers on 4 stages give 6, 6, 5 and 5.
    """
    fewest, extra = divmod(num_layers, num_stages)
    positions = positions_per_stage(num_layers, num_stages)
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
