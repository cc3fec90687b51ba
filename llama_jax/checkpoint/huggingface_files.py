"""Finds the safetensors files of a checkpoint in Hugging Face layout, and the tensors in them."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.checkpoint.directory import INDEX, weight_files
from llama_jax.checkpoint.manifest import refuse_outside
from llama_jax.checkpoint.reader import CheckpointError, TensorInfo, refuse
from llama_jax.checkpoint.safetensors_file import SafetensorsFile

SINGLE = "model.safetensors"


class StoredTensor(NamedTuple):
    """A tensor in a file, where it may have another name than in the model."""

    file: SafetensorsFile
    name: str

    @property
    def info(self) -> TensorInfo:
        """The tensor's shape and dtype."""
        return self.file.tensors[self.name]

    @property
    def is_readable(self) -> bool:
        """Whether its dtype is supported."""
        return self.file.is_readable(self.name)

    def mapped(self) -> np.ndarray:
        """The whole tensor, memory-mapped and read-only."""
        return self.file.mapped(self.name)

    def read_into(self, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice, cast to its dtype."""
        self.file.read_into(self.name, index, out)


def open_files(
    path: Path, optional: Callable[[str], bool]
) -> tuple[list[SafetensorsFile], dict[str, StoredTensor]]:
    """Opens the weight files of a directory.

    The index may give them any name. Without an index, model.safetensors is opened if it exists,
    and otherwise every safetensors file: old versions of AutoGPTQ and AutoAWQ chose other names. An
    index may list tensors that are in no file, and may miss some. The caller checks that the files
    hold every weight.

    Args:
      path: the directory.
      optional: whether the model can do without a tensor of this name.

    Returns:
      The files, and the tensors by name.

    Raises:
      CheckpointError: files are missing or damaged, or it is not clear where a tensor is.
    """
    weight_map = read_index(path / INDEX) if (path / INDEX).is_file() else {}
    files = [SafetensorsFile(file) for file in _find_files(path, weight_map, optional)]
    tensors: dict[str, StoredTensor] = {}
    problems = []
    for file in files:
        for name in file.tensors:
            listed = weight_map.get(name)
            if optional(name):
                pass
            elif listed is not None and path / listed != file.path:
                problems.append(f"{name} is in {file.path.name}, not in {listed}")
            elif name in tensors:
                other = tensors[name].file.path.name
                problems.append(f"{name} is in {other} and in {file.path.name}")
            tensors[name] = StoredTensor(file, name)
    refuse(f"{path} does not tell where to find its tensors", problems)
    return files, tensors


def _find_files(
    path: Path, weight_map: Mapping[str, str], optional: Callable[[str], bool]
) -> Sequence[Path]:
    if not weight_map:
        return [path / SINGLE] if (path / SINGLE).is_file() else weight_files(path)
    names = sorted(set(weight_map.values()))
    if (path / SINGLE).is_file() and SINGLE not in names:
        raise CheckpointError(
            f"{path} holds both {SINGLE} and an index of other files: delete one of the two."
        )
    needed = {file for tensor, file in weight_map.items() if not optional(tensor)}
    found = [name for name in names if os.path.isfile(path / name)]
    missing = sorted(needed.difference(found))
    refuse(f"{path / INDEX} names files that do not exist", missing)
    return [path / name for name in found]


def read_index(file: Path) -> dict[str, str]:
    """Returns the file of each tensor, relative to the directory of the index.

    Raises:
      CheckpointError: it is not an index, or names files outside its directory.
    """
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{file} is not an index: it must be a JSON object whose weight_map names the file of "
            "each tensor."
        ) from None
    refuse_outside(file, sorted(set(weight_map.values())))
    return {tensor: str(Path(name)) for tensor, name in weight_map.items()}
