"""From the tensors of another tool to those that `weights.checkpoint_tensors` names."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.foreign.layout import Arrays, ContentError, Index, Layout, Piece, covering
from llama_jax.checkpoint.reader import CheckpointError, TensorInfo, refuse
from llama_jax.config import LlamaConfig
from llama_jax.config.llama_config import DTYPES
from llama_jax.weights.table import LAYER_WEIGHTS, Weight, group_columns, is_quantized, stored_tree

_TILE = 512  # rows and columns translated at once: what fits in a cache, few MiB in all


@dataclass(frozen=True)
class Translated:
    """A tensor that is computed when it is read.

    Attributes:
      info: its shape and dtype.
      part: gives a slice of it.
    """

    info: TensorInfo
    part: Callable[[Index], np.ndarray]

    def read_into(self, index: Index, out: np.ndarray) -> None:
        """See `CheckpointReader.read_into`; raises ContentError."""
        for place in _tiles(out.shape):
            tile = [
                slice(whole.start + part.start, whole.start + part.stop)
                for whole, part in zip(index, place, strict=True)
            ]
            out[place] = self.part(tuple(tile))


def translate(
    path: Path,
    layout: Layout,
    tensors: Mapping[str, TensorInfo],
    view: Callable[[str], np.ndarray],
    config: LlamaConfig,
) -> tuple[dict[str, Translated], set[str]]:
    """Every part of every quantised matrix, by its name in `weights.checkpoint_tensors`.

    Args:
      path: of the checkpoint, for errors.
      layout: in which the matrices are stored.
      tensors: what is stored, by name.
      view: gives a stored tensor, without reading it.
      config: what is to be read; its quantisation is that of the layout.

    Returns:
      The parts; and the names of all stored tensors that they come from, or that do not matter.

    Raises:
      CheckpointError: one sentence that names all tensors that are missing or are not as the layout
        has them.
    """
    assert config.quantization is not None
    group = config.quantization.group_size
    used = {name for name in tensors if name.endswith(layout.passed_over)}
    translated: dict[str, Translated] = {}
    plain: list[str] = []
    problems: list[str] = []
    for layer, weight in itertools.product(range(config.num_layers), LAYER_WEIGHTS):
        if not is_quantized(weight, config):
            continue
        name = weight.hf_name.format(layer=layer)
        module = name.removesuffix(".weight")
        if name in tensors and tensors[name].dtype in DTYPES:
            plain.append(name)
            continue
        num_out, num_in = weight.shape(config)
        pieces = layout.pieces((num_out, num_in), group)
        found = [_problem(tensors, module, piece) for piece in pieces]
        problems += filter(None, found)
        if any(found):
            continue
        held = {p.suffix: module + p.suffix for p in pieces if module + p.suffix in tensors}
        used.update(held.values())
        arrays = {suffix: view(stored_name) for suffix, stored_name in held.items()}
        try:
            layout.check(arrays, group)
        except ContentError as error:
            problems.append(f"{module} {error}")
        translated |= _parts(layout, arrays, weight, layer, config)
    _refuse_mixed(path, plain)
    refuse(f"{path} does not hold the weights quantised as its config.json describes", problems)
    return translated, used


def _problem(tensors: Mapping[str, TensorInfo], module: str, piece: Piece) -> str | None:
    """What is wrong with a stored tensor, if anything is."""
    name = module + piece.suffix
    info = tensors.get(name)
    if info is None:
        return f"{name} is missing" if piece.required else None
    if info.shape not in piece.shapes:
        return f"{name} has shape {list(info.shape)} instead of {list(piece.shapes[0])}"
    if info.dtype not in piece.dtypes:
        return f"{name} is stored as {info.dtype} instead of {', '.join(piece.dtypes)}"
    return None


def _parts(
    layout: Layout, arrays: Arrays, weight: Weight, layer: int, config: LlamaConfig
) -> dict[str, Translated]:
    """The parts of one matrix, by name."""
    assert config.quantization is not None
    parts = stored_tree(weight, config)
    translated = {}
    for field, tensor in zip(parts._fields, parts, strict=True):
        part = partial(getattr(layout, field), arrays)
        if field != "values" and len(tensor.shape) == 2:  # has a column for each group
            here = group_columns(weight, config)
            part = partial(_split_groups, part, config.quantization.group_size // here)
        info = TensorInfo(tensor.shape, tensor.dtype)
        translated[tensor.hf_name.format(layer=layer)] = Translated(info, part)
    return translated


def _split_groups(part: Callable[[Index], np.ndarray], pieces: int, index: Index) -> np.ndarray:
    """A slice of an array whose groups are each cut into as many pieces here."""
    rows, groups = index
    whole, inside = covering(groups, pieces)
    return np.repeat(part((rows, whole)), pieces, axis=1)[:, inside]


def _tiles(shape: tuple[int, ...]) -> Iterator[Index]:
    """Cuts an array into tiles of at most `_TILE` along each axis."""
    cuts = ([slice(at, min(at + _TILE, size)) for at in range(0, size, _TILE)] for size in shape)
    return itertools.product(*cuts)


def _refuse_mixed(path: Path, plain: list[str]) -> None:
    if plain:
        raise CheckpointError(
            f"{path} is quantised in part, which cannot be read here: {plain[0]} and "
            f"{len(plain) - 1} more matrices of its layers are not; take the original checkpoint "
            "in bfloat16, and convert it with --quantize if need be."
        )
