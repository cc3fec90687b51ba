"""A `CheckpointReader` over Meta's original release.

A weight is split over the shards along the axis of its ranks (heads, MLP width, vocabulary). The
rotary pairs (x, y) of a head are ordered differently from Hugging Face's layout, which is returned:

    row of a head     0    1    2    3   ...
    Meta             x0   y0   x1   y1   ...   adjacent rows are a pair
    Hugging Face     x0   x1   ...  y0   y1    rows of the two halves are a pair

So half a head in Hugging Face's order is every other row of a head in Meta's order. Any slice of a
tensor is copied directly from the memory-mapped shards; no tensor is ever assembled as a whole.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.meta.params import FILE, parse_params, read_params
from convert.meta.pth_file import PthFile
from convert.meta.tiktoken_file import NUM_SPECIAL, TOKENIZER, eos_token_ids, read_tokens
from llama_jax.checkpoint.directory import meta_file
from llama_jax.checkpoint.reader import (
    CheckpointError,
    TensorInfo,
    refuse,
    with_stored_dtype,
)
from llama_jax.config import ConfigError, LlamaConfig
from llama_jax.weights.table import Weight, each_weight

_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")
_NAMES = {
    "embedding": "tok_embeddings.weight",
    "final_norm.scale": "norm.weight",
    "lm_head": "output.weight",
    "attention_norm.scale": "layers.{layer}.attention_norm.weight",
    "attention.wq": "layers.{layer}.attention.wq.weight",
    "attention.wk": "layers.{layer}.attention.wk.weight",
    "attention.wv": "layers.{layer}.attention.wv.weight",
    "attention.wo": "layers.{layer}.attention.wo.weight",
    "mlp_norm.scale": "layers.{layer}.ffn_norm.weight",
    "mlp.w_gate": "layers.{layer}.feed_forward.w1.weight",
    "mlp.w_up": "layers.{layer}.feed_forward.w3.weight",
    "mlp.w_down": "layers.{layer}.feed_forward.w2.weight",
}
_EMBEDDING, _HEAD = _NAMES["embedding"], _NAMES["lm_head"]
_ROTATED = ("attention.wq", "attention.wk")
_IGNORED = "rope.freqs"  # follows from params.json
_BLOCK_BYTES = 1 << 20  # compared at a time


class _Source(NamedTuple):
    """The shards of a tensor.

    Attributes:
      parts: the shards' arrays, or only one if all shards hold the same.
      axis: along which the parts are concatenated.
      head_dim: rows per head if rotary pairs must be reordered, else None.
    """

    parts: list[np.ndarray]
    axis: int
    head_dim: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole tensor's shape. It is wrong if a part lacks the axis; callers check it."""
        return tuple(
            size * len(self.parts) if axis == self.axis else size
            for axis, size in enumerate(self.parts[0].shape)
        )


class MetaReader:
    """A `CheckpointReader` with Hugging Face's names, shapes and order of rows."""

    def __init__(self, path: Path):
        """Opens the directory and checks everything in it.

        Reads only tensors that may be stored twice: norms, which are in every shard, and the head,
        which may equal the embedding.

        Raises:
          ConfigError, CheckpointError: anything is missing or wrong.
        """
        self.path = path
        params = read_params(path)
        shards = _open_shards(path)
        self.files = tuple(shard.path for shard in shards)
        embedding = _embedding(path, shards, params.get("dim"))
        tied = _HEAD not in shards[0].tensors or _same_bytes(
            embedding, _Source([shard.array(_HEAD) for shard in shards], axis=0)
        )
        try:
            config = parse_params(params, rows=embedding.shape[0], tie_embeddings=tied)
        except ConfigError as error:
            raise ConfigError(f"{path / FILE}: {error}") from None
        self._sources = _sources(path, shards, config, embedding)
        self.tensors = {
            name: TensorInfo(source.shape, source.parts[0].dtype.name)
            for name, source in self._sources.items()
        }
        eos = _eos_token_ids(meta_file(path, TOKENIZER), config)
        self.config = with_stored_dtype(replace(config, eos_token_ids=eos), self.tensors)

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice, copied from the shards."""
        source = self._sources[name]
        rows, *rest = (range(part.start, part.stop) for part in index)
        done = 0
        for run in _runs(rows, source.head_dim):
            _copy(source, (run, *rest), out[done : done + len(run)])
            done += len(run)

    def close(self) -> None:
        """Releases the files; a file is unmapped with its last view."""
        self._sources.clear()


def _runs(rows: range, head_dim: int | None) -> Iterator[range]:
    """Yields Meta's rows for a range of Hugging Face's rows, one range per half head."""
    if head_dim is None:
        yield rows
        return
    half = head_dim // 2
    at = rows.start
    while at < rows.stop:
        head, row = divmod(at, head_dim)
        which, pair = divmod(row, half)
        length = min(half - pair, rows.stop - at)
        first = head * head_dim + 2 * pair + which
        yield range(first, first + 2 * length, 2)
        at += length


def _copy(source: _Source, wanted: tuple[range, ...], out: np.ndarray) -> None:
    """Fills `out` with the wanted indices of each axis, which are in Meta's order."""
    begin = 0
    for part in source.parts:
        to, place = zip(
            *(
                _overlap(indices, begin if axis == source.axis else 0, size)
                for axis, (indices, size) in enumerate(zip(wanted, part.shape, strict=True))
            ),
            strict=True,
        )
        out[to] = part[place]
        begin += part.shape[source.axis]


def _overlap(wanted: range, begin: int, size: int) -> tuple[slice, slice]:
    """Returns the part of `wanted` that is in a shard at `begin`: its place in each of the two."""
    first, end = (
        min(max(0, -((wanted.start - bound) // wanted.step)), len(wanted))
        for bound in (begin, begin + size)
    )
    if first == end:
        return slice(0, 0), slice(0, 0)
    inside = wanted[first:end]
    return slice(first, end), slice(inside.start - begin, inside.stop - begin, inside.step)


def _open_shards(path: Path) -> list[PthFile]:
    """Opens all shards in order; checks that their tensors have equal names, shapes and dtypes."""
    found = sorted(file for file in path.iterdir() if _SHARD.fullmatch(file.name))
    if not found:
        raise CheckpointError(
            f"{path} holds a {FILE} but no consolidated.00.pth: copy the weights there."
        )
    last = int(found[-1].name.split(".")[1])
    wanted = [f"consolidated.{number:02}.pth" for number in range(last + 1)]
    missing = sorted(set(wanted) - {file.name for file in found})
    refuse(f"{path} lacks shards of the checkpoint", missing)
    shards = [PthFile(file) for file in found]
    first = shards[0]
    problems = []
    for shard in shards[1:]:
        there = f"{shard.path.name} and {first.path.name}"
        for name in first.tensors.keys() ^ shard.tensors.keys():
            problems.append(f"{name} is in only one of {there}")
        for name in first.tensors.keys() & shard.tensors.keys():
            if first.tensors[name] != shard.tensors[name]:
                problems.append(f"{name} has another shape or dtype in {there}")
    refuse(f"{path} holds shards of different checkpoints", sorted(problems))
    return shards


def _embedding(path: Path, shards: list[PthFile], dim: Any) -> _Source:
    """Returns the embedding, which is split by rows in Llama 3 and by columns before."""
    info = shards[0].tensors.get(_EMBEDDING)
    if info is None or len(info.shape) != 2:
        raise CheckpointError(f"{path} has no matrix {_EMBEDDING} in its shards.")
    by_columns = info.shape[1] != dim and info.shape[1] * len(shards) == dim
    return _Source([shard.array(_EMBEDDING) for shard in shards], axis=1 if by_columns else 0)


def _same_bytes(one: _Source, other: _Source) -> bool:
    """Compares two matrices bit for bit, in blocks of rows."""
    dtype = one.parts[0].dtype
    if one.shape != other.shape or dtype != other.parts[0].dtype:
        return False
    rows, columns = one.shape
    at_once = max(1, _BLOCK_BYTES // max(1, columns * dtype.itemsize))
    for begin in range(0, rows, at_once):
        wanted = range(begin, min(begin + at_once, rows)), range(columns)
        a, b = (np.empty((len(wanted[0]), columns), dtype) for _ in range(2))
        _copy(one, wanted, a)
        _copy(other, wanted, b)
        if not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            return False
    return True


def _eos_token_ids(file: Path, config: LlamaConfig) -> tuple[int, ...]:
    tokens = len(read_tokens(file))
    # A truncated tokenizer has its special tokens at other ids.
    if tokens + NUM_SPECIAL != config.vocab_size:
        raise CheckpointError(
            f"{file} has {tokens} tokens and {NUM_SPECIAL} special ones, but the vocabulary size "
            f"is {config.vocab_size}: copy the tokenizer of this model again."
        )
    return eos_token_ids(tokens, extended=config.rope_scaling is not None)


def _sources(
    path: Path, shards: list[PthFile], config: LlamaConfig, embedding: _Source
) -> dict[str, _Source]:
    """Returns the source of every tensor of the config by its Hugging Face name."""
    surplus = dict.fromkeys(shards[0].tensors)
    surplus.pop(_IGNORED, None)
    if config.tie_embeddings:
        surplus.pop(_HEAD, None)
    sources, problems = {}, []
    for weight, layer in each_weight(config):
        name, wanted = _NAMES[weight.name].format(layer=layer), weight.shape(config)
        if name not in surplus:
            problems.append(f"{name} is missing")
            continue
        del surplus[name]
        parts = [shard.array(name) for shard in shards]
        source = embedding if name == _EMBEDDING else _source(weight, parts, config)
        if source.shape != wanted:
            problems.append(f"{name} has shape {list(source.shape)} instead of {list(wanted)}")
        elif len(source.parts) < len(parts) and len({part.tobytes() for part in parts}) > 1:
            problems.append(f"{name} differs between the shards")
        sources[weight.hf_name.format(layer=layer)] = source
    problems += [f"{name} is not a weight of the model" for name in surplus]
    refuse(
        f"{path} does not hold, in {len(shards)} shards, the weights that its {FILE} describes",
        problems,
    )
    return sources


def _source(weight: Weight, parts: list[np.ndarray], config: LlamaConfig) -> _Source:
    """Returns the source of a weight other than the embedding.

    Norms are not split; matrices are split along the axis that is not the residual stream's.
    """
    if weight.axes == ("embed",):
        return _Source(parts[:1], axis=0)
    (axis,) = (axis for axis, label in enumerate(weight.axes) if label != "embed")
    return _Source(parts, axis, config.head_dim if weight.name in _ROTATED else None)
