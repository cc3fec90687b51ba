"""Writes the Hugging Face layout: safetensors files, and an index if there are several."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from convert.task import RowBlock, Task
from convert.transform import Transform, tensor_bytes
from llama_jax.checkpoint.directory import INDEX
from llama_jax.checkpoint.huggingface_files import SINGLE
from llama_jax.checkpoint.reader import CheckpointError

SHARD_BYTES = 5 * 10**9  # as on the Hugging Face Hub
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def plan(transforms: Sequence[Transform]) -> list[Task]:
    """Returns one task per file.

    Raises:
      CheckpointError: the weights are quantized; no other program could read them in this layout.
    """
    if any(len(transform.targets) > 1 for transform in transforms):
        raise CheckpointError(
            'Quantized weights cannot be written in Hugging Face layout: dequantize them ("plain").'
        )
    shards = list(_shards(transforms))
    return [_task(shard, name) for shard, name in zip(shards, _names(len(shards)), strict=True)]


def finish(directory: Path, transforms: Sequence[Transform]) -> None:
    """Writes the index if there is more than one file."""
    shards = list(_shards(transforms))
    if len(shards) == 1:
        return
    weight_map = {
        tensor.hf_name: name
        for shard, name in zip(shards, _names(len(shards)), strict=True)
        for transform in shard
        for tensor in transform.targets
    }
    size = sum(_bytes(transform) for shard in shards for transform in shard)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(transforms: Sequence[Transform]) -> Iterator[list[Transform]]:
    """Splits the weights into shards of at most `SHARD_BYTES`, or of a single larger weight."""
    shard: list[Transform] = []
    size = 0
    for transform in transforms:
        if shard and size + _bytes(transform) > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(transform)
        size += _bytes(transform)
    yield shard


def _names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _task(shard: list[Transform], name: str) -> Task:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for transform in shard:
        (tensor,) = transform.targets
        begin, end = end, end + _bytes(transform)
        header[tensor.hf_name] = {
            "dtype": _DTYPES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    blocks = tuple(
        RowBlock(transform, slice(0, transform.num_rows), ((name,),)) for transform in shard
    )
    return Task({name: len(start) + end}, blocks, {name: start})


def _bytes(transform: Transform) -> int:
    return sum(map(tensor_bytes, transform.targets))
