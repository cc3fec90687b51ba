"""A source with a LoRA adapter merged into it."""

from pathlib import Path

from convert.source import TOKENIZER, Source, copy_files, find_files
from llama_jax.checkpoint.lora import Adapter
from llama_jax.checkpoint.merged import MergedReader
from llama_jax.config import LlamaConfig


def with_adapter(source: Source, path: Path, strict_config: bool = False) -> Source:
    """Returns the source with an adapter merged into its weights.

    If the adapter comes with a tokenizer, as trainers save one that has new tokens or another chat
    template, it takes the place of the source's.

    Args:
      source: the model that the adapter was trained on.
      path: the adapter's directory.
      strict_config: whether unknown keys of its configuration are an error instead of a warning.

    Raises:
      ConfigError, CheckpointError: it cannot be merged, or does not fit the model.
    """
    adapter = Adapter(path, strict_config)
    tokenizer = find_files(path, TOKENIZER) if (path / "tokenizer.json").is_file() else ()

    def write_companions(directory: Path, config: LlamaConfig) -> None:
        source.write_companions(directory, config)
        if tokenizer:
            for file in find_files(directory, TOKENIZER):
                file.unlink()
            copy_files(path, directory, TOKENIZER)

    companions = (*source.companions, adapter.config_file, *tokenizer)
    return Source(MergedReader(source.reader, adapter), write_companions, companions)
