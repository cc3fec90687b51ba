"""Meta's original release as a `Source`."""

import logging
from pathlib import Path

from convert.meta.params import FILE
from convert.meta.reader import MetaReader
from convert.meta.tiktoken_file import TOKENIZER
from convert.meta.tokenizer import write_tokenizer
from convert.source import LICENSE, Source, copy_files, find_files, write_config
from llama_jax.checkpoint.directory import (
    GGUF,
    LAYOUT_NAMES,
    check_directory,
    find_layout,
    meta_file,
    meta_folder,
)
from llama_jax.checkpoint.reader import CheckpointError
from llama_jax.config import LlamaConfig

log = logging.getLogger("convert")


def open_meta(given: Path) -> Source:
    """Opens a Meta release in a directory or in its `original` folder.

    Raises:
      ConfigError, CheckpointError: it is incomplete, damaged, not supported, or something else.
    """
    if not given.is_file():
        check_directory(given)
    path = meta_folder(given)
    if path is None:
        layout = find_layout(given)
        command = GGUF if layout == GGUF else "hf"
        raise CheckpointError(
            f"{given} is in {LAYOUT_NAMES[layout]}, not in Meta's: use `python -m convert "
            f"{command} {given} DST`."
        )
    if path.name == "mp8" and path.with_name("mp16").is_dir():
        log.warning(
            "%s holds the same weights in 8 and in 16 shards: reading those in mp8.", path.parent
        )
    reader = MetaReader(path)
    tokenizer = meta_file(path, TOKENIZER)

    def write_companions(directory: Path, config: LlamaConfig) -> None:
        copy_files(path, directory, LICENSE)
        write_tokenizer(tokenizer.parent, directory, reader.config)
        write_config(directory, config.to_dict())

    companions = (meta_file(path, FILE), tokenizer, *find_files(path, LICENSE))
    return Source(reader, write_companions, companions)
