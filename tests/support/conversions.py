"""Conversions in tests: from directory to directory, in blocks small enough for tiny models."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from convert import huggingface_layout, orbax_layout, task, transform, verification
from convert.conversion import Options, Report, convert
from convert.source import open_source
from sharding.errors import UserError

FORMATS = ("int8", "fp8", "int4")


def convert_to(
    destination: Path, source: Path, progress: Callable[..., None] | None = None, **options: Any
) -> Report:
    """Converts `source` with these `Options`."""
    opened = open_source(source)
    with contextlib.closing(opened.reader):
        arguments = (progress,) if progress else ()
        return convert(opened, destination, Options(**options), *arguments)


@contextlib.contextmanager
def small_pieces(
    *, chunk: int = 1000, block: int = 700, shard: int = 20_000
) -> Iterator[pytest.MonkeyPatch]:
    """Cuts even tiny weights into several chunks, blocks and shards of at most this many bytes.

    Disables fsync, which takes time and makes a difference only after a power failure.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax_layout, "CHUNK_BYTES", chunk)
        patch.setattr(huggingface_layout, "SHARD_BYTES", shard)
        patch.setattr(task, "BLOCK_BYTES", block)
        patch.setattr(transform, "_CHECKED_AT_ONCE", 50)
        patch.setattr(verification, "BLOCK_BYTES", block)
        patch.setattr(os, "fsync", lambda handle: None)
        yield patch


def files(directory: Path) -> dict[str, bytes]:
    """Returns the contents of all files in a directory by relative path."""
    found = (file for file in sorted(directory.rglob("*")) if file.is_file())
    return {str(file.relative_to(directory)): file.read_bytes() for file in found}


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Reads all tensors of a checkpoint in Hugging Face layout with `safetensors`."""
    shards = sorted(path.glob("*.safetensors"))
    loaded = [safetensors.torch.load(shard.read_bytes()) for shard in shards]
    weights = dict(itertools.chain.from_iterable(shard.items() for shard in loaded))
    assert len(weights) == sum(map(len, loaded)), "a tensor lies in two shards"
    return weights


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Changes the weights of a checkpoint with a single model.safetensors."""
    file = path / "model.safetensors"
    weights = safetensors.torch.load(file.read_bytes())
    change(weights)
    safetensors.torch.save_file(weights, file, {"format": "pt"})


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """Returns the message of the UserError that a call raises: one sentence on one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert message.endswith(".") and not message.endswith("..") and "\n" not in message
    return message
