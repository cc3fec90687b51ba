"""The interface of all checkpoint readers, and the check that a checkpoint is complete."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.config.llama_config import DTYPES
from llama_jax.weights.table import checkpoint_tensors
from sharding.errors import UserError, list_text


class CheckpointError(UserError):
    """The checkpoint cannot be loaded."""


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor; `dtype` is NumPy's name, or the file's own name if it is not supported."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes; the dtype must be a supported one."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


class CheckpointReader(Protocol):
    """An open checkpoint that holds exactly the tensors its config describes.

    Attributes:
      path: the checkpoint's directory.
      config: the contents of config.json, except that the stored tensors decide `dtype`, the one
        in which most of the unquantized weights are stored, and `quantization.plain`.
      tensors: Hugging Face name → shape and dtype, for each tensor in
        `weights.table.checkpoint_tensors(config)`.
      files: the weight files that belong to the model.
    """

    path: Path
    config: LlamaConfig
    tensors: dict[str, TensorInfo]
    files: tuple[Path, ...]

    def read_into(self, name: str, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Fills `out` with a slice of a tensor, cast to the dtype of `out`.

        Reads only the slice, as far as the format allows, and in blocks, so that the memory used
        beyond `out` is bounded. Several threads may read at once.

        Args:
          name: of the tensor.
          index: one slice per axis, with start and stop inside the tensor and no step.
          out: an array in the shape of the slice, contiguous or not.

        Raises:
          CheckpointError: the bytes cannot be read.
        """
        ...

    def close(self) -> None:
        """Releases the files."""
        ...


def numpy_dtype(name: str) -> np.dtype:
    """Returns the dtype with this name, which may be one of `ml_dtypes` ("bfloat16")."""
    return np.dtype(getattr(ml_dtypes, name, name))


def check_tensors(path: Path, tensors: Mapping[str, TensorInfo], config: LlamaConfig) -> None:
    """Checks that a checkpoint holds every tensor of the config, in its shape, and no others.

    Raises:
      CheckpointError: tensors are missing, unexpected, or of a wrong shape or dtype.
    """
    wanted = checkpoint_tensors(config)
    missing = [f"{name} is missing" for name in wanted if name not in tensors]
    problems = []
    for name, info in tensors.items():
        tensor = wanted.get(name)
        if tensor is None:
            problems.append(f"{name} is not a weight of the model")
            continue
        dtypes = DTYPES if tensor.dtype is None else (tensor.dtype,)
        if info.shape != tensor.shape:
            problems.append(f"{name} has shape {list(info.shape)} instead of {list(tensor.shape)}")
        elif info.dtype not in dtypes:
            problems.append(f"{name} is stored as {info.dtype} instead of {', '.join(dtypes)}")
    # Under other names, all are missing: what is there instead must be among the first.
    problems = [*missing[:2], *problems, *missing[2:]]
    refuse(f"{path} does not hold the weights that its config.json describes", problems)


def refuse(what: str, problems: list[str]) -> None:
    """Raises CheckpointError with the first problems and their number, if there are any."""
    if problems:
        raise CheckpointError(f"{what}: {list_text(problems, '; ')}.")


def with_stored_dtype(config: LlamaConfig, tensors: Mapping[str, TensorInfo]) -> LlamaConfig:
    """Returns the config with the dtype in which most unquantized weights are stored.

    Counts only those in `tensors`.
    """
    size = dict.fromkeys(DTYPES, 0)
    for name, wanted in checkpoint_tensors(config).items():
        if wanted.dtype is None and name in tensors:
            size[tensors[name].dtype] += math.prod(wanted.shape)
    return replace(config, dtype=max(DTYPES, key=lambda dtype: size[dtype]))
