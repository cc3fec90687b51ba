"""What every checkpoint reader offers, and the check that a checkpoint is whole."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.config.llama_config import DTYPES
from llama_jax.weights.table import checkpoint_tensors
from sharding.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded; the message is one sentence for the user."""


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor; `dtype` is numpy's name, or the file's own where that is not supported."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Of a tensor whose dtype is supported."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


class CheckpointReader(Protocol):
    """An open checkpoint that holds exactly the tensors its config asks for.

    Attributes:
      path: its directory.
      config: what config.json says, with `dtype` as most of the weights are really stored, those
        aside that are quantised.
      tensors: by Hugging Face name, one entry for each in `weights.checkpoint_tensors(config)`.
    """

    path: Path
    config: LlamaConfig
    tensors: dict[str, TensorInfo]

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice of a tensor, cast to the dtype of `out`.

        Only the slice is read, as far as the format allows, and in pieces: the memory it takes
        beside `out` is bounded, however large the slice.

        Args:
          name: of the tensor.
          index: for each axis the first element and the one after the last, both inside.
          out: contiguous or not, in the shape of the slice.

        Raises:
          CheckpointError: if the bytes cannot be read.
        """
        ...

    def map(self, name: str, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray | None:
        """A slice of a tensor, not empty, in pages of its files instead of a copy.

        Only for files that nobody changes in place.

        Args:
          name, index: as for `read_into`.
          dtype: that is wanted.

        Returns:
          The slice, aligned for JAX, whose bytes have been read; writing to it changes no file.
          None where its bytes do not lie there in this order and dtype, or cannot be mapped:
          `read_into` copies them, or says what is wrong.
        """
        ...

    def close(self) -> None:
        """Lets go of the files."""
        ...


def numpy_dtype(name: str) -> np.dtype:
    """A dtype by its name, those of `ml_dtypes` ("bfloat16", "float8_e4m3fn") included."""
    return np.dtype(getattr(ml_dtypes, name, name))


def check_directory(path: Path) -> None:
    """That there is such a directory; raises CheckpointError."""
    if path.is_dir():
        return
    if path.exists():
        raise CheckpointError(f"{path} is a file: give the directory that holds the checkpoint.")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise CheckpointError(
            f"There is no directory {path}; if it is the name of a model on a hub, fetch it first, "
            f"because nothing is downloaded here: `hf download {path} --local-dir DIR`, then "
            "give DIR."
        )
    raise CheckpointError(f"There is no directory {path}.")


def check_tensors(path: Path, tensors: Mapping[str, TensorInfo], config: LlamaConfig) -> None:
    """That a checkpoint holds every tensor of the config, in its shape, and no other.

    Raises:
      CheckpointError: one sentence that names all that are missing, surplus or misshapen.
    """
    wanted = checkpoint_tensors(config)
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    for name, info in tensors.items():
        tensor = wanted.get(name)
        if tensor is None:
            problems.append(f"{name} belongs to no weight of the model")
            continue
        dtypes = DTYPES if tensor.dtype is None else (tensor.dtype,)
        if info.shape != tensor.shape:
            problems.append(f"{name} has shape {list(info.shape)} instead of {list(tensor.shape)}")
        elif info.dtype not in dtypes:
            problems.append(f"{name} is stored as {info.dtype} instead of {', '.join(dtypes)}")
    refuse(f"{path} does not hold the weights that its config.json describes", problems)


def refuse(what: str, problems: list[str]) -> None:
    """Raises CheckpointError with all the problems in one sentence, if there are any."""
    if problems:
        raise CheckpointError(f"{what}: {'; '.join(problems)}.")


def with_stored_dtype(config: LlamaConfig, tensors: Mapping[str, TensorInfo]) -> LlamaConfig:
    """The config with the dtype that most plain weights are stored in, whatever it said."""
    size = dict.fromkeys(DTYPES, 0)
    for name, wanted in checkpoint_tensors(config).items():
        if wanted.dtype is None:
            size[tensors[name].dtype] += math.prod(wanted.shape)
    return replace(config, dtype=max(DTYPES, key=lambda dtype: size[dtype]))
