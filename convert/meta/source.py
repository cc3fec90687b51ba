"""Meta's original release as a `Source`."""

from pathlib import Path

from convert.meta.params import FILE
from convert.meta.reader import MetaReader
from convert.meta.tokenizer import write_tokenizer
from convert.source import LICENSE, Source, copy_files, write_config
from llama_jax.config import LlamaConfig

FOLDER = "original"  # in repositories on the Hub, beside the Hugging Face layout


def is_meta(path: Path) -> bool:
    """Returns whether a directory holds Meta's layout only."""
    here = (path / FILE).is_file() or (path / FOLDER / FILE).is_file()
    return here and not (path / "config.json").is_file()


def open_meta(path: Path) -> Source:
    """Opens a Meta release in `path` or in its `original` folder.

    Raises:
      ConfigError, CheckpointError: it is incomplete, damaged or not supported.
    """
    if not (path / FILE).is_file() and (path / FOLDER / FILE).is_file():
        path = path / FOLDER
    reader = MetaReader(path)

    def write_companions(directory: Path, config: LlamaConfig) -> None:
        copy_files(path, directory, LICENSE)
        write_tokenizer(path, directory, reader.config)
        write_config(directory, config.to_dict())

    return Source(reader, write_companions)
