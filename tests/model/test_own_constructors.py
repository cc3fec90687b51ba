"""Constructors of a `Llama` subclass that a mesh would silently not use."""

import jax.numpy as jnp
import pytest
from flax import nnx

from llama_jax import Llama, ShardedLlama
from llama_jax.model import DecoderLayer, RMSNorm
from sharding.errors import UserError
from tests.support.reference import make_model, save_model


class OwnLayer(DecoderLayer):
    pass


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(make_model(num_layers=3), tmp_path_factory.mktemp("model"))


class Own(Llama):
    def __init__(self, config, *, rngs, dtype=jnp.float32):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.change(config, rngs, dtype)


class Mixed(Own):
    def change(self, config, rngs, dtype):
        self.layers[1] = OwnLayer(config, rngs=rngs, dtype=dtype)


class Numbered(Own):
    def change(self, config, rngs, dtype):
        for number, layer in enumerate(self.layers):
            layer.attention.number = number


class Center(RMSNorm):
    def __call__(self, x):
        return super().__call__(x - x.mean(axis=-1, keepdims=True))


class Centered(Own):
    def change(self, config, rngs, dtype):
        self.final_norm = Center(config.embed_dim, config.norm_eps, dtype)


@pytest.mark.parametrize(
    ("model_class", "name"),
    [(Mixed, r"layers\.1"), (Numbered, r"layers\.0"), (Centered, "final_norm")],
)
def test_constructors_that_a_mesh_would_skip_are_refused(path, model_class, name):
    with pytest.raises(UserError, match=name):
        ShardedLlama.from_pretrained(path, model_class=model_class)


class Noted(Own):
    layer_class = OwnLayer

    def change(self, config, rngs, dtype):
        self.note = "harmless"


class Dropping(DecoderLayer):
    """Has a source of random numbers, which is no parameter."""

    def __init__(self, config, *, rngs, dtype=jnp.float32):
        super().__init__(config, rngs=rngs, dtype=dtype)
        self.dropout = nnx.Dropout(0.1, deterministic=True, rngs=rngs)


class DroppingLlama(Llama):
    layer_class = Dropping


@pytest.mark.parametrize("model_class", [Noted, DroppingLlama])
def test_a_constructor_that_leaves_the_layers_alone_is_accepted(path, model_class):
    ShardedLlama.from_pretrained(path, model_class=model_class)
