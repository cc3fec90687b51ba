"""A LoRA adapter as PEFT writes it: adapter_config.json and adapter_model.safetensors.

LoRA (https://arxiv.org/abs/2106.09685) changes a matrix W [out, in] to W + s · up · down, with
up [out, rank] and down [rank, in]. The scale s is alpha / rank, or alpha / √rank with rsLoRA
(https://arxiv.org/abs/2312.03732). DoRA (https://arxiv.org/abs/2402.09353) then scales each row to
a norm of its own. An adapter may also replace whole weights, which PEFT calls `modules_to_save`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.directory import check_directory
from llama_jax.checkpoint.reader import CheckpointError, refuse
from llama_jax.checkpoint.safetensors_file import SafetensorsFile
from llama_jax.config.errors import ConfigError
from llama_jax.config.huggingface import ADAPTER_CONFIG
from llama_jax.config.json_values import (
    get_bool,
    get_object,
    get_positive_float,
    get_positive_int,
    present,
    quoted,
)
from llama_jax.config.llama_config import DTYPES
from llama_jax.config.unknown_keys import report_unknown

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BLOCK = 1 << 20  # values that are checked at a time
# How PEFT may initialize an adapter without changing the base model.
_INITIALIZED = (True, False, "gaussian", "eva", "orthogonal")
# Keys of methods that are not merged here. They count as absent if they are false, null or empty.
_OTHER_METHODS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
# Keys that are read, and those that only matter in training, or that the tensors show.
_KNOWN = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("init_lora_weights", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
    *("ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config"),
    *("megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "target_modules", "task_type", "velora_config"),
}
# The end of a tensor's name → what it is to the module whose name comes before it.
_PARTS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_embedding_A": "up_transposed",
    ".lora_embedding_B": "down_transposed",
    ".lora_magnitude_vector": "magnitude",
    # The embedding and the head as they were in training, which PEFT saves beside their change.
    ".base_layer.weight": "whole",
    ".modules_to_save.weight": "whole",
    ".original_module.weight": "unused",
    ".weight": "whole",  # last: the names above also end like this
}


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one matrix.

    Attributes:
      up: [out, rank] in the dtype of the file.
      down: [rank, in] in the dtype of the file.
      scale: of their product.
      magnitude: [out], the norms of the rows of the sum (DoRA); None if they stay as they are.
    """

    up: np.ndarray
    down: np.ndarray
    scale: float
    magnitude: np.ndarray | None

    @property
    def shape(self) -> tuple[int, int]:
        """That of the matrix."""
        return len(self.up), self.down.shape[1]

    def apply(self, matrix: np.ndarray, rows: slice) -> None:
        """Changes some rows of the matrix in place.

        Every sum runs over the ranks in order, so an element does not depend on how the matrix is
        cut into blocks. A matrix product of BLAS promises no order.

        Args:
          matrix: [rows, in] float32.
          rows: which rows of the whole matrix these are.
        """
        up = self.up[rows].astype(np.float32) * np.float32(self.scale)
        change, product = np.zeros_like(matrix), np.empty_like(matrix)
        for rank, row in enumerate(self.down):
            np.multiply(up[:, rank, None], row.astype(np.float32), out=product)
            change += product
        matrix += change
        if self.magnitude is not None:
            norm = np.sqrt(np.square(matrix, dtype=np.float64).sum(axis=1))
            factor = self.magnitude[rows].astype(np.float64) / norm
            matrix *= factor.astype(np.float32)[:, None]


class Adapter:
    """An open adapter.

    Attributes:
      path: its directory.
      config_file, weight_file: its two files.
      changes: name of a weight → its change.
      replaced: name of a weight → the tensor that replaces it, before the change if there is one.
    """

    def __init__(self, path: Path, strict_config: bool = False):
        """Opens the directory and reads everything but what replaces whole weights.

        Args:
          path: the directory.
          strict_config: whether unknown keys of its configuration are an error instead of a
            warning.

        Raises:
          CheckpointError: it is no LoRA adapter of PEFT, or one that cannot be merged.
          ConfigError: it has unknown keys, and `strict_config` is set.
        """
        self.path = path
        content = _read_config(path)
        try:
            _check_method(content)
            self._parse(content)
        except ConfigError as error:
            raise CheckpointError(f"{path / ADAPTER_CONFIG}: {error}") from None
        unknown = [key for key in content if key not in {*_KNOWN, *_OTHER_METHODS} and content[key]]
        report_unknown(str(path), {ADAPTER_CONFIG: unknown}, strict_config)
        self._file = SafetensorsFile(_find_weights(path))
        self.config_file, self.weight_file = path / ADAPTER_CONFIG, self._file.path
        modules = self._modules()
        self.replaced = {
            f"{module}.weight": self._file.mapped(parts["whole"])
            for module, parts in modules.items()
            if "whole" in parts
        }
        self.changes = {
            f"{module}.weight": self._low_rank(module, parts)
            for module, parts in modules.items()
            if parts.keys() - {"whole", "unused"}
        }

    def _parse(self, content: dict[str, Any]) -> None:
        self._rank = get_positive_int(content, "r", 8)
        self._alpha = get_positive_float(content, "lora_alpha", 8)
        self._ranks, self._alphas = (
            {key: get(patterns, key) for key in patterns}
            for patterns, get in (
                (get_object(content, "rank_pattern"), get_positive_int),
                (get_object(content, "alpha_pattern"), get_positive_float),
            )
        )
        self._root = get_bool(content, "use_rslora", False)
        self._dora = get_bool(content, "use_dora", False)

    def _modules(self) -> dict[str, dict[str, str]]:
        """Module of the base model → its parts → the names of their tensors."""
        modules: dict[str, dict[str, str]] = {}
        problems = []
        for name, info in self._file.tensors.items():
            end = next((end for end in _PARTS if name.endswith(end)), None)
            if end is None or not name.startswith(_PREFIX):
                problems.append(f"{name} is no part of a LoRA adapter")
                continue
            if info.dtype not in DTYPES:
                problems.append(f"{name} is stored as {info.dtype}")
            elif not _is_finite(self._file.mapped(name)):
                problems.append(f"{name} contains NaN or infinity")
            parts = modules.setdefault(name[len(_PREFIX) : -len(end)], {})
            parts[_PARTS[end]] = name
        refuse(f"{self._file.path} cannot be merged into a model", problems)
        return modules

    def _low_rank(self, module: str, parts: Mapping[str, str]) -> LowRank:
        arrays = {
            part.removesuffix("_transposed"): array.T if part.endswith("_transposed") else array
            for part, name in parts.items()
            for array in [self._file.mapped(name)]
        }
        up, down, magnitude = (arrays.get(part) for part in ("up", "down", "magnitude"))
        rank = self._matching(self._ranks, module, self._rank)
        alpha = self._matching(self._alphas, module, self._alpha)
        if magnitude is not None and "up_transposed" in parts:
            raise CheckpointError(
                f"{self.path} changes {module} by DoRA, which cannot be merged into an embedding "
                "here: use PEFT's merge_and_unload."
            )
        if (
            up is None
            or down is None
            or (up.ndim, *up.shape[1:]) != (2, rank)
            or (down.ndim, *down.shape[:1]) != (2, rank)
            or (magnitude.shape if magnitude is not None else None)
            != ((len(up),) if self._dora else None)
        ):
            have = {part: list(array.shape) for part, array in arrays.items()}
            raise CheckpointError(
                f"{self.path} is damaged, or was saved before its parts had been gathered: for "
                f"{module}, of rank {rank}, it holds {have}."
            )
        scale = alpha / (math.sqrt(rank) if self._root else rank)
        return LowRank(up, down, scale, magnitude)

    def _matching(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        """The value of the first pattern that matches the end of a module's name, as in PEFT."""
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error:
                raise CheckpointError(
                    f"{self.path / ADAPTER_CONFIG} has a pattern that is no regular expression: "
                    f"{quoted(pattern)}."
                ) from None
        return default


def _read_config(path: Path) -> dict[str, Any]:
    check_directory(path)
    file = path / ADAPTER_CONFIG
    if not file.is_file():
        raise CheckpointError(
            f"{path} holds no {ADAPTER_CONFIG}, so it is no LoRA adapter: give the directory that "
            "PEFT's save_pretrained has written."
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} cannot be read: it must hold a JSON object.")
    if "fine_tune_type" in content:
        raise CheckpointError(
            f"{path} is an adapter of MLX: merge it with `mlx_lm.fuse --model BASE --adapter-path "
            f"{path} --save-path DST`."
        )
    return present(content)


def _check_method(content: Mapping[str, Any]) -> None:
    """Raises ConfigError for methods that change more than low ranks."""
    kind = content.get("peft_type")
    if kind != "LORA":
        what = "is missing" if kind is None else f"is {quoted(kind)}"
        raise ConfigError(f"peft_type {what}, and only LORA can be merged.")
    others = [key for key in _OTHER_METHODS if content.get(key)]
    if others:
        raise ConfigError(f"{', '.join(others)} cannot be merged: use PEFT's merge_and_unload.")
    start = content.get("init_lora_weights", True)
    if start not in _INITIALIZED:
        raise ConfigError(
            f"init_lora_weights is {quoted(start)}, which changes the base model as well: save "
            "the adapter with PEFT's path_initial_model_for_weight_conversion."
        )


def _find_weights(path: Path) -> Path:
    if (path / ADAPTER_WEIGHTS).is_file():
        return path / ADAPTER_WEIGHTS
    if (path / "adapter_model.bin").is_file():
        raise CheckpointError(
            f"{path} holds adapter_model.bin, in PyTorch's format: save it as safetensors, by "
            "loading it with PEFT and calling save_pretrained."
        )
    raise CheckpointError(f"{path} holds no {ADAPTER_WEIGHTS}: copy it there.")


def _is_finite(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    return all(np.isfinite(flat[at : at + _BLOCK]).all() for at in range(0, flat.size, _BLOCK))
