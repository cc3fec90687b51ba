"""The ring with a KV cache of another dtype than its activations.

The reference is transformers in float64, whose keys and values are rounded as in the cache.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AttentionInterface, LlamaForCausalLM

from llama_jax import ShardedLlama
from llama_jax.interpret import attention_weights, kv_cache
from llama_jax.model import kv_storage
from llama_jax.model.kv_storage import choose_kv_dtype
from llama_jax.ring import steps
from llama_jax.ring.sizes import Bucket
from sharding.errors import UserError
from sharding.mesh import make_mesh
from tests.support import programs
from tests.support.hlo import aliased_outputs, large_copies
from tests.support.programs import SIZES
from tests.support.reference import (
    distance,
    drive,
    greedy_requests,
    make_loop,
    make_model,
    save_model,
)

VOCAB = 131
SLOW = pytest.mark.slow
NAMES = ("bf16", "int8", "fp8")


def rounded(x: np.ndarray, name: str) -> np.ndarray:
    """Keys or values `[..., h]` after their way through the cache."""
    x = x.astype(np.float32)
    if name == "bf16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float64)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    if name == "int8":
        return np.rint(x / (largest / 127)) * (largest / 127).astype(np.float64)
    scale = largest / 448
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def attend_to_rounded(module, query, key, value, attention_mask, scaling, **_):
    """Causal attention of transformers over rounded keys and values."""
    group = query.shape[1] // key.shape[1]
    key, value = (
        torch.from_numpy(rounded(x.numpy(), module.config.kv_name)).repeat_interleave(group, 1)
        for x in (key, value)
    )
    scores = query @ key.mT * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("rounded", attend_to_rounded)


def logits_of(model, tokens, name: str) -> np.ndarray:
    """`[B, T, V]` float64."""
    model.config.kv_name = name
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    sizes = dict(embed_dim=32, mlp_dim=48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16)
    return save_model(make_model(vocab_size=VOCAB, **sizes), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def theirs(path):
    model = LlamaForCausalLM.from_pretrained(path, attn_implementation="rounded")
    return model.double().eval()


def relative(found, expected) -> float:
    """The largest difference, relative to the largest number."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def cases(quick: set[tuple[str, str]]) -> list:
    """Each dtype on each mesh; those that are not quick are slow."""
    return [
        pytest.param(name, mesh, marks=[] if (name, mesh) in quick else [SLOW])
        for name in NAMES
        for mesh in ("1x1", "2x2", "4x2")
    ]


# A number at the border of two steps may fall on the other side than in the reference. Against the
# unrounded model, logits differ by 0.02 with int8 and by 0.08 with fp8.
TOLERANCES = {"bf16": 1e-3, "int8": 1e-3, "fp8": 4e-3}


@pytest.mark.parametrize(("name", "mesh"), cases(set()))
def test_logits(path, theirs, name, mesh):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 90))
    expected = logits_of(theirs, tokens, name)
    found = ShardedLlama.from_pretrained(path, mesh, kv_cache_dtype=name)(tokens)
    assert relative(found, expected) <= TOLERANCES[name]
    if name != "bf16":  # whose rounding is about as large as the tolerance
        plain = ShardedLlama.from_pretrained(path, mesh)(tokens)
        assert relative(plain, expected) > 5 * TOLERANCES[name]


QUICK_ANSWERS = {("int8", "2x2")}


@pytest.mark.parametrize(("name", "mesh"), cases(QUICK_ANSWERS))
def test_answers(path, theirs, name, mesh):
    """In a pool of NaN, with prompts of several chunks, shared beginnings and preemptions.

    The quick test has the largest buckets alone.
    """
    stages = int(mesh[0])
    loop = make_loop(
        path, mesh, kv_cache_dtype=name, max_num_seqs=2 * stages, max_chunk=64, page_size=8,
        num_pages=max(13, 9 * stages), largest_only=(name, mesh) in QUICK_ANSWERS,
    )  # fmt: skip
    requests = greedy_requests((1, 70, 20, 7, 30, 40), vocab_size=VOCAB, max_tokens=24)
    requests[4] = requests[4]._replace(prompt=requests[1].prompt[:30])
    run = drive(loop, requests)
    assert loop.scheduler.num_preemptions and loop.scheduler.num_cached_tokens
    theirs.config.kv_name = name
    for request in requests:
        far = distance(theirs, request, run)
        assert far.logits <= TOLERANCES[name]
        assert far.tokens <= 10 * TOLERANCES[name]
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_readings_show_what_attention_reads(path, name):
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 20))
    plain = ShardedLlama.from_pretrained(path, "1x2")
    model = ShardedLlama.from_pretrained(path, "1x2", kv_cache_dtype=name)
    for found, exact in zip(kv_cache(model, tokens), kv_cache(plain, tokens), strict=True):
        assert found.shape == exact.shape and found.dtype == exact.dtype
        # The inputs of later layers differ.
        np.testing.assert_allclose(found[0], rounded(np.asarray(exact[0]), name), rtol=1e-5)
        assert 0 < relative(found, exact) < 0.2
    weights, exact = (attention_weights(m, tokens) for m in (model, plain))
    np.testing.assert_allclose(np.sum(weights, axis=-1), 1, rtol=1e-5)
    assert 0 < np.abs(weights - exact).max() < 0.1


def test_an_unknown_name_is_refused_before_weights_are_read(path, monkeypatch):
    monkeypatch.setattr("llama_jax.ring.sharded_llama.load_params", None)
    with pytest.raises(UserError, match="kv_cache_dtype"):
        ShardedLlama.from_pretrained(path, kv_cache_dtype="fp4")


# --- the compiled programs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "name", "bucket"),
    [
        ("bfloat16", "auto", Bucket(1, 0)),
        *(
            pytest.param(dtype, name, bucket, marks=SLOW)
            for dtype in ("float32", "bfloat16")
            for name in NAMES
            for bucket in (Bucket(1, 0), Bucket(4, 128))
        ),
    ],
)
def test_the_cache_is_updated_in_place_and_converted_only_where_it_is_read(dtype, name, bucket):
    dtype = jnp.dtype(dtype)
    cache_dtype = choose_kv_dtype(name, dtype)
    compiled = programs.compile_step(bucket, "1x1", dtype=dtype, cache_dtype=cache_dtype)
    shapes = steps.state_shapes(programs.CONFIG, make_mesh("1x1"), SIZES, dtype, cache_dtype)
    pool = shapes.cache.keys[0]
    assert large_copies(compiled.as_text(), pool.size * pool.dtype.itemsize) == []
    assert compiled.memory_analysis().temp_size_in_bytes < pool.size * pool.dtype.itemsize
    arrays = jax.tree.leaves(shapes)
    assert len(arrays) == 5 + (8 if kv_storage.has_scales(cache_dtype) else 4)
    assert len(aliased_outputs(compiled.as_text())) == len(arrays)


@pytest.mark.slow
def test_a_cache_that_is_converted_is_found(monkeypatch):
    """float8, which XLA:CPU widens in every version of jaxlib so far."""
    monkeypatch.setattr(kv_storage, "_BITS", {})
    compiled = programs.compile_step(
        Bucket(4, 0), "1x1", dtype=jnp.dtype(jnp.float32), cache_dtype=kv_storage.FLOAT8
    )
    pool = 4 * SIZES.num_pages * SIZES.page_size * 8
    assert large_copies(compiled.as_text(), pool)
