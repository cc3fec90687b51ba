"""Translates another tool's tensors to those that `weights.table.checkpoint_tensors` names."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoint.dequantized import read_dequantized
from llama_jax.checkpoint.foreign.layout import (
    G_IDX,
    OF_ACTIVATIONS,
    ContentError,
    ForeignTensor,
    Index,
    Layout,
    covering,
    is_act_order,
)
from llama_jax.checkpoint.reader import TensorInfo, refuse
from llama_jax.config import LlamaConfig
from llama_jax.config.llama_config import DTYPES
from llama_jax.quantization import ACT_ORDER
from llama_jax.weights.table import (
    EMBEDDING,
    LAYER_WEIGHTS,
    Weight,
    each_weight,
    group_columns,
    module_name,
    quantized_tree,
)

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


@dataclass(frozen=True)
class Dequantized:
    """A matrix that a tool quantized and this package does not: the LM head.

    Attributes:
      info: its shape, and float32, in which it is exact.
      parts: its quantized tensors, as a named tuple of `StoredTensor`.
      translated: these by name.
    """

    info: TensorInfo
    parts: Any
    translated: Mapping[str, Translated]

    def read_into(self, index: Index, out: np.ndarray) -> None:
        """Fills `out` with a slice; raises ContentError."""
        read_dequantized(self._read, self.parts, index, out)

    def _read(self, name: str, index: Index, out: np.ndarray) -> None:
        self.translated[name].read_into(index, out)


class Translation(NamedTuple):
    """The outcome of `translate`.

    Attributes:
      config: of the model, with the format and the plain matrices that the tensors show.
      tensors: computed tensors by their names in `weights.table.checkpoint_tensors`.
      used: names of the stored tensors that they consist of, or that are ignored.
    """

    config: LlamaConfig
    tensors: dict[str, Translated | Dequantized]
    used: set[str]


class Described(NamedTuple):
    """How matrices are stored: their layout, and the config with their quantization."""

    layout: Layout
    config: LlamaConfig


class _Matrix(NamedTuple):
    """A quantized matrix.

    Attributes:
      weight, layer: which.
      arrays: the stored arrays by suffix.
      act_order: whether its columns are in act-order.
    """

    weight: Weight
    layer: int
    arrays: dict[str, np.ndarray]
    act_order: bool


def translate(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    view: Callable[[str], np.ndarray],
    layers: Described,
    head: Described,
) -> Translation:
    """Finds and checks the stored tensors of every quantized matrix.

    A matrix that is stored as a plain `weight` is not quantized.

    Args:
      path: of the checkpoint, for error messages.
      tensors: all stored tensors, by name.
      view: returns a stored tensor, memory-mapped.
      layers: how the quantized matrices of the layers are stored.
      head: how the LM head is stored, if it is quantized.

    Raises:
      CheckpointError: names all tensors that are missing or do not match the layout.
    """
    ignored = (*OF_ACTIVATIONS, *layers.layout.passed_over, *head.layout.passed_over)
    used = {name for name in tensors if name.endswith(ignored)}
    matrices: list[_Matrix] = []
    plain: list[str] = []
    problems: list[str] = []
    for weight, layer in each_weight(layers.config):
        if len(weight.axes) != 2 or weight == EMBEDDING:
            continue
        layout, config = layers if weight in LAYER_WEIGHTS else head
        module, group = module_name(weight, layer), _group_size(weight, config)
        stored = tensors.get(f"{module}.weight")
        if stored is not None and stored.dtype in DTYPES:
            if weight in LAYER_WEIGHTS:
                plain.append(module)
            continue
        num_out, num_in = weight.shape(config)
        wanted = layout.tensors((num_out, num_in), group)
        names = {tensor.suffix: _stored_name(tensors, module, tensor) for tensor in wanted}
        if weight not in LAYER_WEIGHTS and not tensors.keys() & names.values():
            continue  # there is no head at all, which `check_tensors` reports
        found = [_problem(tensors, names[tensor.suffix], tensor) for tensor in wanted]
        problems += filter(None, found)
        if any(found):
            continue
        names = {suffix: name for suffix, name in names.items() if name in tensors}
        used.update(names.values())
        arrays = {suffix: view(name) for suffix, name in names.items()}
        try:
            act_order = _check_order(arrays, group)
        except ContentError as error:
            problems.append(f"{module} {error}")
            continue
        matrices.append(_Matrix(weight, layer, arrays, act_order))
    refuse(f"{path} does not hold the quantized weights that its config.json describes", problems)
    act_order = any(matrix.act_order for matrix in matrices if matrix.weight in LAYER_WEIGHTS)
    layers = layers._replace(config=_with_format(layers.config, act_order))
    translated: dict[str, Translated | Dequantized] = {}
    for matrix in matrices:
        if matrix.weight in LAYER_WEIGHTS:
            translated |= _parts(matrix, *layers)
        else:
            config = _with_format(head.config, matrix.act_order)
            info = TensorInfo(matrix.weight.shape(config), "float32")
            tree, parts = quantized_tree(matrix.weight, config), _parts(matrix, head.layout, config)
            translated[matrix.weight.hf_name] = Dequantized(info, tree, parts)
    return Translation(_with_plain(layers.config, plain), translated, used)


def _group_size(weight: Weight, config: LlamaConfig) -> int:
    """The tool's number of columns per group, at most those of the matrix."""
    assert config.quantization is not None
    size, columns = config.quantization.group_size, weight.shape(config)[1]
    return columns if size == -1 else min(size, columns)


def _check_order(arrays: dict[str, np.ndarray], group: int) -> bool:
    """Whether a matrix is in act-order; raises ContentError if its groups cannot be."""
    if not is_act_order(arrays, group):
        arrays.pop(G_IDX, None)
        return False
    order = arrays[G_IDX]
    if order.min() < 0 or order.max() > (len(order) - 1) // group:
        raise ContentError(f"has groups in {G_IDX} that do not exist")
    if np.bincount(order).max() > group:
        raise ContentError(f"has groups in {G_IDX} of more than {group} columns")
    return True


def _with_format(config: LlamaConfig, act_order: bool) -> LlamaConfig:
    """The config with the format of act-order, if any matrix needs it."""
    assert config.quantization is not None
    format = config.quantization.format
    return _with(config, format=ACT_ORDER[format] if act_order else format)


def _with_plain(config: LlamaConfig, plain: list[str]) -> LlamaConfig:
    """The config with these modules not quantized."""
    if len(plain) == config.num_layers * sum(len(weight.axes) == 2 for weight in LAYER_WEIGHTS):
        return replace(config, quantization=None)
    return _with(config, plain=tuple(plain))


def _with(config: LlamaConfig, **changes: Any) -> LlamaConfig:
    assert config.quantization is not None
    return replace(config, quantization=replace(config.quantization, **changes))


def _stored_name(tensors: Mapping[str, TensorInfo], module: str, wanted: ForeignTensor) -> str:
    """The name of a stored tensor, by its alias if only that exists."""
    name = module + wanted.suffix
    if name not in tensors and wanted.alias is not None and module + wanted.alias in tensors:
        return module + wanted.alias
    return name


def _problem(tensors: Mapping[str, TensorInfo], name: str, wanted: ForeignTensor) -> str | None:
    """Describes what is wrong with a stored tensor, if anything."""
    info = tensors.get(name)
    if info is None:
        return f"{name} is missing" if wanted.required else None
    if info.shape not in wanted.shapes:
        return f"{name} has shape {list(info.shape)} instead of {list(wanted.shapes[0])}"
    if info.dtype not in wanted.dtypes:
        return f"{name} is stored as {info.dtype} instead of {', '.join(wanted.dtypes)}"
    return None


def _parts(matrix: _Matrix, layout: Layout, config: LlamaConfig) -> dict[str, Translated]:
    """The translated tensors of one matrix, by name."""
    weight, layer, arrays, _ = matrix
    parts = quantized_tree(weight, config)
    group, columns = _group_size(weight, config), weight.shape(config)[1]
    if "group" in parts._fields:
        arrays.setdefault(G_IDX, (np.arange(columns) // group).astype(np.int32))
    translated = {}
    for field, tensor in zip(parts._fields, parts, strict=True):
        part = partial(getattr(layout, field), arrays)
        if field in ("scale", "zero") and len(tensor.shape) == 2:  # one column per group
            here = group_columns(weight, config)
            part = partial(_split_groups, part, group // here)
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
