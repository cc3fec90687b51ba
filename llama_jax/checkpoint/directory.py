"""Recognizes the layout of a checkpoint, and says what a directory is if it is not a checkpoint.

Every path that a user gives is checked here before anything is opened. Only the names of files
count, and the first bytes of some, so this takes no time.
"""

import json
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.manifest import (
    JOURNAL,
    MANIFEST,
    is_being_written,
    read_manifest,
    running,
)
from llama_jax.checkpoint.orbax import STATE, WEIGHTS
from llama_jax.checkpoint.reader import CheckpointError
from llama_jax.config.huggingface import ADAPTER_CONFIG
from llama_jax.gguf import find_gguf
from sharding.errors import list_text

HUGGINGFACE, ORBAX, META, GGUF = "huggingface", "orbax", "meta", "gguf"
LAYOUT_NAMES = {
    HUGGINGFACE: "Hugging Face layout",
    ORBAX: "this project's Orbax layout",
    META: "Meta's original layout",
    GGUF: "GGUF",
}
INDEX = "model.safetensors.index.json"
_PARAMS = "params.json"
# Where the shards of Meta's release may be. The 405B model comes in 8 and in 16 shards, with the
# same weights; of the two, the first one here is read.
_META_FOLDERS = ("", "original", "mp8", "original/mp8", "mp16", "original/mp16")
_READ_FIRST = ("config.json", INDEX, "tokenizer.json", "tokenizer_config.json")
_LFS_POINTER = b"version https://git-lfs"
_OTHER_FORMATS = {
    "*.bin": "PyTorch's format",
    "*.pt": "PyTorch's format",
    "*.pth": "PyTorch's format",
    "*.ckpt": "PyTorch's format",
    "*.distcp": "PyTorch's distributed format",
    "*.msgpack": "Flax's format",
    "*.h5": "TensorFlow's format",
    "*.npz": "an old format of MLX",
    "*.onnx": "ONNX",
    "*.nemo": "NeMo's format",
    "*.engine": "TensorRT's format",
}
# Files in these formats that trainers write beside the weights.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)\b.*")


def find_layout(path: Path) -> str:
    """Returns the layout of a checkpoint, a directory or a GGUF file: a key of `LAYOUT_NAMES`.

    Raises:
      CheckpointError, GgufError: there is no such directory, it may not be read, or it holds
        something else, which the message names together with the command to use.
    """
    try:
        return _find_layout(path)
    except PermissionError as error:
        raise _forbidden(error, path) from None
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path} cannot be read: {error.strerror}."
        ) from None


def servable_layout(path: Path) -> str:
    """Returns the layout of a checkpoint that can be opened without a conversion.

    Raises:
      CheckpointError, GgufError: `find_layout` refuses it, or it is in Meta's layout.
    """
    layout = find_layout(path)
    if layout == META:
        raise CheckpointError(
            f"{path} is in {LAYOUT_NAMES[META]}: convert it first with `python -m convert meta "
            f"{path} DST`, and give DST."
        )
    return layout


def check_directory(path: Path) -> None:
    """Raises CheckpointError if there is no such directory, or if it may not be entered."""
    try:
        entered = os.stat(f"{path}/.") is not None and os.listdir(path) is not None
    except PermissionError as error:
        raise _forbidden(error, path) from None
    except (OSError, ValueError):
        entered = False
    if entered:
        return
    if os.path.exists(path):
        raise CheckpointError(
            f"{path} is a file, but not in GGUF: give the directory that holds the checkpoint."
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise CheckpointError(
            f"There is no directory {path}: if this is a model on the Hugging Face Hub, download "
            f"it first with `hf download {path} --local-dir DIR`, and give DIR instead."
        )
    raise CheckpointError(f"There is no directory {path}.")


def refuse_lfs_pointer(file: Path) -> None:
    """Raises CheckpointError if a file is the pointer that git checks out without git-lfs."""
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{file} is a Git LFS pointer, not the file itself: run `git lfs pull` in its "
                "directory."
            )


def meta_folder(path: Path) -> Path | None:
    """Returns the folder of `path` that holds Meta's release, which may be `path`; None if none."""
    folders = [path / folder for folder in _META_FOLDERS]
    with_shards = (folder for folder in folders if any(folder.glob("consolidated.*.pth")))
    described = (folder for folder in folders if (folder / _PARAMS).is_file())
    return next(with_shards, None) or next(described, None)


def meta_file(folder: Path, name: str) -> Path:
    """Returns a small file of Meta's release, which may be next to the folders mp8 and mp16."""
    file = folder / name
    if folder.name in ("mp8", "mp16") and not file.is_file():
        return folder.parent / name
    return file


def weight_files(path: Path) -> list[Path]:
    """Returns the safetensors files of a directory, except those of LoRA adapters."""
    return sorted(file for file in path.glob("*.safetensors") if "adapter" not in file.name)


def _find_layout(path: Path) -> str:
    if path.is_file() and _find_gguf(path):
        return GGUF
    check_directory(path)
    for name in _READ_FIRST:
        if (path / name).is_file():
            refuse_lfs_pointer(path / name)
    # A conversion writes the manifest before it deletes the journal, so in this order its end is
    # not mistaken for a directory that has neither.
    begun = (path / JOURNAL).is_file()
    if (path / MANIFEST).is_file():
        return read_manifest(path).layout
    if begun and is_being_written(path):
        raise running(path)
    if begun:
        raise CheckpointError(
            f"{path} holds an unfinished conversion: run the same command again with --resume, or "
            "delete the directory."
        )
    if (path / INDEX).is_file() or weight_files(path):
        for file in sorted(path.glob("model*.safetensors"))[:1]:
            refuse_lfs_pointer(file)
        return HUGGINGFACE
    if (path / WEIGHTS / STATE).is_dir():
        raise CheckpointError(
            f"{path} is an incomplete copy of a converted checkpoint, since {MANIFEST} is missing: "
            "copy it again, or convert again to a new directory."
        )
    if (path / ADAPTER_CONFIG).is_file():
        raise _adapter(path)
    if _find_gguf(path):
        return GGUF
    if meta_folder(path):
        return META
    raise _unusable(path, sorted(os.listdir(path)))


def _find_gguf(path: Path) -> bool:
    files = find_gguf(path)
    for file in files:
        refuse_lfs_pointer(file)
    return bool(files)


def _adapter(path: Path) -> CheckpointError:
    base = _json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    of = f" for {list_text([base])}" if isinstance(base, str) and base else ""
    if any(path.glob("*adapters.safetensors")):
        remedy = (
            f"merge the two with `mlx_lm.fuse --model BASE --adapter-path {path} --save-path DST`, "
            "copy the tokenizer files of the base model to DST, and give DST"
        )
    else:
        remedy = (
            f"merge the two with `python -m convert hf BASE DST --adapter {path}`, and give DST"
        )
    return CheckpointError(f"{path} is a LoRA adapter{of}, not a whole model: {remedy}.")


def _unusable(path: Path, names: Sequence[str]) -> CheckpointError:
    """Returns the error for a directory without weights in any layout that can be opened."""
    for name in names:
        kinds = [kind for pattern, kind in _OTHER_FORMATS.items() if fnmatch(name, pattern)]
        if not kinds or _NO_WEIGHTS.fullmatch(name):
            continue
        if fnmatch(name, "pytorch_model*.bin"):
            remedy = (
                'save it as safetensors with `python -c "from transformers import '
                f"AutoModelForCausalLM as M; M.from_pretrained('{path}', dtype='auto')"
                ".save_pretrained('DST')\"`, copy the tokenizer files to DST, and give DST"
            )
        else:
            remedy = (
                "save the model as safetensors, for example with transformers' save_pretrained, "
                "and give that directory"
            )
        return CheckpointError(f"{path} holds {list_text([name])}, in {kinds[0]}: {remedy}.")
    inside = [
        str(file.parent)
        for pattern in ("*/config.json", "snapshots/*/config.json", "*/" + _PARAMS)
        for file in sorted(path.glob(pattern))
    ]
    if inside:
        return CheckpointError(
            f"{path} is not a checkpoint itself, but has folders that may be: give "
            f"{list_text(inside, ' or ')}."
        )
    if "config.json" in names:
        return CheckpointError(
            f"{path} holds a config.json but no weights, neither model.safetensors nor {INDEX}: "
            "copy the weights there."
        )
    return CheckpointError(
        f"{path} holds no checkpoint, neither a config.json with safetensors files nor Meta's "
        f"{_PARAMS}: give the directory of a checkpoint."
    )


def _json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; `{}` if it has none, which its reader will report."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _forbidden(error: PermissionError, path: Path) -> CheckpointError:
    place = str(error.filename or path).removesuffix("/.")
    return CheckpointError(
        f"This user may not read {place}: run as its owner, or let everyone read it with `chmod -R "
        f"a+rX {place}`."
    )
