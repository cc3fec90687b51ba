"""Constructors and samplers of a `Llama` subclass that a mesh would silently not use."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax import Llama, ShardedLlama
from llama_jax.model import DecoderLayer, RMSNorm, Sampler
from llama_jax.model.sampling import chosen_by
from llama_jax.ring.steps import LOGITS_SPEC
from sharding.errors import UserError
from sharding.mesh import make_mesh
from sharding.program import MeshProgram
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


def test_a_constructor_that_leaves_the_layers_alone_is_accepted(path):
    ShardedLlama.from_pretrained(path, model_class=Noted)


def test_a_sampler_must_be_an_instance(path):
    class SamplerClass(Llama):
        sampler = Sampler  # without parentheses

    with pytest.raises(UserError, match=r"SamplerClass\.sampler"):
        ShardedLlama.from_pretrained(path, model_class=SamplerClass)


class Returns(Sampler):
    """Chooses whatever it is given, in place of the most likely tokens."""

    def __init__(self, change):
        self.change = change

    def greedy(self, logits):
        return self.change(super().greedy(logits))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda tokens: tokens.astype(jnp.float32), r"float32 of shape \[3\]"),
        (lambda tokens: tokens[:, None], r"int32 of shape \[3, 1\]"),
        (lambda tokens: None, "NoneType"),
    ],
    ids=["floats", "columns", "nothing"],
)
def test_a_sampler_must_return_a_token_for_each_row(change, got):
    with pytest.raises(UserError, match=rf"^Returns\.greedy must return .*got {got}\."):
        make_program(Returns(change))


def test_a_sampler_may_return_other_integers():
    make_program(Returns(lambda tokens: tokens.astype(jnp.int8)))


def make_program(sampler):
    """Traces the choice of three tokens."""

    def choose(logits):
        return chosen_by(sampler, "greedy", logits)

    mesh = make_mesh("1x1")
    program = MeshProgram(choose, mesh, (LOGITS_SPEC,), P(), name="choose")
    chosen = program.compile(jax.ShapeDtypeStruct((3, 8), jnp.float32))
    assert chosen.shape == (3,) and chosen.dtype == jnp.int32
