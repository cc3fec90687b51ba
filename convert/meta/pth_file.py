"""One `consolidated.NN.pth`, memory-mapped.

Since version 1.6 torch saves an uncompressed zip archive: `NAME/data.pkl` describes the tensors,
and `NAME/data/KEY` holds the bytes of each storage. Reading it here needs no torch, reads no tensor
before it is used, and executes nothing from the file (`tensor_pickle`).
"""

import math
import mmap
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from convert.meta.tensor_pickle import PickleError, Tensor, read_tensors
from llama_jax.checkpoint.directory import refuse_lfs_pointer
from llama_jax.checkpoint.reader import CheckpointError, TensorInfo, numpy_dtype

MAX_PICKLE = 4 << 20  # bytes; a shard of 405B has 0.3 MB
_LOCAL_HEADER = struct.Struct("<4s22x2H")  # signature, lengths of the name and the extra field
_OLD_FORMAT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # torch's magic number, pickled


class PthFile:
    """An open file.

    Attributes:
      path: of the file.
      tensors: name → shape and dtype, in the file's order.
    """

    def __init__(self, path: Path):
        """Maps the file and checks that the bytes of every tensor are inside it.

        Raises:
          CheckpointError: the file is damaged, or is not a dictionary of tensors saved by torch.
        """
        self.path = path
        try:
            refuse_lfs_pointer(path)
            with path.open("rb") as file:
                entries = _read_directory(file, path)
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
        described = self._describe(entries)
        self.tensors: dict[str, TensorInfo] = {}
        self._views: dict[str, tuple[int, tuple[int, ...]]] = {}
        for name, tensor in described.items():
            dtype = tensor.storage.dtype
            self.tensors[name] = TensorInfo(tensor.shape, dtype)
            start = self._start_of(name, tensor, entries)
            size = numpy_dtype(dtype).itemsize
            # NumPy checks the range of strides even if they are never used.
            empty = 0 in tensor.shape
            strides = [
                size if empty or count == 1 else size * stride
                for count, stride in zip(tensor.shape, tensor.strides, strict=True)
            ]
            self._views[name] = (start + tensor.offset * size, tuple(strides))

    def array(self, name: str) -> np.ndarray:
        """The whole tensor, memory-mapped and read-only; nothing is read until it is used."""
        info = self.tensors[name]
        start, strides = self._views[name]
        return np.ndarray(info.shape, numpy_dtype(info.dtype), self._map, start, strides)

    def _describe(self, entries: dict[str, zipfile.ZipInfo]) -> dict[str, Tensor]:
        """Returns the tensors by name; the keys of their storages are names of zip entries."""
        described = [name for name in entries if name.split("/", 1)[1:] == ["data.pkl"]]
        if len(described) != 1:
            raise CheckpointError(
                f"{self.path} is a zip archive, but not a checkpoint: it has {len(described)} "
                "data.pkl instead of one."
            )
        folder = described[0].removesuffix("data.pkl")
        byteorder = entries.get(f"{folder}byteorder")
        if byteorder is not None and self._bytes_of(byteorder, max_size=16) != b"little":
            raise CheckpointError(
                f"{self.path} was saved on a big-endian machine: load it with torch and save it "
                "again on a little-endian one."
            )
        try:
            tensors = read_tensors(self._bytes_of(entries[described[0]], max_size=MAX_PICKLE))
        except PickleError as error:
            raise CheckpointError(f"{self.path} {error}.") from None
        return {
            name: tensor._replace(
                storage=tensor.storage._replace(key=f"{folder}data/{tensor.storage.key}")
            )
            for name, tensor in tensors.items()
        }

    def _start_of(self, name: str, tensor: Tensor, entries: dict[str, zipfile.ZipInfo]) -> int:
        """Returns where the tensor's storage starts in the file; checks that both are complete."""
        storage = tensor.storage
        entry = entries.get(storage.key)
        if entry is None:
            raise CheckpointError(f"{self.path} has no data for its tensor {name!r}.")
        count = math.prod(tensor.shape)
        last = sum(
            stride * (size - 1) for size, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        size = numpy_dtype(storage.dtype).itemsize
        # A tensor with repeated elements could have more of them than its storage.
        needed = max(count, tensor.offset + last + 1) if count else tensor.offset
        if needed > storage.length or storage.length * size > entry.file_size:
            raise CheckpointError(
                f"{self.path} is damaged: its tensor {name!r} is larger than its stored data."
            )
        return self._start(entry)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Returns where an entry's bytes start."""
        at = entry.header_offset
        header = self._map[at : at + _LOCAL_HEADER.size] if at >= 0 else b""
        if len(header) == _LOCAL_HEADER.size:
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            start = at + _LOCAL_HEADER.size + name_length + extra_length
            if signature == b"PK\3\4" and start + entry.file_size <= len(self._map):
                return start
        raise CheckpointError(
            f"{self.path} is damaged: {entry.filename} is not at the offset in its directory; copy "
            "the file again."
        )

    def _bytes_of(self, entry: zipfile.ZipInfo, max_size: int) -> bytes:
        if entry.file_size > max_size:
            raise CheckpointError(
                f"{self.path} has a {entry.filename} of {entry.file_size:,} bytes, more than the "
                f"maximum of {max_size:,}."
            )
        start = self._start(entry)
        return self._map[start : start + entry.file_size]


def _read_directory(file: BinaryIO, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Returns the entries of the archive by name; checks that all are uncompressed."""
    first = file.read(len(_OLD_FORMAT))
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error):
        raise CheckpointError(f"{path} {_no_archive(first)}.") from None
    by_name: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        if entry.filename in by_name:
            raise CheckpointError(f"{path} is a zip archive with two entries {entry.filename!r}.")
        by_name[entry.filename] = entry
        if entry.flag_bits & 1:
            raise CheckpointError(f"{path} is encrypted: decrypt it first.")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(
                f"{path} is compressed, unlike files of torch.save: load it with torch and save it "
                "again."
            )
    return by_name


def _no_archive(first: bytes) -> str:
    if first.startswith(_OLD_FORMAT):
        return "is in torch's format from before version 1.6: load it with torch and save it again"
    if first.startswith(b"PK\3\4"):
        return "is truncated or damaged: the directory at its end is missing; copy it again"
    return "is not a torch checkpoint, which would be a zip archive"
