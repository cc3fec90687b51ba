"""One safetensors file.

The `safetensors` library opens the file, checks its header and describes its tensors. It does not
read them here: its NumPy slices do not support FP8, hold the interpreter's lock, and are copies,
whereas a loader needs the bytes in a buffer that it already has. The library does not say where a
tensor lies in the file either, but guarantees that tensors follow one another without gaps
(https://github.com/huggingface/safetensors#format).
"""

import functools
import math
import re
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from llama_jax.checkpoint.directory import refuse_lfs_pointer
from llama_jax.checkpoint.file_array import FileArray
from llama_jax.checkpoint.reader import CheckpointError, TensorInfo, numpy_dtype
from sharding.errors import list_text

_DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F8_E4M3": "float8_e4m3fn",
    "I8": "int8",
    "U8": "uint8",
    "I32": "int32",
}


class SafetensorsFile:
    """An open file; no handle is kept.

    Attributes:
      path: of the file.
      tensors: name → shape and dtype, in the order of the file. A dtype that is not supported has
        the file's name for it ("F8_E5M2"), and its tensor cannot be read.
    """

    def __init__(self, path: Path):
        """Checks that the header and the length of the file agree.

        Raises:
          CheckpointError: they do not, or the file cannot be read.
        """
        self.path = path
        try:
            refuse_lfs_pointer(path)
            with path.open("rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
            with safe_open(path, framework="numpy") as opened:
                slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
                described = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        except OSError as error:
            # An error of the library itself has only a text.
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is truncated or corrupt ({list_text([str(error)])}): copy it again."
            ) from None
        self.tensors: dict[str, TensorInfo] = {}
        self._arrays: dict[str, FileArray] = {}
        offset = 8 + header_size  # the header follows its own length
        for name, (dtype, shape) in described.items():
            self.tensors[name] = TensorInfo(shape, _DTYPES.get(dtype, dtype))
            if dtype in _DTYPES:
                self._arrays[name] = FileArray(path, offset, shape, numpy_dtype(_DTYPES[dtype]))
            offset += math.prod(shape) * _bits(dtype) // 8

    def is_readable(self, name: str) -> bool:
        """Whether the dtype of a tensor is supported."""
        return name in self._arrays

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice of a tensor, as `FileArray.read_into` does."""
        self._arrays[name].read_into(index, out)

    def mapped(self, name: str) -> np.ndarray:
        """The whole tensor, memory-mapped and read-only; nothing is read until it is used.

        Raises:
          CheckpointError: the file cannot be mapped.
        """
        array = self._arrays[name]
        size = math.prod(array.shape) * array.dtype.itemsize
        data = self._map[array.offset : array.offset + size]
        return data.view(array.dtype).reshape(array.shape)

    @functools.cached_property
    def _map(self) -> np.ndarray:
        """The file, mapped once: every map takes a file descriptor."""
        try:
            return np.asarray(np.memmap(self.path, np.uint8, "r"))
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}.") from None


def _bits(dtype: str) -> int:
    """Bits per element, which the file's name for a dtype gives: "BF16", "F8_E4M3", "I64"."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8  # BOOL
