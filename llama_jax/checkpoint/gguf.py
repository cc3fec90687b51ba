"""Reads a checkpoint in GGUF, dequantizing blocks as they are read.

llama.cpp rotates adjacent pairs of a head's elements where transformers rotates the two halves of
the head, so its converter reorders the rows of the query and key matrices. They are read in
transformers' order (`LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.file_array import FileArray
from llama_jax.checkpoint.reader import (
    CheckpointError,
    TensorInfo,
    check_tensors,
    with_stored_dtype,
)
from llama_jax.config import LlamaConfig
from llama_jax.config.huggingface import read_checkpoint_config
from llama_jax.gguf.header import GgufTensor, read_header
from llama_jax.gguf.types import SUPPORTED, block_sizes, decode, stored_dtype
from llama_jax.weights.table import each_weight

BLOCK_BYTES = 1 << 22  # of float32, dequantized at a time
_IGNORED = ("rope_freqs.weight",)  # part of the config
_NAMES = {
    "embedding": "token_embd",
    "final_norm.scale": "output_norm",
    "lm_head": "output",
    "attention_norm.scale": "blk.{layer}.attn_norm",
    "attention.wq": "blk.{layer}.attn_q",
    "attention.wk": "blk.{layer}.attn_k",
    "attention.wv": "blk.{layer}.attn_v",
    "attention.wo": "blk.{layer}.attn_output",
    "mlp_norm.scale": "blk.{layer}.ffn_norm",
    "mlp.w_gate": "blk.{layer}.ffn_gate",
    "mlp.w_up": "blk.{layer}.ffn_up",
    "mlp.w_down": "blk.{layer}.ffn_down",
}
_ROTATED = ("attention.wq", "attention.wk")


class GgufReader:
    """A `CheckpointReader`. `path` is the file that was given, or the directory.

    Attributes:
      stored_bytes: bytes in the files, by the type of the tensors ("Q4_K").
    """

    def __init__(self, path: Path, parts: Sequence[Path]):
        """Opens the files that `find_gguf` found and checks the tensors without reading them.

        Raises:
          GgufError, ConfigError, CheckpointError: anything is missing, wrong or not supported.
        """
        self.path = path
        self.files = tuple(parts)
        self.declared = read_checkpoint_config(path)
        config = self.declared.config
        stored = {
            name: tensor
            for name, tensor in read_header(parts).tensors.items()
            if name not in _IGNORED
        }
        _check_types(path, stored)
        self.stored_bytes: Counter[str] = Counter()
        for tensor in stored.values():
            self.stored_bytes[tensor.type] += tensor.nbytes
        self._tensors: dict[str, _Stored] = {}
        for weight, layer in each_weight(config):
            name = f"{_NAMES[weight.name].format(layer=layer)}.weight"
            if name in stored:
                head_dim = config.head_dim if weight.name in _ROTATED else None
                hf_name = weight.hf_name.format(layer=layer)
                self._tensors[hf_name] = _Stored(stored.pop(name), head_dim)
        self.tensors = {name: tensor.info for name, tensor in self._tensors.items()}
        # Whatever is left is named in the message.
        extra = {name: TensorInfo(tensor.shape, tensor.type) for name, tensor in stored.items()}
        check_tensors(path, self.tensors | extra, config)
        self.config: LlamaConfig = with_stored_dtype(config, self.tensors)

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice; reads and dequantizes the blocks that it touches, no others."""
        self._tensors[name].read_into(index, out)

    def close(self) -> None:
        """Ends the use of the reader; no file is open between reads."""
        self._tensors.clear()


@dataclass(frozen=True)
class _Stored:
    """A tensor of the model.

    Attributes:
      tensor: as it is stored.
      head_dim: of a matrix whose rows llama.cpp reordered within each head; None for any other.
    """

    tensor: GgufTensor
    head_dim: int | None

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.tensor.shape, stored_dtype(self.tensor))

    def read_into(self, index: tuple[slice, ...], out: np.ndarray) -> None:
        if len(index) == 1:  # a vector is read like a matrix of one row
            index, out = (slice(0, 1), *index), out[None]
        rows, columns = index
        block, block_bytes = block_sizes(self.tensor.type)
        first, last = columns.start // block, -(-columns.stop // block)
        inside = slice(columns.start - first * block, columns.stop - first * block)
        as_bytes = slice(first * block_bytes, last * block_bytes)
        file = self._bytes(block, block_bytes)
        for cut in self._cuts(rows, (last - first) * block):
            stored, order = self._stored_rows(cut)
            data = np.empty((stored.stop - stored.start, as_bytes.stop - as_bytes.start), np.uint8)
            file.read_into((stored, as_bytes), data)
            values = decode(data if order is None else data[order], self.tensor.type)
            out[cut.start - rows.start : cut.stop - rows.start] = values[:, inside]

    def _bytes(self, block: int, block_bytes: int) -> FileArray:
        shape = self.tensor.shape if len(self.tensor.shape) == 2 else (1, *self.tensor.shape)
        row_bytes = shape[1] // block * block_bytes
        return FileArray(
            self.tensor.path, self.tensor.offset, (shape[0], row_bytes), np.dtype(np.uint8)
        )

    def _cuts(self, rows: slice, num_columns: int) -> list[slice]:
        """Cuts rows into pieces that are read at a time."""
        step = max(1, BLOCK_BYTES // (4 * num_columns))
        starts = range(rows.start, rows.stop, step)
        return [slice(start, min(start + step, rows.stop)) for start in starts]

    def _stored_rows(self, rows: slice) -> tuple[slice, np.ndarray | None]:
        """The stored rows that cover these rows, and the order of the rows among them.

        At each end they cover less than a head too many.
        """
        if self.head_dim is None:
            return rows, None
        # Row `half * h / 2 + pair` of a head is stored as row `2 * pair + half`.
        head, inside = np.divmod(np.arange(rows.start, rows.stop), self.head_dim)
        half, pair = np.divmod(inside, self.head_dim // 2)
        stored = head * self.head_dim + 2 * pair + half
        first = int(stored.min())
        return slice(first, int(stored.max()) + 1), stored - first


def _check_types(path: Path, tensors: dict[str, GgufTensor]) -> None:
    unsupported = {tensor.type for tensor in tensors.values() if tensor.type not in SUPPORTED}
    if unsupported:
        raise CheckpointError(
            f"{path} stores tensors as {', '.join(sorted(unsupported))}, which is not supported: "
            f"use a file with {', '.join(SUPPORTED)}, such as one of type Q4_K_M."
        )
