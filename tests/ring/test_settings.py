"""JAX settings of the session change no answer, and zero-size arrays do not reach the compiler."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import LLM, Llama, SamplingParams, ShardedLlama
from llama_jax.interpret import (
    Add,
    activation_shapes,
    capture,
    gradients,
    greedy_answer,
    logit_lens,
    patched,
)
from llama_jax.ring import steps
from llama_jax.ring.packet import packet_size
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.weights.placement import param_shapes
from sharding.mesh import make_mesh
from tests.support.programs import CONFIG, compile_few
from tests.support.reference import make_model, save_model
from tests.support.tiny_tokenizer import make_tokenizer

PROMPT = [5, 60, 7, 200, 9]
NAMES = ("layers.1.residual", "layers.*.attention.weights")
SETTINGS = [
    ("jax_enable_x64", True),
    ("jax_threefry_partitionable", False),
    ("jax_default_prng_impl", "rbg"),
    ("jax_numpy_rank_promotion", "raise"),
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_disable_jit", True),
    ("jax_debug_nans", True),
    ("jax_debug_infs", True),
]


@contextmanager
def session(name: str, value: object) -> Iterator[None]:
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    theirs = make_model(num_layers=3, num_heads=4, num_kv_heads=2, vocab_size=320)
    return make_tokenizer(save_model(theirs, tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def llm(path):
    sizes = {"max_num_seqs": 2, "max_chunk": 64, "kv_cache_memory": 1 << 22}
    with pytest.MonkeyPatch.context() as patch:
        compile_few(patch)
        with LLM(path, "2x2", in_process=True, progress=False, **sizes) as llm:
            yield llm


def generated(llm: LLM) -> list[list[int]]:
    """Greedy and seeded answers."""
    params = [SamplingParams(temperature=0, max_tokens=12)]
    params += [SamplingParams(temperature=1.0, seed=seed, max_tokens=12) for seed in (1, 2**40)]
    params += [SamplingParams(temperature=1.5, top_k=50, top_p=0.9, seed=3, max_tokens=12)]
    return [answer.token_ids for answer in llm.generate([PROMPT] * len(params), params)]


def observed(model: ShardedLlama) -> list[np.ndarray]:
    logits, found = capture(model, np.array([PROMPT]), *NAMES)
    return [
        np.asarray(value) for value in (logits, *found.values(), model.unembed(logits[..., :64]))
    ]


def interpreted(path) -> list[np.ndarray]:
    """Numbers of the plain model: its logits, activations, a patch of double precision."""
    model, tokens = Llama.from_pretrained(path), jnp.array([PROMPT])
    change = patched(model, {"layers.1.mlp.output": Add(np.full(64, 0.1))})
    found = [model(tokens), change(tokens), logit_lens(model, tokens)]
    found += capture(model, tokens, *NAMES)[1].values()
    found += gradients(model, tokens, lambda logits: logits[0, -1, 7]).values()
    assert all(value.dtype == jnp.float32 for value in found)
    return [np.asarray(value) for value in (*found, greedy_answer(model, PROMPT, 4))]


@pytest.fixture(scope="module")
def expected(path, llm):
    return generated(llm), observed(ShardedLlama.from_pretrained(path, llm.model.mesh))


@pytest.fixture(scope="module")
def expected_of_the_plain_model(path):
    return interpreted(path)


def sessions(*quick: str) -> pytest.MarkDecorator:
    """Parametrizes a test over all settings; those not in `quick` are slow."""
    return pytest.mark.parametrize(
        ("name", "value"),
        [
            pytest.param(name, value, id=name, marks=() if name in quick else pytest.mark.slow)
            for name, value in SETTINGS
        ],
    )


@sessions("jax_enable_x64")
def test_the_answers_of_a_mesh_are_the_same(path, llm, expected, name, value):
    with session(name, value):
        assert generated(llm) == expected[0]
        model = ShardedLlama.from_pretrained(path, llm.model.mesh)
        assert activation_shapes(model, 1, len(PROMPT)).keys() >= set(NAMES[:1])
        for found, before in zip(observed(model), expected[1], strict=True):
            np.testing.assert_array_equal(found, before)


def test_a_mesh_of_the_session_is_not_that_of_the_programs(path, llm, expected):
    with jax.set_mesh(jax.make_mesh((4, 2), ("rows", "columns"))):
        found = observed(ShardedLlama.from_pretrained(path, llm.model.mesh))
    for now, before in zip(found, expected[1], strict=True):
        np.testing.assert_array_equal(now, before)


def test_the_engine_sends_packets_though_the_session_forbids_transfers(llm, expected):
    with session("jax_transfer_guard", "disallow"):
        assert generated(llm) == expected[0]


@sessions()
def test_the_plain_model_gives_the_same_numbers(path, expected_of_the_plain_model, name, value):
    with session(name, value):
        found = interpreted(path)
    for now, before in zip(found, expected_of_the_plain_model, strict=True):
        if name == "jax_disable_jit":  # the operations are not fused, and round differently
            np.testing.assert_allclose(now, before, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(now, before)


def test_no_program_has_an_argument_of_size_zero():
    """XLA:CPU of jaxlib 0.11.2 crashes on one, also if it is a constant that JAX has hoisted."""
    mesh, bucket = make_mesh("2x1"), Bucket(0, 16)
    sizes = RingSizes(
        num_slots=1, num_pages=1, page_size=16, pages_per_sequence=1,
        row_buckets=(0,), chunk_buckets=(16,), tile=16,
    )  # fmt: skip
    state = steps.state_shapes(CONFIG, mesh, sizes, jnp.dtype(jnp.float32))
    assert all(leaf.size for leaf in jax.tree.leaves(state))
    packed = jax.ShapeDtypeStruct((packet_size(sizes, bucket),), jnp.int32)
    step = steps.prefill_step(CONFIG, mesh, sizes, *bucket)
    text = step.lower(param_shapes(CONFIG, mesh, jnp.dtype(jnp.float32)), state, packed).as_text()
    (body,) = re.findall(r"sdy.manual_computation.* manual_axes=.*? \((.*)\) {", text)
    assert "tensor<" in body and "tensor<0x" not in body and "x0x" not in body
