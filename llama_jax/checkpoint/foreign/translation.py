"""Translates another tool's tensors to those that `weights.table.checkpoint_tensors` names."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.foreign.layout import (
    Arrays,
    ContentError,
    ForeignTensor,
    Index,
    Layout,
    covering,
)
from llama_jax.checkpoint.reader import CheckpointError, TensorInfo, refuse
from llama_jax.config import LlamaConfig
from llama_jax.config.llama_config import DTYPES
from llama_jax.weights.table import LAYER_WEIGHTS, Weight, group_columns, is_quantized, stored_tree

TILE = 512  # rows and columns translated at a time; a tile and its sources fit in a cache


@dataclass(frozen=True)
class Translated:
    """A tensor that is computed when it is read.

    Attributes:
      info: its shape and dtype.
      part: computes a slice of it.
    """

    info: TensorInfo
    part: Callable[[Index], np.ndarray]

    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Fills `out` with a slice, tile by tile; raises ContentError."""
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
    """Finds and checks the stored tensors of every quantized matrix.

    Args:
      path: of the checkpoint, for error messages.
      layout: of the quantized matrices.
      tensors: all stored tensors, by name.
      view: returns a stored tensor, memory-mapped.
      config: of the model, quantized as the layout requires.

    Returns:
      The translated tensors by their names in `weights.table.checkpoint_tensors`, and the names of
      the stored tensors that they consist of or that are ignored.

    Raises:
      CheckpointError: names all tensors that are missing or do not match the layout.
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
        wanted = layout.tensors((num_out, num_in), group)
        found = [_problem(tensors, module, tensor) for tensor in wanted]
        problems += filter(None, found)
        if any(found):
            continue
        names = {t.suffix: module + t.suffix for t in wanted if module + t.suffix in tensors}
        used.update(names.values())
        arrays = {suffix: view(stored_name) for suffix, stored_name in names.items()}
        try:
            layout.check(arrays, group)
        except ContentError as error:
            problems.append(f"{module} {error}")
        translated |= _parts(layout, arrays, weight, layer, config)
    _refuse_mixed(path, plain)
    refuse(f"{path} does not hold the quantized weights that its config.json describes", problems)
    return translated, used


def _problem(tensors: Mapping[str, TensorInfo], module: str, wanted: ForeignTensor) -> str | None:
    """Describes what is wrong with a stored tensor, if anything."""
    name = module + wanted.suffix
    info = tensors.get(name)
    if info is None:
        return f"{name} is missing" if wanted.required else None
    if info.shape not in wanted.shapes:
        return f"{name} has shape {list(info.shape)} instead of {list(wanted.shapes[0])}"
    if info.dtype not in wanted.dtypes:
        return f"{name} is stored as {info.dtype} instead of {', '.join(wanted.dtypes)}"
    return None


def _parts(
    layout: Layout, arrays: Arrays, weight: Weight, layer: int, config: LlamaConfig
) -> dict[str, Translated]:
    """The translated tensors of one matrix, by name."""
    assert config.quantization is not None
    parts = stored_tree(weight, config)
    translated = {}
    for field, tensor in zip(parts._fields, parts, strict=True):
        part = partial(getattr(layout, field), arrays)
        if field != "values" and len(tensor.shape) == 2:  # one column per group
            here = group_columns(weight, config)
            part = partial(_split_groups, part, config.quantization.group_size // here)
        info = TensorInfo(tensor.shape, tensor.dtype)
        translated[tensor.hf_name.format(layer=layer)] = Translated(info, part)
    return translated


def _split_groups(part: Callable[[Index], np.ndarray], factor: int, index: Index) -> np.ndarray:
    """A slice of an array in which each group of the tool is split into `factor` groups."""
    rows, groups = index
    whole, inside = covering(groups, factor)
    return np.repeat(part((rows, whole)), factor, axis=1)[:, inside]


def _tiles(shape: tuple[int, ...]) -> Iterator[Index]:
    """Cuts an array into tiles of at most `TILE` elements along each axis."""
    cuts = ([slice(at, min(at + TILE, size)) for at in range(0, size, TILE)] for size in shape)
    return itertools.product(*cuts)


def _refuse_mixed(path: Path, plain: list[str]) -> None:
    if plain:
        raise CheckpointError(
            f"{path} is only partly quantized, which is not supported: {plain[0]} and "
            f"{len(plain) - 1} more matrices are not quantized; use the original bfloat16 "
            "checkpoint, and convert it with --quantize if you need to."
        )
