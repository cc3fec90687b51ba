"""Meshes by name, such as "4x2". Imports no JAX."""

import re

from sharding.errors import UserError


class MeshError(UserError):
    """The mesh cannot be made."""


def parse_mesh(shape: str) -> tuple[int, int]:
    """Parses `"4x2"` to (4 stages, 2 tensor-parallel ranks).

    Raises:
      MeshError: the shape has another form.
    """
    match = re.fullmatch(r"\s*([1-9]\d*)\s*[x×X]\s*([1-9]\d*)\s*", str(shape))
    if match is None:
        raise MeshError(
            f'A mesh must have the form "stages x ranks", such as "4x2", got {shape!r}.'
        )
    return int(match[1]), int(match[2])
