"""One small model for the tests of patches and readings; loaded and compiled once."""

import numpy as np
import pytest

from llama_jax import Llama, ShardedLlama
from tests.support.reference import ROPE_LLAMA3, make_model, save_model

VOCAB_SIZE = 131


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """[2, 21] token ids."""
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 21))


@pytest.fixture(scope="session")
def theirs():
    """The model in transformers: two layers, eight query heads, two KV heads."""
    return make_model(
        num_layers=2, num_heads=8, num_kv_heads=2, vocab_size=VOCAB_SIZE, rope=ROPE_LLAMA3
    )


@pytest.fixture(scope="session")
def path(theirs, tmp_path_factory):
    return save_model(theirs, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(path) -> Llama:
    return Llama.from_pretrained(path)


@pytest.fixture(scope="session")
def sharded(path) -> ShardedLlama:
    return ShardedLlama.from_pretrained(path, "2x2")
