"""Reads the header of a GGUF file: its metadata, and where each tensor lies.

The format is specified in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf`
package names the tensor types and gives their block sizes. Its `GGUFReader` is not used because it
makes a NumPy array of every token and merge (3.6 s and 190 MB for a vocabulary of 49,152), and
because a damaged file gives errors of NumPy. Tests compare the two.
"""

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from llama_jax.gguf.errors import GgufError
from llama_jax.gguf.find import MAGIC

_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of the tensors, unless the metadata says otherwise
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_LFS_POINTER = b"version https://git-lfs"
_CODES = {  # of scalars, for `struct` and NumPy
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


T = TypeVar("T")


@dataclass(frozen=True)
class GgufTensor:
    """A stored tensor.

    Attributes:
      path: of its file.
      offset: of its first byte in the file.
      shape: in row-major order, so a matrix is [out, in].
      type: the name of its type, such as "Q4_K"; "type 99" if the `gguf` package does not know it.
      nbytes: its length in the file; 0 if its type is unknown.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    type: str
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The header of a model, which may be split into several files.

    Attributes:
      path: of the first file, for messages.
      metadata: key → number, string, or list.
      tensors: name → tensor, of all files.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def get(self, key: str, kind: type[T]) -> T | None:
        """A value of the metadata; None if there is none.

        Raises:
          GgufError: it is of another type.
        """
        value = self.metadata.get(key)
        if value is None or type(value) is kind:
            return value
        raise GgufError(
            f"{self.path} gives {key} as a {type(value).__name__} instead of a {kind.__name__}: it "
            "is damaged, copy it again."
        )


def read_header(parts: Sequence[Path]) -> GgufHeader:
    """Reads the header of a model from the files that `find_gguf` found.

    Raises:
      GgufError: a file is damaged, truncated or of an unknown version, or a part is missing.
    """
    headers = [_read(path) for path in parts]
    first = headers[0]
    count = first.get("split.count", int) or 1
    if count != len(parts):
        raise GgufError(
            f"{first.path} is one of the {count} parts of a model: name the files as "
            "`llama-gguf-split` does, NAME-00001-of-0000N.gguf, in one directory."
        )
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    if len(tensors) != sum(len(header.tensors) for header in headers):
        raise GgufError(f"The parts of {first.path} hold the same tensors: copy them again.")
    return GgufHeader(first.path, first.metadata, tensors)


def _read(path: Path) -> GgufHeader:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise GgufError(
                    f"{path} is a Git LFS pointer, not the model: run `git lfs pull` in its "
                    "directory."
                )
            if not start.startswith(MAGIC):
                raise GgufError(f"{path} is not a GGUF file: copy it again.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data)
    except GgufError:  # which is a ValueError
        raise
    except OSError as error:
        raise GgufError(f"{path} cannot be read: {error.strerror}.") from None
    except (struct.error, ValueError, OverflowError, RecursionError):
        raise GgufError(f"{path} is truncated or damaged: copy it again.") from None


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    cursor = _Cursor(data, len(MAGIC))
    version = cursor.scalar("I")
    if version not in _VERSIONS:
        raise GgufError(
            f"{path} has GGUF version {version}, but this program reads versions 2 and 3 in "
            "little-endian order: convert the model again with a current llama.cpp."
        )
    num_tensors, num_keys = cursor.scalar("Q"), cursor.scalar("Q")
    metadata = {cursor.string(): cursor.value() for _ in range(num_keys)}
    if len(metadata) != num_keys:
        raise GgufError(f"{path} has two values for one key of its metadata: copy it again.")
    described = [cursor.tensor() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(alignment)
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, number, offset in described:
        if name in tensors:
            raise ValueError(name)
        kind, size = _type(number, shape)
        if offset % alignment:
            raise ValueError(offset)
        if start + offset + size > len(data):
            raise GgufError(f"{path} is truncated: it ends before tensor {name}; copy it again.")
        tensors[name] = GgufTensor(path, start + offset, shape, kind, size)
    in_order = sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))
    if any(after.offset < tensor.offset + tensor.nbytes for tensor, after in pairwise(in_order)):
        raise GgufError(f"{path} stores two tensors in the same place: copy it again.")
    return GgufHeader(path, metadata, tensors)


def _type(number: int, shape: tuple[int, ...]) -> tuple[str, int]:
    """The name of a tensor type, and the bytes of a tensor; 0 bytes for an unknown type."""
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return f"type {number}", 0
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(shape)
    return kind.name, math.prod(shape) // block * block_bytes


class _Cursor:
    """A place in the header; it raises struct.error or ValueError where the bytes are wrong."""

    def __init__(self, data: mmap.mmap, at: int):
        self._data = data
        self.at = at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        return self._bytes(length).decode("utf-8")

    def value(self) -> Any:
        return self._value(GGUFValueType(self.scalar("I")))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset from the first tensor."""
        name, dimensions = self.string(), self.scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(dimensions)
        shape = tuple(self.scalar("Q") for _ in range(dimensions))[::-1]  # stored fastest first
        return name, shape, self.scalar("I"), self.scalar("Q")

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalar(_CODES[kind])
        element, count = GGUFValueType(self.scalar("I")), self.scalar("Q")
        if element in _CODES:
            dtype = np.dtype(f"<{_CODES[element]}")
            return np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()
        return [self._value(element) for _ in range(count)]

    def _bytes(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self._data):
            raise ValueError(count)
        return self._data[start : self.at]
