"""A small tokenizer in Llama 3's format, for tests that need no model."""

import functools
import json
import tempfile
from pathlib import Path

from demo.tokenizer import save_tokenizer, train_tokenizer
from llama_jax.text.tokenizer import Tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog, and a stage hands its packet to the next one.",
    "system user assistant: hello, hello world! Grüße, naïve café. 0 1 2 3 4 5 6 7 8 9",
]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def make_tokenizer(folder: Path, chat_template: bool = True) -> Path:
    """Writes a tokenizer with 300 tokens and the special tokens to `folder`.

    A server also reads config.json; if the folder has none, it gets one of a model without weights.
    """
    save_tokenizer(train_tokenizer(TEXT * 3, vocabulary=300), folder, max_length=512)
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(CONFIG))
    if not chat_template:
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        del settings["chat_template"]
        file.write_text(json.dumps(settings))
    return folder


@functools.cache
def tiny_tokenizer(chat_template: bool = True) -> Tokenizer:
    """The same tokenizer, loaded once for all tests."""
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer(make_tokenizer(Path(folder), chat_template))
