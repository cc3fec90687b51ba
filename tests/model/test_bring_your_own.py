"""The user's own classes: the same model on one device, on a mesh and in the engine."""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch

from llama_jax import LLM, Llama, SamplingParams, ShardedLlama
from llama_jax.engine.errors import EngineStartError, RequestError
from llama_jax.interpret import capture
from llama_jax.model import MLP, Attention, DecoderLayer
from llama_jax.model.attention import (
    MASKED,
    causal_attention,
    no_score_mod,
    paged_attention,
    paged_weights,
)
from llama_jax.model.llama import linear
from sharding.errors import UserError
from tests.model.test_attention import LENGTHS, Pool
from tests.support.hooked import assert_close, hooked
from tests.support.programs import compile_few
from tests.support.reference import make_model, save_model
from tests.support.tiny_tokenizer import make_tokenizer

VOCAB = 320
WINDOW, SINKS = 12, 2
TOKENS = np.random.default_rng(0).integers(3, VOCAB, (2, 70))
SMALL = {"max_num_seqs": 2, "max_chunk": 64, "kv_cache_memory": 1 << 22}


def window(scores, head, query_position, key_position):
    """The last WINDOW keys, and the first SINKS."""
    near = query_position - key_position < WINDOW
    return jnp.where(near | (key_position < SINKS), scores, MASKED)


def alibi(scores, head, query_position, key_position):
    """A slope per head (https://arxiv.org/abs/2108.12409)."""
    return scores - 2.0 ** -(head + 1.0) * (query_position - key_position)


MODS = {"window": window, "alibi": alibi}


class Windowed(Attention):
    def score_mod(self, scores, head, query_position, key_position):
        return window(scores, head, query_position, key_position)


class Sloped(Attention):
    def score_mod(self, scores, head, query_position, key_position):
        return alibi(scores, head, query_position, key_position)


class WindowedLayer(DecoderLayer):
    attention_class = Windowed


class SlopedLayer(DecoderLayer):
    attention_class = Sloped


class ReLU(MLP):
    def __call__(self, x):
        gate, up = jnp.split(linear(x, self.w_gate_up.get_value()), 2, axis=-1)
        return linear(self.tap("neurons", jax.nn.relu(gate) * up), self.w_down.get_value())


class ReLULayer(DecoderLayer):
    mlp_class = ReLU


class PostNormLayer(DecoderLayer):
    """Not the identity where all of its weights are zero, as in a padding layer."""

    def __call__(self, x, positions, attend, reduce=lambda partial: partial):
        x = self.attention_norm(x + reduce(self.attention(x, positions, attend)))
        x = self.mlp_norm(x + reduce(self.mlp(x)))
        return self.tap("residual", x)


class WindowedLlama(Llama):
    layer_class = WindowedLayer


class SlopedLlama(Llama):
    layer_class = SlopedLayer


class ReLULlama(Llama):
    layer_class = ReLULayer


class PostNormLlama(Llama):
    layer_class = PostNormLayer


@pytest.fixture(scope="module")
def theirs():
    return make_model(num_layers=3, num_heads=8, num_kv_heads=2, vocab_size=VOCAB)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    compile_few(monkeypatch)


@pytest.fixture(scope="module")
def path(theirs, tmp_path_factory):
    return make_tokenizer(save_model(theirs, tmp_path_factory.mktemp("model")))


# --- score_mod, by brute force ------------------------------------------------------------------


def weights_of(q, k, positions, length, mod, first_head=0):
    """q [T, H, h], k [S, K, h] -> weights [T, H, S], one query at a time, in float64."""
    group = q.shape[1] // k.shape[1]
    found = np.zeros((*q.shape[:2], len(k)))
    for t, head in np.ndindex(*q.shape[:2]):
        seen = [s for s in range(length) if s <= positions[t]]
        if mod == "window":
            seen = [s for s in seen if s < SINKS or positions[t] - s < WINDOW]
        if not seen:
            continue
        scores = k[seen, head // group].astype(np.float64) @ q[t, head] / np.sqrt(q.shape[2])
        if mod == "alibi":
            scores -= 2.0 ** -(first_head + head + 1) * (positions[t] - np.array(seen))
        scores = np.exp(scores - scores.max())
        found[t, head, seen] = scores / scores.sum()
    return found


def attended(weights, v):
    """weights [T, H, S], v [S, K, h] -> [T, H, h]."""
    return np.einsum("ths,shd->thd", weights, np.repeat(v, weights.shape[1] // v.shape[1], 1))


HEADS = [(4, 4), (8, 2), (8, 1)]


@pytest.mark.parametrize(
    ("mod", "num_heads", "num_kv_heads", "num_tokens"),
    [
        pytest.param(mod, *heads, length, marks=[] if i == j and length > 1 else [pytest.mark.slow])
        for i, mod in enumerate(("none", *MODS))
        for j, heads in enumerate(HEADS)
        for length in (1, 40)
    ],
)
def test_causal_attention(mod, num_heads, num_kv_heads, num_tokens):
    rng = np.random.default_rng(0)
    q = 3 * rng.normal(size=(2, num_tokens, num_heads, 16)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, num_tokens, num_kv_heads, 16)).astype(np.float32)

    @jax.jit
    def run(q, k, v):
        tapped = {}

        def tap(name, value):
            tapped[name] = value
            return value

        score_mod = MODS.get(mod, no_score_mod)
        return causal_attention(q, k, v, score_mod=score_mod, tap=tap), tapped

    out, tapped = run(q, k, v)
    for row in range(2):
        weights = weights_of(q[row], k[row], np.arange(num_tokens), num_tokens, mod)
        np.testing.assert_allclose(out[row], attended(weights, v[row]), atol=2e-5)
        seen = tapped["weights"][row].swapaxes(0, 1)
        np.testing.assert_allclose(seen, weights, atol=2e-6)


# The quick set has each function with decode and with chunk queries, and each page size.
QUICK_PAGED = [
    ("none", 4, 5),
    ("window", 48, 5),
    ("window", 4, 1),
    ("alibi", 48, 1),
    ("alibi", 4, 5),
]


@pytest.mark.parametrize(
    ("mod", "page_size", "num_queries", "first_head"),
    [
        pytest.param(
            mod,
            page_size,
            num_queries,
            6 if num_queries > 1 else 0,
            marks=[] if (mod, page_size, num_queries) in QUICK_PAGED else [pytest.mark.slow],
        )
        for mod in ("none", *MODS)
        for page_size in (4, 48)
        for num_queries in (1, 5)
    ],
)
def test_paged_attention_and_its_weights(mod, page_size, num_queries, first_head):
    """With garbage in the pages; `first_head` 6 stands for the second of two ranks."""
    pool, rng = Pool(LENGTHS, page_size), np.random.default_rng(1)
    q = rng.normal(size=(len(LENGTHS), num_queries, 6, 8)).astype(np.float32)
    starts = np.maximum(np.array(LENGTHS) - num_queries, 0)
    positions = (starts[:, None] + np.arange(num_queries)).astype(np.int32)
    rest = (pool.tables, positions, np.array(LENGTHS, np.int32))
    score_mod = MODS.get(mod, no_score_mod)

    @jax.jit
    def run(q, *pages):
        return tuple(
            function(q, *pages[:count], *rest, score_mod, first_head)
            for function, count in ((paged_attention, 2), (paged_weights, 1))
        )

    out, shown = map(np.asarray, run(q, *pool.pages))
    for row, length in enumerate(LENGTHS):
        k, v = pool.keys[row]
        expected = weights_of(q[row], k, positions[row], length, mod, first_head)
        np.testing.assert_allclose(out[row], attended(expected, v), atol=2e-5)
        np.testing.assert_allclose(shown[row, :, :, :length], expected, atol=2e-5)
        assert not shown[row, :, :, length:].any()


# --- the whole model ----------------------------------------------------------------------------


def test_classes_on_one_device(path, theirs):
    """The changed attention equals brute force, the changed MLP transformers."""
    for cls, mod in ((WindowedLlama, "window"), (SlopedLlama, "alibi")):
        found = capture(cls.from_pretrained(path), TOKENS, "layers.1.attention.*")[1]
        q, k, v, out = (
            np.asarray(found[f"layers.1.attention.{name}"][1])
            for name in ("query", "key", "value", "heads")
        )
        weights = weights_of(q, k, np.arange(70), 70, mod)
        np.testing.assert_allclose(out, attended(weights, v), atol=1e-4)
    expected = hooked(with_relu(theirs), TOKENS)
    for name, value in capture(ReLULlama.from_pretrained(path), TOKENS, "*")[1].items():
        assert_close(value, expected[name])


def with_relu(theirs):
    """A copy of the model with ReLU in its MLPs."""
    copied = copy.deepcopy(theirs)
    for layer in copied.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    return copied


@pytest.mark.parametrize(
    ("model_class", "mesh"),
    [
        (SlopedLlama, "2x2"),
        (PostNormLlama, "2x1"),  # a stage has a padding layer
        pytest.param(ReLULlama, "2x2", marks=pytest.mark.slow),
        pytest.param(WindowedLlama, "1x1", marks=pytest.mark.slow),
        pytest.param(WindowedLlama, "2x2", marks=pytest.mark.slow),
    ],
)
def test_classes_on_a_mesh(path, model_class, mesh):
    plain = model_class.from_pretrained(path)
    sharded = ShardedLlama.from_pretrained(path, mesh, model_class=model_class)
    names = ("layers.2.attention.weights", "layers.*.mlp.neurons", "layers.*.residual")
    logits, found = capture(plain, TOKENS, *names)
    on_mesh, found_there = capture(sharded, TOKENS, *names)
    assert_close(on_mesh, logits)
    for name, value in found.items():
        assert_close(found_there[name], value)
    usual = capture(Llama.from_pretrained(path), TOKENS)[0]
    assert np.abs(logits - usual).max() > 1e-2 * np.abs(usual).max()  # the class has an effect


@pytest.mark.parametrize(
    ("model_class", "mesh"),
    [
        pytest.param(ReLULlama, "1x2", marks=pytest.mark.slow),
        (WindowedLlama, "2x2"),
        pytest.param(SlopedLlama, "2x2", marks=pytest.mark.slow),
        pytest.param(WindowedLlama, "1x1", marks=pytest.mark.slow),
    ],
)
def test_classes_in_the_engine(path, model_class, mesh):
    plain = model_class.from_pretrained(path)
    prompts = [TOKENS[0].tolist(), TOKENS[1, :5].tolist()]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, prompt_logprobs=0)
    with LLM(path, mesh, in_process=True, model_class=model_class, **SMALL) as llm:
        found = llm.generate(prompts, params)
        # Prompts and answers, of one length, so that they are one program.
        tokens = np.zeros((2, 70 + 24), int)
        for row, prompt, answer in zip(tokens, prompts, found, strict=True):
            row[: len(prompt) + 24] = prompt + answer.token_ids
        logits = np.asarray(capture(plain, tokens)[0])
        assert_close(capture(llm.model, tokens)[0], logits)
    for row, prompt, answer in zip(logits, prompts, found, strict=True):
        end = len(prompt)
        assert row[end - 1 : end + 23].argmax(axis=-1).tolist() == answer.token_ids
        logprobs = scipy.special.log_softmax(row[: end - 1], axis=-1)
        scored = [each.logprob for each in answer.prompt_logprobs if each]
        expected = logprobs[range(end - 1), prompt[1:]]
        np.testing.assert_allclose(scored, expected, atol=1e-4)
    usual = np.asarray(capture(Llama.from_pretrained(path), tokens)[0])
    assert (usual.argmax(axis=-1) != logits.argmax(axis=-1))[0, 69:93].any()  # it has an effect


# --- refusals -----------------------------------------------------------------------------------


class Loud(Llama):
    def __call__(self, tokens):
        return 2 * super().__call__(tokens)


class Other(Llama):
    def unembed(self, x):
        return -super().unembed(x)


@pytest.mark.parametrize(("model_class", "name"), [(Loud, "__call__"), (Other, "unembed")])
def test_overrides_that_a_mesh_would_skip_are_refused(path, model_class, name):
    with pytest.raises(UserError, match=name):
        ShardedLlama.from_pretrained(path, model_class=model_class)
    with pytest.raises(EngineStartError, match=name):
        LLM(path, in_process=True, model_class=model_class, **SMALL)


def test_neither_an_instance_nor_a_layer_is_a_model_class(path):
    for wrong in (Llama.from_pretrained(path), DecoderLayer):
        with pytest.raises(ValueError, match="model_class"):
            ShardedLlama.from_pretrained(path, model_class=wrong)


def test_a_class_for_an_engine_in_another_process(path):
    with pytest.raises(RequestError, match="in_process"):
        LLM(path, model_class=WindowedLlama)


@pytest.mark.parametrize(
    "score_mod",
    [
        lambda scores, head, query, key: query - key,  # broadcasts, and would replace the scores
        lambda scores, head, query, key: scores[..., :1],
        lambda scores, head, query, key: None,
    ],
)
def test_a_score_mod_must_return_all_scores(score_mod):
    q, kv, pages = np.ones((1, 5, 4, 8)), np.ones((1, 5, 2, 8)), np.ones((2, 3, 16, 8))
    rows = np.array([[0]]), np.arange(5)[None], np.array([5])
    for attend in (
        lambda q, kv, pages: causal_attention(q, kv, kv, score_mod=score_mod),
        lambda q, kv, pages: paged_attention(q, pages, pages, *rows, score_mod),
        lambda q, kv, pages: paged_weights(q, pages, *rows, score_mod),
    ):
        with pytest.raises(ValueError, match="score_mod"):
            jax.eval_shape(attend, q, kv, pages)


def test_scores_in_bfloat16_go_on_as_float32():
    """On one device as over pages, where the softmax is in float32 in any case."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 40, 4, 8)).astype(np.float32)

    def rounded(scores, head, query, key):
        return (3 * scores).astype(jnp.bfloat16)

    def as_float32(*args):
        return rounded(*args).astype(jnp.float32)

    found, expected = (
        jax.jit(partial(causal_attention, score_mod=mod))(q, k, v) for mod in (rounded, as_float32)
    )
    np.testing.assert_array_equal(found, expected)


class Clash(DecoderLayer):
    def __call__(self, x, positions, attend, reduce=lambda partial: partial):
        return self.tap("mlp", super().__call__(x, positions, attend, reduce))


class ClashLlama(Llama):
    layer_class = Clash


def test_a_tap_must_not_have_the_name_of_a_module(path):
    model = ClashLlama.from_pretrained(path)
    jax.eval_shape(lambda tokens: model(tokens), TOKENS)  # harmless while nothing is captured
    with pytest.raises(ValueError, match="'mlp'"):
        capture(model, TOKENS, "logits")


class Forgetful(DecoderLayer):
    def __call__(self, x, positions, attend, reduce=lambda partial: partial):
        return super().__call__(x, positions, attend)


class ForgetfulLlama(Llama):
    layer_class = Forgetful


class Skipped(DecoderLayer):
    def __call__(self, x, positions, attend, reduce=lambda partial: partial):
        return x


class SkippedLlama(Llama):
    layer_class = Skipped


def test_a_layer_must_sum_what_the_ranks_have_attended(path):
    model = ShardedLlama.from_pretrained(path, "1x2", model_class=ForgetfulLlama)
    for names in ("logits", "layers.0.residual"):
        with pytest.raises(UserError, match=r"Forgetful .* reduce"):
            capture(model, TOKENS, names)
    alone = ShardedLlama.from_pretrained(path, "2x1", model_class=ForgetfulLlama)
    assert_close(alone(TOKENS), capture(Llama.from_pretrained(path), TOKENS)[0])
    model = ShardedLlama.from_pretrained(path, "1x2", model_class=SkippedLlama)
    assert_close(model(TOKENS), capture(SkippedLlama.from_pretrained(path), TOKENS)[0])


class LoopedLayer(DecoderLayer):
    """Runs twice, with the same weights."""

    def __call__(self, x, positions, attend, reduce=lambda partial: partial):
        x = super().__call__(x, positions, attend, reduce)
        return super().__call__(x, positions, attend, reduce)


class LoopedLlama(Llama):
    layer_class = LoopedLayer


@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
def test_a_layer_that_attends_twice_is_refused_on_a_mesh(path, mesh):
    """Its pages hold one set of keys, so the first of its attentions would read the second's."""
    alone = LoopedLlama.from_pretrained(path)
    assert jax.eval_shape(lambda tokens: alone(tokens), TOKENS).shape == (2, 70, VOCAB)
    with pytest.raises(UserError, match=r"^LoopedLayer attends 2 times.*one device\."):
        ShardedLlama.from_pretrained(path, mesh, model_class=LoopedLlama)(TOKENS)
