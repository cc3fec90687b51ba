"""A model in GGUF as a `Source`."""

import json
from pathlib import Path

from convert.source import Source, write_config
from llama_jax.checkpoint.directory import GGUF, LAYOUT_NAMES, META, find_layout
from llama_jax.checkpoint.gguf import GgufReader
from llama_jax.checkpoint.reader import CheckpointError
from llama_jax.config import LlamaConfig
from llama_jax.gguf import find_gguf
from llama_jax.gguf.config import generation_config_json
from llama_jax.gguf.header import read_header
from llama_jax.gguf.tokenizer import write_tokenizer


def open_gguf(path: Path, strict_config: bool = False) -> Source:
    """Opens a GGUF file, or a directory that holds one model in GGUF.

    Args:
      path: the file or directory.
      strict_config: whether unknown keys of its header are an error instead of a warning.

    Raises:
      GgufError, ConfigError, CheckpointError: it is incomplete, damaged or not supported.
    """
    layout = find_layout(path)
    if layout != GGUF:
        command = "meta" if layout == META else "hf"
        raise CheckpointError(
            f"{path} is in {LAYOUT_NAMES[layout]}, not in GGUF: use `python -m convert {command} "
            f"{path} DST`."
        )
    parts = find_gguf(path)
    reader = GgufReader(path, parts)
    reader.declared.report_unknown(strict_config)

    def write_companions(directory: Path, config: LlamaConfig) -> None:
        header = read_header(parts)
        write_config(directory, config.to_dict())
        text = json.dumps(generation_config_json(header), indent=2) + "\n"
        (directory / "generation_config.json").write_text(text, encoding="utf-8")
        write_tokenizer(header, directory)

    return Source(reader, write_companions)
