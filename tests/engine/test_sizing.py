"""From options and memory to sizes: what holds for all of them, and what is refused."""

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import LlamaConfig
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import (
    CPU_CACHE_BYTES,
    SizingError,
    bytes_by_device,
    check_options,
    choose_sizes,
)
from llama_jax.ring.kv_cache import cache_shapes, init_cache
from sharding.mesh import make_mesh

CONFIG = LlamaConfig(
    vocab_size=100,
    embed_dim=32,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    rope_theta=10000.0,
    norm_eps=1e-5,
    max_position_embeddings=512,
)
MESHES = ("1x1", "2x1", "4x1", "1x2", "2x2", "4x2")


def bytes_of_a_page(mesh: str, page_size: int, itemsize: int) -> int:
    """On one device: keys and values of its heads in each of its layers, padding included."""
    stages, ranks = map(int, mesh.split("x"))
    layers = -(-CONFIG.num_layers // stages)
    return 2 * layers * (CONFIG.num_kv_heads // ranks) * page_size * CONFIG.head_dim * itemsize


def choose(mesh: str = "1x1", dtype=jnp.float32, **options):
    chosen = EngineOptions(path="", mesh=mesh, **options)
    check_options(chosen, CONFIG)
    return choose_sizes(chosen, CONFIG, make_mesh(mesh), dtype)


@settings(deadline=None, max_examples=200)
@given(
    mesh=st.sampled_from(MESHES),
    max_num_seqs=st.integers(1, 300),
    max_chunk=st.integers(1, 2100),
    page_size=st.integers(1, 64),
    max_model_len=st.none() | st.integers(2, 512),
    pages=st.integers(0, 2000),
)
def test_sizes_fit_together(mesh, max_num_seqs, max_chunk, page_size, max_model_len, pages):
    stages = int(mesh[0])
    each = bytes_of_a_page(mesh, page_size, 4)
    memory = pages * each + 1  # not quite one page more
    options = dict(
        max_num_seqs=max_num_seqs,
        max_chunk=max_chunk,
        page_size=page_size,
        max_model_len=max_model_len,
        kv_cache_memory=memory,
    )
    if pages * page_size < (max_model_len or 2):
        with pytest.raises(SizingError, match="raise kv_cache_memory to"):
            choose(mesh, **options)
        return
    sizes, longest = choose(mesh, **options)

    assert sizes.num_pages <= pages
    assert longest <= sizes.num_pages * page_size, "the longest sequence does not fit the pool"
    assert longest == (max_model_len or min(512, sizes.num_pages * page_size))
    assert (sizes.pages_per_sequence - 1) * page_size < longest
    assert longest <= sizes.pages_per_sequence * page_size
    # All the pages that the memory has, but no more than the sequences can fill.
    most = sizes.num_slots * -(-(max_model_len or 512) // page_size)
    assert sizes.num_pages == min(pages, most)

    assert sizes.num_slots == max_num_seqs
    assert max_num_seqs <= sizes.max_rows * stages < max_num_seqs + stages
    assert max_chunk <= sizes.max_chunk < max_chunk + sizes.tile
    assert sizes.chunk_buckets[0] == 0
    for buckets in (sizes.row_buckets, sizes.chunk_buckets):
        assert list(buckets) == sorted(set(buckets))
        assert len(buckets) <= 5
    assert sizes.row_buckets[0] >= 1
    assert all(chunk % sizes.tile == 0 for chunk in sizes.chunk_buckets)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_cache_takes_the_memory_that_it_was_given(mesh, dtype):
    given_bytes = 1 << 20
    sizes, _ = choose(mesh, dtype, kv_cache_memory=given_bytes, max_num_seqs=400)
    device_mesh = make_mesh(mesh)
    shapes = cache_shapes(CONFIG, device_mesh, sizes.num_pages, sizes.page_size, dtype)
    held = bytes_by_device(init_cache(shapes), device_mesh)
    each = bytes_of_a_page(mesh, sizes.page_size, dtype.dtype.itemsize)
    assert set(held.values()) == {sizes.num_pages * each}
    assert given_bytes - each < held[device_mesh.devices[0, 0]] <= given_bytes


@pytest.mark.parametrize("mesh", MESHES)
def test_on_a_cpu_all_devices_share_one_budget(mesh):
    sizes, _ = choose(mesh, max_num_seqs=100_000)
    stages, ranks = map(int, mesh.split("x"))
    total = sizes.num_pages * bytes_of_a_page(mesh, 16, 4) * stages * ranks
    assert 0.99 * CPU_CACHE_BYTES < total <= CPU_CACHE_BYTES


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_model_len": 513}, "max_model_len must be between 2 and the model's 512, got 513."),
        (
            {"kv_cache_memory": 49151, "max_model_len": 64},
            "The KV cache has 49151 bytes on each device, which hold 48 tokens, and max_model_len "
            "is 64: raise kv_cache_memory to 49152 or lower max_model_len.",
        ),
        (
            {"kv_cache_memory": 100},
            "The KV cache has 100 bytes on each device, which hold 0 tokens, and max_model_len "
            "is 512: raise kv_cache_memory to 393216 or lower max_model_len.",
        ),
    ],
)
def test_options_that_do_not_work(options, sentence):
    with pytest.raises(SizingError) as error:
        choose(**options)
    assert str(error.value) == sentence


def test_the_memory_that_the_error_asks_for_is_enough():
    sizes, longest = choose(kv_cache_memory=49152, max_model_len=64)
    assert (sizes.num_pages, longest) == (4, 64)
