"""A small random checkpoint with a tokenizer, as a server reads it."""

from pathlib import Path

from llama_jax.text.tokenizer import Tokenizer
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer


def write_served_checkpoint(path: Path, **config: object) -> Path:
    """Writes weights and tokenizer to a new folder; `config` as for `write_checkpoint`."""
    make_tokenizer(path)
    tokenizer = Tokenizer(path)
    [eos] = tokenizer.encode("<|eot_id|>", add_bos=False)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos}
    write_checkpoint(path, **{"vocab_size": tokenizer.vocab_size, **ids, **config})
    return path
