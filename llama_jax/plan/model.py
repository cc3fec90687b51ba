"""The model to plan for, by its name or its checkpoint. Imports no JAX."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from llama_jax.config import ConfigError, LlamaConfig, Quantization
from llama_jax.quantization import QUANTIZERS
from sharding.errors import UserError, list_text

MODELS: dict[str, Callable[[], LlamaConfig]] = {
    "llama3-8b": LlamaConfig.llama3_8b,
    "llama3-70b": LlamaConfig.llama3_70b,
    "llama3.1-8b": LlamaConfig.llama3_1_8b,
    "llama3.1-70b": LlamaConfig.llama3_1_70b,
    "llama3.1-405b": LlamaConfig.llama3_1_405b,
    "llama3.2-1b": LlamaConfig.llama3_2_1b,
    "llama3.2-3b": LlamaConfig.llama3_2_3b,
    "llama3.3-70b": LlamaConfig.llama3_3_70b,
}
WEIGHTS = ("bf16", *QUANTIZERS)


def find_model(name: str) -> LlamaConfig:
    """The architecture of a model.

    Args:
      name: a key of `MODELS` in any of its usual spellings, such as
        "meta-llama/Llama-3.1-70B-Instruct" or "70b", or a path: a checkpoint directory, its
        config.json, or a GGUF file.

    Raises:
      UserError: there is no such model or path, or the checkpoint is not a Llama.
    """
    path = local_path(name)
    try:
        if name.strip() and path.exists():
            return _read(path)
    except OSError as error:  # its name is too long, or a folder may not be entered
        raise UserError(
            f"{list_text([str(error.filename or path)])} cannot be read: {error.strerror}; give a "
            "path that this user may read, or the name of a model."
        ) from None
    if (found := named_model(name)) is not None:
        return found
    known = _spellings()
    near = get_close_matches(_plain(name), known, n=3, cutoff=0.4)
    names = dict.fromkeys(known[match] for match in near) or MODELS
    raise UserError(
        f"There is no model {name!r}, nor a checkpoint at this path: did you mean "
        f"{', '.join(names)}?"
    )


def local_path(name: str) -> Path:
    """A name as a path. "~user" stays as it is if there is no such user, unlike in `pathlib`."""
    return Path(os.path.expanduser(name))


def checkpoint_path(name: str) -> Path | None:
    """The checkpoint that a name is the path of; None for another name, and a config.json alone."""
    path = local_path(name)
    return path if path.exists() and path.name != "config.json" else None


def named_model(name: str) -> LlamaConfig | None:
    """The architecture of a model by one of its usual names; None if it is another name."""
    model = _spellings().get(_plain(name))
    return None if model is None else MODELS[model]()


def with_weights(config: LlamaConfig, weights: str | None) -> LlamaConfig:
    """The model with its matrices stored in another format.

    Args:
      config: as the checkpoint stores it.
      weights: one of `WEIGHTS`; None to leave it.

    Raises:
      UserError: the checkpoint is quantized in another format already.
    """
    if weights is None:
        return config
    stored = "bf16" if config.quantization is None else config.quantization.format
    if weights == stored:
        return config if config.quantization else replace(config, dtype="bfloat16")
    if config.quantization is not None:
        raise UserError(
            f"The checkpoint stores its matrices in {stored}, not in {weights}: leave --weights "
            "out, or give the checkpoint that it was quantized from."
        )
    return replace(config, dtype="bfloat16", quantization=Quantization(format=weights))


def _plain(name: str) -> str:
    """A name without what its spellings differ in: "Meta-Llama-3.1-8B-Instruct" is "llama318b"."""
    name = name.lower().rpartition("/")[2]
    name = re.sub(r"^meta|instruct|chat|-hf$|[-_. ]", "", name)
    return re.sub(r"^llama(\d)v(\d)", r"llama\1\2", name)


def _spellings() -> dict[str, str]:
    """Plain name → key of `MODELS`; of models of one size, the size alone is the first."""
    names = {_plain(model): model for model in MODELS}
    return names | {_size(model): model for model in reversed(MODELS)}


def _size(model: str) -> str:
    return model.rpartition("-")[2]


def _read(path: Path) -> LlamaConfig:
    if path.name != "config.json":
        return LlamaConfig.from_pretrained(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON that can be read: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object.")
    try:
        return LlamaConfig.from_dict(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
