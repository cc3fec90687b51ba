"""Taps cost nothing while nothing is captured: the compiled programs are the same without them.

Each program is compiled as it is, and again with every trace of `tap` and `score_mod` removed. The
quick tests use the options of the other tests and one step, the slow ones also those of production.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax import ShardedLlama
from llama_jax.interpret import Scale, capture, patched
from llama_jax.model import Attention, Llama, attention
from llama_jax.model import llama as model
from llama_jax.model.tap import TappedModule
from llama_jax.ring import stage
from llama_jax.ring.sizes import Bucket
from llama_jax.weights.placement import param_shapes
from sharding.mesh import make_mesh
from tests.support.programs import CONFIG, compile_step
from tests.support.xla_options import PRODUCTION

TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)
STEPS = [(Bucket(4, 64), "2x2"), (Bucket(4, 0), "2x2"), (Bucket(1, 0), "1x1")]
SLOW = pytest.mark.slow
OPTIONS = [
    pytest.param((), id="cheap"),
    pytest.param(tuple(PRODUCTION.items()), id="production", marks=SLOW),
]
Options = tuple[tuple[str, bool | int], ...]


def program(text: str) -> str:
    """Optimized HLO without source locations, its instructions numbered in order."""
    tables = r"(?ms)^(FileNames|FunctionNames|FileLocations|StackFrames)\n.*?\n\n"
    text = re.sub(r", metadata=\{[^}]*\}", "", re.sub(tables, "", text))
    text = re.sub(r"(?m)^HloModule \S+", "HloModule", text)
    numbers: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        return f"%{numbers.setdefault(match[0], len(numbers))}"

    return re.sub(r"%[\w.-]+", number, text)


def forward(llama: Llama, options: Options = ()) -> str:
    graph, state = nnx.split(llama)

    def run(state: nnx.State, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(tokens)

    lowered = jax.jit(run).lower(state, jnp.asarray(TOKENS))
    return program(lowered.compile(dict(options)).as_text())


def ring(bucket: Bucket, mesh: str, options: Options = ()) -> str:
    return program(compile_step(bucket, mesh, options=dict(options)).as_text())


@cache
def plain(options: Options = ()) -> str:
    """The forward pass as it is."""
    return forward(make_llama(), options)


@cache
def plain_ring(bucket: Bucket, mesh: str, options: Options = ()) -> str:
    """A step of the ring as it is."""
    return ring(bucket, mesh, options)


def make_llama() -> Llama:
    return Llama(CONFIG, rngs=nnx.Rngs(0))


def rewritten(function: Callable, lines: Mapping[str, str]) -> Callable:
    """A function of `attention`, defined again with parts of its source replaced."""
    text = inspect.getsource(function)
    for old, new in lines.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    scope = dict(vars(attention))
    exec(text, scope)
    return scope[function.__name__]


SCORED = """changed_scores(
            score_mod, scores * head_dim**-0.5, head, position[:, None], position
        )"""
TAPPED = 'tap("weights", weights.reshape(by_head)).reshape(weights.shape)'
PAGED = """changed_scores(
            score_mod, scores, row_heads, row_positions[..., None], key_positions
        )"""


@pytest.fixture
def strip(monkeypatch):
    """A function that removes every tap and every call of `score_mod` from the model."""

    def strip() -> None:
        causal, paged = attention.causal_attention, attention.paged_attention
        causal = rewritten(causal, {SCORED: "scores * head_dim**-0.5", TAPPED: "weights"})
        monkeypatch.setattr(model, "causal_attention", causal)
        monkeypatch.setattr(stage, "paged_attention", rewritten(paged, {PAGED: "scores"}))
        monkeypatch.setattr(TappedModule, "tap", lambda self, name, value: value)

    return strip


@pytest.mark.parametrize("options", OPTIONS)
def test_the_plain_model(strip, options):
    text = plain(options)
    assert text.count("\n") > 100
    strip()
    assert forward(make_llama(), options) == text


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("bucket", "mesh"),
    [STEPS[0], *(pytest.param(*step, marks=SLOW) for step in STEPS[1:])],
    ids=str,
)
def test_the_ring(strip, bucket, mesh, options):
    text = plain_ring(bucket, mesh, options)
    assert text.count("\n") > 100
    strip()
    assert ring(bucket, mesh, options) == text


def doubled(self, name, value):
    return value * 2 if name == "middle" else value


def shifted(self, scores, head, query_position, key_position):
    return scores + head


@pytest.mark.parametrize(
    ("module", "name", "function"),
    [(TappedModule, "tap", doubled), (Attention, "score_mod", shifted)],
    ids=["tap", "score_mod"],
)
def test_a_cost_is_found(monkeypatch, module, name, function):
    before = plain(), plain_ring(*STEPS[0])
    monkeypatch.setattr(module, name, function)
    for text, now in zip(before, (forward(make_llama()), ring(*STEPS[0])), strict=True):
        assert now != text


def test_capturing_leaves_the_model_unchanged():
    llama = make_llama()
    text, logits = forward(llama), jax.jit(lambda tokens: llama(tokens))(TOKENS)

    def parts() -> dict[tuple, list[str]]:
        return {path: sorted(vars(module)) for path, module in nnx.iter_modules(llama)}

    before = parts(), nnx.graphdef(llama)
    capture(llama, TOKENS, "*")
    without = patched(llama, {"layers.*.mlp.output": Scale(0.0)})
    capture(without, TOKENS, "*")
    with pytest.raises(ValueError, match="'nothing'"):
        capture(llama, TOKENS, "nothing")
    assert (parts(), nnx.graphdef(llama)) == before
    assert forward(llama) == text
    np.testing.assert_array_equal(jax.jit(lambda tokens: llama(tokens))(TOKENS), logits)
    assert forward(without) != text  # a patch shows


def test_capturing_leaves_the_programs_of_the_ring_unchanged():
    before = plain_ring(*STEPS[0])
    mesh = make_mesh("2x2")
    params = init_params(mesh)
    capture(ShardedLlama(CONFIG, mesh, params, jnp.dtype(jnp.float32)), TOKENS, "*")
    assert ring(*STEPS[0]) == before


def init_params(mesh):
    """Zeros, sharded like the weights."""
    shapes = param_shapes(CONFIG, mesh, jnp.dtype(jnp.float32))
    return jax.tree.map(
        lambda array: jax.device_put(np.zeros(array.shape, array.dtype), array.sharding), shapes
    )
