"""Finds the GGUF files that a path stands for."""

import re
from pathlib import Path

from llama_jax.gguf.errors import GgufError

MAGIC = b"GGUF"
_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SHOWN = 4  # file names per message


def find_gguf(path: Path) -> tuple[Path, ...]:
    """Returns the GGUF files of a checkpoint, in order; `()` if it is in another layout.

    Args:
      path: a GGUF file, one part of a model that `llama-gguf-split` has split, or a directory that
        holds one such model and no weights in another layout.

    Raises:
      GgufError: the directory holds several models, or parts of the model are missing.
    """
    if path.is_file():
        return _parts(path) if path.suffix == ".gguf" or _has_magic(path) else ()
    if not path.is_dir() or any(path.glob("*.safetensors")) or (path / "weights").is_dir():
        return ()
    models = {_parts(file) for file in path.glob("*.gguf")}
    if len(models) > 1:
        names = sorted(parts[0].name for parts in models)
        shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
        raise GgufError(
            f"{path} holds {len(names)} models in GGUF ({shown}): give the path of one file."
        )
    return models.pop() if models else ()


def _has_magic(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _parts(file: Path) -> tuple[Path, ...]:
    match = _SPLIT.fullmatch(file.name)
    if match is None:
        return (file,)
    stem, count = match["stem"], int(match["count"])
    parts = [file.with_name(f"{stem}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise GgufError(
            f"{len(missing)} of the {count} parts of {file} are missing, the first being "
            f"{missing[0]}: copy all parts to {file.parent}."
        )
    return tuple(parts)
