"""Each Flax module on one device, against its PyTorch counterpart in transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.llama import modeling_llama

from llama_jax.config import LlamaConfig
from llama_jax.model import MLP, Attention, DecoderLayer, Llama, RMSNorm
from llama_jax.model.attention import causal_attention
from llama_jax.model.llama import head_logits, linear, weight_of
from llama_jax.model.rope import inverse_frequencies, rotate
from llama_jax.weights.table import LAYER_PARAMETERS
from llama_jax.weights.unfused import Unfused
from tests.support.reference import (
    ROPE_LLAMA3,
    ROPE_PLAIN,
    make_model,
    reference_logits,
    save_model,
)

GROUPS = {"G=1": 8, "G=4": 2, "G=8": 1}
NUM_TOKENS = 50  # beyond the original context of ROPE_LLAMA3
jitted = jax.jit(Llama.__call__)


@jax.jit
def run(module, x, positions):
    """An attention or a layer with causal attention, as one program."""
    return module(x, positions, causal_attention)


def with_epsilon(theirs):
    """Gives all norms an epsilon so large that it matters."""
    theirs.config.rms_norm_eps = 0.1
    for module in theirs.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            module.variance_epsilon = 0.1
    return theirs


@pytest.fixture(scope="module", params=GROUPS.values(), ids=GROUPS)
def pair(request):
    """A transformers model with scaled rope, and our config of it."""
    theirs = with_epsilon(make_model(num_kv_heads=request.param, rope=ROPE_LLAMA3))
    return theirs, LlamaConfig.from_dict(theirs.config.to_dict())


def close(ours, theirs) -> None:
    """Asserts equality to 1e-5 of the largest value."""
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def activations(*shape) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def positions_of(x: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    return positions, torch.from_numpy(positions.copy())


def layer_of(theirs, config: LlamaConfig) -> DecoderLayer:
    """Our decoder layer with the weights of their first layer."""
    layer = nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(0)))
    state = theirs.state_dict()
    for name, weights in LAYER_PARAMETERS.items():
        rows = np.concatenate([state[weight.hf_name.format(layer=0)] for weight in weights])
        weight_of(layer, name).set_value(jnp.asarray(rows))
    return layer


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["", "where epsilon counts"])
def test_rms_norm(scale):
    x = scale * activations(2, 5, 64)
    theirs = modeling_llama.LlamaRMSNorm(64, eps=1e-5)
    torch.nn.init.normal_(theirs.weight)
    ours = RMSNorm(64, 1e-5)
    ours.scale.set_value(jnp.asarray(theirs.weight.detach().numpy()))
    close(ours(x), theirs(torch.from_numpy(x)))


@pytest.mark.parametrize("rope", [ROPE_PLAIN, ROPE_LLAMA3], ids=["plain", "llama3"])
def test_rope(rope):
    theirs = make_model(rope=rope)
    config = LlamaConfig.from_dict(theirs.config.to_dict())
    q, k = activations(2, NUM_TOKENS, 8, 8), activations(2, NUM_TOKENS, 4, 8)
    positions, their_positions = positions_of(q)
    cos, sin = theirs.model.rotary_emb(torch.from_numpy(q), their_positions)
    expected = modeling_llama.apply_rotary_pos_emb(
        torch.from_numpy(q), torch.from_numpy(k), cos, sin, unsqueeze_dim=2
    )
    for x, turned in zip((q, k), expected, strict=True):
        close(rotate(x, positions, inverse_frequencies(config)), turned)


def test_attention(pair):
    theirs, config = pair
    x = activations(2, NUM_TOKENS, config.embed_dim)
    positions, their_positions = positions_of(x)
    ours = layer_of(theirs, config).attention
    assert isinstance(ours, Attention)
    x32 = torch.from_numpy(x)
    mask = torch.full((NUM_TOKENS, NUM_TOKENS), -torch.inf).triu(1)[None, None]
    rope = theirs.model.rotary_emb(x32, their_positions)
    expected, _ = theirs.model.layers[0].self_attn(x32, rope, attention_mask=mask)
    close(run(ours, x, positions), expected)


def test_mlp(pair):
    theirs, config = pair
    x = activations(2, 5, config.embed_dim)
    ours = layer_of(theirs, config).mlp
    assert isinstance(ours, MLP)
    close(ours(x), theirs.model.layers[0].mlp(torch.from_numpy(x)))


def test_decoder_layer(pair):
    theirs, config = pair
    x = activations(2, NUM_TOKENS, config.embed_dim)
    positions, their_positions = positions_of(x)
    x32 = torch.from_numpy(x)
    mask = torch.full((NUM_TOKENS, NUM_TOKENS), -torch.inf).triu(1)[None, None]
    rope = theirs.model.rotary_emb(x32, their_positions)
    expected = theirs.model.layers[0](x32, attention_mask=mask, position_embeddings=rope)
    close(run(layer_of(theirs, config), x, positions), expected)


def test_a_layer_reduces_the_partial_sums_of_its_ranks():
    """Two layers, each with half of the heads and of the MLP, give partial sums that add up."""
    theirs = make_model(num_kv_heads=2)
    config = LlamaConfig.from_dict(theirs.config.to_dict())
    x = activations(1, 7, config.embed_dim)
    positions, _ = positions_of(x)
    whole = layer_of(theirs, config)
    halves = [layer_of(theirs, config), layer_of(theirs, config)]
    for number, half in enumerate(halves):
        for name, weights in LAYER_PARAMETERS.items():
            ends = np.cumsum([weight.shape(config)[0] for weight in weights])
            parts = np.split(np.asarray(weight_of(whole, name)[...]), ends[:-1])
            split = [a for a, name in enumerate(weights[0].axes) if name != "embed"]
            if split:
                parts = [np.split(part, 2, axis=split[0])[number] for part in parts]
                weight_of(half, name).set_value(jnp.asarray(np.concatenate(parts)))

    @jax.jit
    def both(whole, halves):
        sums = []
        whole(x, positions, causal_attention, lambda partial: sums.append(partial) or partial)
        normed = whole.attention_norm(x)
        middle = whole.mlp_norm(x + sums[0])
        parts = (
            sum(half.attention(normed, positions, causal_attention) for half in halves),
            sum(half.mlp(middle) for half in halves),
        )
        return parts, sums

    for part, expected in zip(*both(whole, halves), strict=True):
        np.testing.assert_allclose(part, expected, atol=1e-5 * np.abs(expected).max())


# The quick set has each number of KV heads, each rope, and tied and untied embeddings.
LLAMAS = [
    pytest.param(
        num_kv_heads,
        bool(tied),
        (ROPE_PLAIN, ROPE_LLAMA3)[scaled],
        marks=[] if i % 2 == tied and (i + scaled) % 2 else [pytest.mark.slow],
        id=f"{group}-{('untied', 'tied')[tied]}-{('plain', 'llama3')[scaled]}",
    )
    for i, (group, num_kv_heads) in enumerate(GROUPS.items())
    for tied in range(2)
    for scaled in range(2)
]


@pytest.mark.parametrize(("num_kv_heads", "tied", "rope"), LLAMAS)
def test_llama(tmp_path, num_kv_heads, tied, rope):
    theirs = make_model(num_kv_heads=num_kv_heads, tied=tied, rope=rope, vocab_size=251)
    with_epsilon(theirs)
    tokens = np.random.default_rng(0).integers(0, 251, (2, NUM_TOKENS))
    ours = jitted(Llama.from_pretrained(save_model(theirs, tmp_path)), tokens)
    assert ours.dtype == jnp.float32
    close(ours, torch.from_numpy(np.stack([reference_logits(theirs, t) for t in tokens.tolist()])))


def test_heads_may_be_wider_than_the_model(tmp_path):
    """H times h need not be D: head_dim is explicit."""
    theirs = make_model(embed_dim=48, num_heads=4, num_kv_heads=2, head_dim=32)
    tokens = np.arange(20)[None]
    ours = Llama.from_pretrained(save_model(theirs, tmp_path))(tokens)  # operation by operation
    close(ours[0], torch.from_numpy(reference_logits(theirs, tokens[0].tolist())))


def test_llama_can_be_jitted(tmp_path):
    theirs = make_model()
    model = Llama.from_pretrained(save_model(theirs, tmp_path))
    tokens = np.arange(12)[None]
    logits = jax.jit(lambda tokens: model(tokens))(tokens)
    close(logits[0], torch.from_numpy(reference_logits(theirs, tokens[0].tolist())))


CONFIG = LlamaConfig(
    vocab_size=32,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    mlp_dim=24,
    rope_theta=10000.0,
    norm_eps=1e-5,
    max_position_embeddings=64,
)


@pytest.mark.parametrize(
    "tokens", [[[0, 32]], [[-1, 3]], [0, 1], [[[0]]], [[0.0]], [["a"]], [[]]], ids=str
)
def test_bad_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match="oken"):
        Llama(CONFIG, rngs=nnx.Rngs(0))(np.array(tokens))


def test_random_weights_follow_the_table():
    config = LlamaConfig(**{**vars(CONFIG), "embed_dim": 256, "mlp_dim": 512})
    model = Llama(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("bfloat16")}
    assert (model.final_norm.scale[...] == 1).all()
    up = np.asarray(model.layers[0].mlp.w_gate_up[...], np.float32)
    assert up.std() == pytest.approx(0.02, rel=0.05)
    assert abs(up.mean()) < 0.001


class TestBfloat16:
    """Weights and activations may be bfloat16; norms, softmax and logits are float32."""

    def test_dtypes(self, tmp_path):
        path = save_model(make_model(), tmp_path)
        model = Llama.from_pretrained(path, dtype="bfloat16")
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.bfloat16.dtype}
        logits = jax.eval_shape(lambda tokens: model(tokens), np.arange(8)[None])
        assert logits.dtype == jnp.float32
        x, positions = jnp.ones((1, 4, 64), jnp.bfloat16), jnp.arange(4)[None]
        out = jax.eval_shape(lambda x: model.layers[0](x, positions, causal_attention), x)
        assert out.dtype == jnp.bfloat16

    def test_the_norm_sums_in_float32(self):
        """A sum of 4096 ones in bfloat16 would stop at 256, because 256 + 1 rounds to 256."""
        x = jnp.ones((1, 4096), jnp.bfloat16)
        normed = RMSNorm(4096, 1e-5, jnp.bfloat16)(x)
        assert normed.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(normed, np.float32), 1)
        # Rounded once, at the end, to 8 bits of mantissa.
        x = jnp.asarray(activations(16, 64), jnp.bfloat16)
        exact = np.asarray(x, np.float64)
        exact /= np.sqrt((exact**2).mean(axis=-1, keepdims=True))
        normed = np.asarray(RMSNorm(64, 0, jnp.bfloat16)(x), np.float64)
        assert (np.abs(normed - exact) <= 2**-8 * 1.001 * np.abs(exact)).all()

    def test_the_softmax_is_computed_in_float32(self):
        """Scores of 300 and 301, which bfloat16 rounds to 300 and 302."""
        q = jnp.full((1, 2, 1, 1), 100, jnp.bfloat16)
        k = jnp.asarray([3.0, 3.015625], jnp.bfloat16).reshape(1, 2, 1, 1)
        v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
        scores = np.float64(100) * np.array([3.0, 3.015625])
        weight = 1 / (1 + np.exp(scores[0] - scores[1]))
        out = causal_attention(q, k, v)
        assert float(out[0, 1, 0, 0]) == pytest.approx(weight, rel=2**-8)
        rounded = scores.astype(jnp.bfloat16).astype(np.float64)
        assert abs(1 / (1 + np.exp(rounded[0] - rounded[1])) - weight) > 2**-6

    def test_logits_are_not_rounded_to_bfloat16(self):
        """Logits of 256 and 257: bfloat16 would make them equal, and the argmax wrong."""
        x = jnp.ones((1, 257), jnp.bfloat16)
        head = jnp.ones((2, 257), jnp.bfloat16).at[0, 0].set(0)
        np.testing.assert_array_equal(head_logits(x, head), [[256, 257]])

    def test_as_close_to_float32_as_transformers_is(self, tmp_path):
        theirs = make_model(rope=ROPE_LLAMA3)
        tokens = np.arange(NUM_TOKENS)[None]
        exact = reference_logits(theirs, tokens[0].tolist())
        model = Llama.from_pretrained(save_model(theirs, tmp_path), dtype="bfloat16")
        ours = jitted(model, tokens)[0]
        rounded = theirs.bfloat16()(torch.from_numpy(tokens)).logits[0].detach().float().numpy()
        error, their_error = (np.abs(x - exact).max() for x in (np.asarray(ours), rounded))
        assert error <= 1.5 * their_error


def test_weights_that_cannot_share_an_array_give_the_same_product():
    x, parts = activations(2, 64), [activations(rows, 64) for rows in (24, 8, 8)]
    unfused = linear(x, Unfused(tuple(map(jnp.asarray, parts))))
    np.testing.assert_allclose(unfused, x @ np.concatenate(parts).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("num_ranks", "heads", "kv_heads"), [(1, 8, 2), (2, 4, 1), (8, 1, 1)])
def test_a_rank_splits_its_share_of_the_heads(num_ranks, heads, kv_heads):
    """Also if there are more ranks than KV heads."""
    config = LlamaConfig.from_dict(make_model(num_heads=8, num_kv_heads=2).config.to_dict())
    attention = nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(0))).attention
    rows = np.arange((heads + 2 * kv_heads) * config.head_dim)
    q, k, v = attention.split(jnp.asarray(rows)[None])
    assert [part.shape[1] for part in (q, k, v)] == [heads, kv_heads, kv_heads]
    assert np.array_equal(np.concatenate([np.ravel(part) for part in (q, k, v)]), rows)
