"""Every rope type against transformers: frequencies, rotation, and the logits of a whole model."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from llama_jax import ShardedLlama
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.model.rope import attention_factor, inverse_frequencies, rotate
from tests.support.reference import make_model, reference_logits, save_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512}
ROPES = {
    "default": {"rope_type": "default"},
    "llama3": LLAMA3,
    "llama3 odd": LLAMA3
    | {"factor": 3.5, "low_freq_factor": 1.5, "high_freq_factor": 9.0}
    | {"original_max_position_embeddings": 100},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear odd": {"rope_type": "linear", "factor": 2.3},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": YARN,
    "yarn unextended": YARN | {"factor": 1.0},
    "yarn without original": {"rope_type": "yarn", "factor": 4.0},
    "yarn betas": YARN | {"beta_fast": 8, "beta_slow": 2.5},
    "yarn unset betas": YARN | {"beta_fast": 0, "beta_slow": None},
    "yarn equal betas": YARN | {"beta_fast": 4, "beta_slow": 4, "truncate": False},
    "yarn not truncated": YARN | {"truncate": False},
    "yarn attention factor": YARN | {"attention_factor": 0.7},
    "yarn mscales": YARN | {"mscale": 0.707, "mscale_all_dim": 1.3},
    "yarn one mscale": YARN | {"mscale": 0.707},
    "yarn no factor": YARN | {"factor": None},
    "yarn short original": YARN | {"original_max_position_embeddings": 4},
}


def both(head_dim: int, theta: float, rope: dict) -> tuple[LlamaConfig, transformers.LlamaConfig]:
    theirs = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=8192,
        rope_parameters={"rope_theta": theta, **copy.deepcopy(rope)},
    )
    return LlamaConfig.from_dict(theirs.to_dict()), theirs


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 500000.0), (16, 10000.0), (64, 12345.0)])
def test_frequencies_are_those_of_transformers(head_dim, theta, rope):
    config, theirs = both(head_dim, theta, rope)
    module = modeling_llama.LlamaRotaryEmbedding(theirs)
    frequencies = inverse_frequencies(config)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, module.inv_freq.numpy(), rtol=1e-6)
    assert attention_factor(config) == pytest.approx(module.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("rope", [YARN, LLAMA3], ids=["yarn", "llama3"])
def test_an_original_length_beside_the_rotary_parameters_counts(rope):
    _, theirs = both(64, 10000.0, rope)
    content = theirs.to_dict() | {"original_max_position_embeddings": 1024}
    module = modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**copy.deepcopy(content)))
    config = LlamaConfig.from_dict(content)
    assert config.rope_scaling.original_max_position_embeddings == 1024
    np.testing.assert_allclose(inverse_frequencies(config), module.inv_freq.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", ["default", "linear", "dynamic", "yarn", "yarn attention factor"])
def test_rotation_is_that_of_transformers(name):
    config, theirs = both(64, 10000.0, ROPES[name])
    x = np.random.default_rng(0).normal(size=(1, 5, 4, 64)).astype(np.float32)
    positions = np.array([[0, 1, 100, 2000, 8191]])
    cos, sin = modeling_llama.LlamaRotaryEmbedding(theirs)(
        torch.from_numpy(x), torch.from_numpy(positions)
    )
    expected, _ = modeling_llama.apply_rotary_pos_emb(
        torch.from_numpy(x), torch.from_numpy(x), cos, sin, unsqueeze_dim=2
    )
    frequencies, factor = inverse_frequencies(config), attention_factor(config)
    ours = rotate(jnp.asarray(x), jnp.asarray(positions), frequencies, factor)
    # Angles of thousands of radians differ in their last bits.
    np.testing.assert_allclose(ours, expected.numpy(), atol=2e-3)
    np.testing.assert_allclose(ours[:, :3], expected[:, :3].numpy(), atol=2e-5)


SMALL = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 4,
    },
}
LENGTH = 60


def model_with(name: str) -> transformers.LlamaForCausalLM:
    return make_model(
        num_layers=2, rope=dict(SMALL[name]), vocab_size=67, max_position_embeddings=LENGTH
    )


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_those_of_transformers(tmp_path, name):
    theirs = model_with(name)
    tokens = np.random.default_rng(0).integers(0, 67, LENGTH)
    model = Llama.from_pretrained(save_model(theirs, tmp_path))
    ours = jax.jit(Llama.__call__)(model, tokens[None])[0]
    expected = reference_logits(theirs, tokens.tolist())
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())


def test_dynamic_scaling_ends_where_frequencies_depend_on_the_length(tmp_path):
    """The logits of transformers change there even for the first token's neighbors."""
    theirs = model_with("dynamic")
    tokens = np.arange(LENGTH + 5) % 67
    short = reference_logits(theirs, tokens[:LENGTH].tolist())
    long = reference_logits(theirs, tokens.tolist())[:LENGTH]
    assert np.abs(short - long).max() > 1e-2
    model = Llama.from_pretrained(save_model(theirs, tmp_path))
    with pytest.raises(ValueError, match=str(LENGTH)):
        model(tokens[None])
    with pytest.raises(ValueError, match=str(LENGTH)):
        ShardedLlama.from_pretrained(tmp_path)(tokens[None])


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 8192),
        ({"rope_type": "linear", "factor": 4.0}, 32768),
        ({"rope_type": "dynamic", "factor": 4.0}, 8192),
        (LLAMA3, 8192),
        (YARN | {"factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0}, 32768),
        ({"rope_type": "linear", "factor": 1e9}, 2**31 - 1),
        (YARN | {"factor": 1e9}, 2**31 - 1),
    ],
)
def test_the_longest_context(rope, longest):
    assert both(64, 10000.0, rope)[0].max_context == longest
