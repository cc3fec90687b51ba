"""`ShardedLlama` is called like the plain model and compiles no more than it must."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import LLM, Llama, SamplingParams, ShardedLlama
from llama_jax.engine.compile_counter import CompileCounter
from llama_jax.interpret import capture, kv_cache
from llama_jax.ring.backend import HOPPER, Backend
from sharding.errors import UserError
from sharding.mesh import make_mesh
from tests.support.hooked import assert_close
from tests.support.programs import compile_few
from tests.support.reference import make_model, reference_logits, save_model
from tests.support.tiny_tokenizer import make_tokenizer

VOCAB = 259  # no number of ranks divides it; there is room for the 256 bytes of a tokenizer


@pytest.fixture(scope="module")
def theirs():
    return make_model(num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def path(theirs, tmp_path_factory):
    return save_model(theirs, tmp_path_factory.mktemp("model"))


def tokens_of(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


# Fewer prompts than a chunk holds, as many, and more; a token, a page and a tile, and one more.
@pytest.mark.parametrize(
    ("mesh", "shapes"),
    [
        pytest.param("1x1", [(1, 1), (1, 65)], marks=pytest.mark.slow),
        ("2x2", [(3, 128)]),
        pytest.param("1x1", [(5, 16), (1, 17)], marks=pytest.mark.slow),
        pytest.param("2x2", [(2, 64), (1, 129)], marks=pytest.mark.slow),
        pytest.param("4x1", [(3, 17)], marks=pytest.mark.slow),
    ],
)
def test_logits(path, theirs, mesh, shapes):
    model = ShardedLlama.from_pretrained(path, make_mesh(mesh))
    for shape in shapes:
        tokens = tokens_of(*shape)
        expected = np.stack([reference_logits(theirs, prompt) for prompt in tokens.tolist()])
        assert_close(model(tokens), expected)


def test_what_is_no_mesh_is_refused(path):
    with pytest.raises(UserError, match=r"^A mesh must have the form .* got \(2, 2\)\.$"):
        ShardedLlama.from_pretrained(path, (2, 2))
    with pytest.raises(UserError, match=r"^A mesh must have the axes .*, got x and y: "):
        ShardedLlama.from_pretrained(path, jax.make_mesh((2, 2), ("x", "y")))


def test_calls_inside_jit_are_refused(path):
    model = ShardedLlama.from_pretrained(path)
    for call, value in ((model, tokens_of(1, 3)), (model.unembed, np.ones((3, 64), np.float32))):
        with pytest.raises(ValueError, match=r"^A model on a mesh .* inside jax\.jit"):
            jax.jit(call)(value)
    with pytest.raises(ValueError, match="not differentiable"):
        jax.grad(lambda x: model.unembed(x).sum())(np.ones((3, 64), np.float32))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("residual", "embedding, final_norm.output, logits"),
        ("layers.3.residual", "layers.0 to layers.2"),
        ("layers.*.residual", "layers.0 to layers.2"),
        ("layers.1.resid", "middle, mlp.neurons, mlp.output, mlp_norm.output, residual"),
    ],
)
def test_unknown_activations_are_refused(path, name, known):
    model = ShardedLlama.from_pretrained(path, "2x1")
    with pytest.raises(ValueError, match=rf"^There is no activation .* {re.escape(known)}.*\.$"):
        model.observe(tokens_of(1, 3), ["logits", name])


def test_the_kernel_where_it_cannot_run_is_refused(path):
    plain = ShardedLlama.from_pretrained(path, attention_backend="plain")
    with pytest.raises(UserError, match="attention_backend is hopper"):
        ShardedLlama.from_pretrained(path, attention_backend="hopper")
    given = (plain.config, plain.mesh, plain.params, plain.dtype)
    model = ShardedLlama(*given, attention_backend=Backend(HOPPER, 132))
    with pytest.raises(UserError, match="head dimension"):  # the kernel, as it is traced
        model(tokens_of(1, 3))


def test_unembed(path):
    plain, sharded = Llama.from_pretrained(path), ShardedLlama.from_pretrained(path, "2x2")
    x = np.random.default_rng(0).normal(size=(3, 2, 5, 64)).astype(np.float32)
    for part in (x, x[0, 0, 0]):
        assert sharded.unembed(part).shape == (*part.shape[:-1], VOCAB)
        assert_close(sharded.unembed(part), plain.unembed(part))


def test_unembed_one_row_in_bfloat16(path):
    """A product of its own (`ring.tick.local_logits`)."""
    plain, sharded = (
        model.from_pretrained(path, dtype="bfloat16") for model in (Llama, ShardedLlama)
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64)), jnp.bfloat16)
    assert sharded.unembed(x).shape == (1, VOCAB)
    assert_close(sharded.unembed(x), plain.unembed(x))


def test_one_call_leaves_nothing_for_the_next(path):
    """Two prompts of the same shape use the same pages, with another shape in between."""
    model = ShardedLlama.from_pretrained(path, "2x1")
    first, second = tokens_of(2, 40), tokens_of(2, 40, seed=1)
    expected = [model(first)]
    cache = model.cache
    expected.append(model(second))
    assert cache.keys[0].is_deleted()  # the second call has reused its memory
    model(tokens_of(1, 7))
    for tokens, logits in ((first, expected[0]), (second, expected[1]), (first, expected[0])):
        np.testing.assert_array_equal(model(tokens), logits)


def test_an_interrupted_call_can_be_repeated(path, monkeypatch):
    model, tokens = ShardedLlama.from_pretrained(path, "2x1"), tokens_of(2, 40)
    expected = model(tokens)

    def interrupted(value):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(tokens)
    np.testing.assert_array_equal(model(tokens), expected)


def test_programs_are_cached(path):
    """By sizes and by captured names, for all objects whose weights have the same shapes."""
    names = ("layers.1.residual", "layers.*.mlp.output")
    model = ShardedLlama.from_pretrained(path, "2x1")
    capture(model, tokens_of(2, 40), *names)
    model.unembed(np.zeros((4, 64), np.float32))
    params = model.params
    again = ShardedLlama(model.config, model.mesh, params, model.dtype)
    again(tokens_of(2, 40))  # allocates its cache, which is also a program
    counter = CompileCounter()
    for each in (model, again):
        capture(each, tokens_of(2, 40, seed=2), *names)
        each.unembed(np.ones((4, 64), np.float32))
    assert counter.count == 0
    capture(model, tokens_of(2, 40), "layers.1.middle")
    assert counter.count > 0


def test_the_engines_weights_are_shared(tmp_path, monkeypatch):
    compile_few(monkeypatch)
    theirs = make_model(num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=320)
    path, tokens = make_tokenizer(save_model(theirs, tmp_path)), tokens_of(1, 20)
    greedy = SamplingParams(temperature=0, max_tokens=8)
    sizes = {"max_num_seqs": 2, "max_chunk": 64, "kv_cache_memory": 1 << 22}
    with LLM(path, in_process=True, **sizes) as llm:
        answer = llm.generate([5, 6, 7], greedy).token_ids
        model = llm.model
        assert model.params is llm.engine.loop.executor.params
        assert_close(model(tokens)[0], reference_logits(theirs, tokens[0].tolist()))
        counter = CompileCounter()
        np.testing.assert_array_equal(model(tokens), model(tokens))
        assert counter.count == 0
        assert llm.generate([5, 6, 7], greedy).token_ids == answer  # the engine still works
    keys, _ = kv_cache(model, tokens)
    assert keys.shape == (3, 1, 20, 2, 8)
