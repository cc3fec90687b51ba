"""The sizes that an engine chooses, the memory that it counts, and the options that it refuses."""

import dataclasses
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import DynamicScaling, LinearScaling, LlamaConfig
from llama_jax.engine import core
from llama_jax.engine.decisions import decide
from llama_jax.engine.device_memory import (
    allowed_bytes,
    bytes_by_device,
    choose_mesh_sizes,
    free_bytes,
)
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import (
    CPU_CACHE_BYTES,
    SizingError,
    check_options,
    check_stages,
    choose_results_late,
    choose_sizes,
    gpu_cache_bytes,
)
from llama_jax.model import Llama
from llama_jax.model.kv_storage import choose_kv_dtype
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
MESHES = ("1x1", "2x1", "4x1", "1x2", "2x2", "4x2", "1x4", "2x4")


def bytes_of_a_page(mesh: str, page_size: int, itemsize: int) -> int:
    """Keys and values on one device: of its heads in each of its layers, padding included."""
    stages, ranks = map(int, mesh.split("x"))
    layers = -(-CONFIG.num_layers // stages)
    heads = max(CONFIG.num_kv_heads // ranks, 1)
    return 2 * layers * heads * page_size * CONFIG.head_dim * itemsize


def choose(mesh: str = "1x1", dtype=jnp.float32, **options):
    chosen = EngineOptions(path="", mesh=mesh, **options)
    check_options(chosen, CONFIG)
    return choose_mesh_sizes(chosen, CONFIG, make_mesh(mesh), dtype)


def check_sizes(num_stages, max_num_seqs, max_chunk, page_size, max_model_len, pages):
    page = 1000
    options = EngineOptions(
        path="",
        max_num_seqs=max_num_seqs,
        max_chunk=max_chunk,
        page_size=page_size,
        max_model_len=max_model_len,
    )
    memory = pages * page + 1  # not quite one page more
    if pages * page_size < (max_model_len or 2):
        with pytest.raises(SizingError, match="kv_cache_memory"):
            choose_sizes(options, CONFIG, num_stages, page, memory)
        return
    sizes, longest = choose_sizes(options, CONFIG, num_stages, page, memory)

    assert longest <= sizes.num_pages * page_size, "the longest sequence does not fit the pool"
    assert longest == (max_model_len or min(512, sizes.num_pages * page_size))
    assert (sizes.pages_per_sequence - 1) * page_size < longest
    assert longest <= sizes.pages_per_sequence * page_size
    # All the pages that the memory has, but no more than the sequences can fill.
    useful = sizes.num_slots * -(-(max_model_len or 512) // page_size)
    assert sizes.num_pages == min(pages, useful)

    assert sizes.num_slots == max_num_seqs
    assert max_num_seqs <= sizes.max_rows * num_stages < max_num_seqs + num_stages
    assert max_chunk <= sizes.max_chunk < max_chunk + sizes.tile
    assert sizes.chunk_buckets[0] == 0
    for buckets in (sizes.row_buckets, sizes.chunk_buckets):
        assert list(buckets) == sorted(set(buckets))
        assert all(2 * small >= large for small, large in pairwise(buckets) if small)
    assert sizes.row_buckets[0] >= 1
    assert all(chunk % sizes.tile == 0 for chunk in sizes.chunk_buckets)


any_sizes = given(
    num_stages=st.integers(1, 8),
    max_num_seqs=st.integers(1, 300),
    max_chunk=st.integers(1, 2100),
    page_size=st.integers(1, 64),
    max_model_len=st.none() | st.integers(2, 512),
    pages=st.integers(0, 2000),
)


@settings(deadline=None, max_examples=50)
@any_sizes
def test_sizes_fit_together(**case):
    check_sizes(**case)


@pytest.mark.slow
@settings(deadline=None, max_examples=2000)
@any_sizes
def test_sizes_fit_together_in_many_cases(**case):
    check_sizes(**case)


@pytest.mark.parametrize(("mesh", "dtype"), [("4x2", jnp.float32), ("1x1", jnp.bfloat16)])
def test_the_cache_takes_the_memory_that_it_was_given(mesh, dtype):
    given_bytes = 1 << 20
    sizes, _ = choose(mesh, dtype, kv_cache_memory=given_bytes, max_num_seqs=400)
    device_mesh = make_mesh(mesh)
    shapes = cache_shapes(CONFIG, device_mesh, sizes.num_pages, sizes.page_size, dtype)
    found = bytes_by_device(init_cache(shapes), device_mesh)
    each = bytes_of_a_page(mesh, sizes.page_size, dtype.dtype.itemsize)
    assert set(found.values()) == {sizes.num_pages * each}
    assert given_bytes - each < found[device_mesh.devices[0, 0]] <= given_bytes


@pytest.mark.parametrize(
    ("name", "itemsize", "scale"), [("bf16", 2, 0), ("int8", 1, 4), ("fp8", 1, 4)]
)
@pytest.mark.parametrize("mesh", ["1x1", "4x2", "1x4"])
def test_a_cache_in_fewer_bits_holds_more_tokens(mesh, name, itemsize, scale):
    """The scales count: 4 bytes for the h numbers of a token and KV head."""
    chosen = {"kv_cache_memory": 1 << 20, "max_num_seqs": 10_000}
    sizes, _ = choose(mesh, kv_cache_dtype=name, **chosen)
    token = bytes_of_a_page(mesh, 1, 1) // CONFIG.head_dim * (CONFIG.head_dim * itemsize + scale)
    assert sizes.num_pages == (1 << 20) // (16 * token)
    device_mesh = make_mesh(mesh)
    kind = choose_kv_dtype(name, jnp.float32)
    shapes = cache_shapes(CONFIG, device_mesh, sizes.num_pages, sizes.page_size, kind)
    found = bytes_by_device(init_cache(shapes), device_mesh)
    assert set(found.values()) == {sizes.num_pages * 16 * token}


@pytest.mark.parametrize("mesh", MESHES)
def test_on_a_cpu_all_devices_share_one_budget(mesh):
    sizes, _ = choose(mesh, max_num_seqs=100_000)
    stages, ranks = map(int, mesh.split("x"))
    total = sizes.num_pages * bytes_of_a_page(mesh, 16, 4) * stages * ranks
    assert 0.99 * CPU_CACHE_BYTES < total <= CPU_CACHE_BYTES


@dataclass(frozen=True)
class FakeGPU:
    """A device that reports its memory, in bytes."""

    limit: int
    in_use: int
    platform: str = "gpu"

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit, "bytes_in_use": self.in_use, "num_allocs": 3}


@dataclass(frozen=True)
class SilentGPU:
    platform: str = "gpu"
    stats: dict | None = None

    def memory_stats(self) -> dict | None:
        return self.stats


def test_the_free_memory_of_each_gpu_is_its_limit_less_what_is_in_use():
    assert free_bytes([FakeGPU(68 << 30, 1 << 30), FakeGPU(40, 15)]) == [67 << 30, 25]


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 3}])
def test_a_gpu_that_does_not_report_its_memory(stats):
    with pytest.raises(SizingError, match="kv_cache_memory"):
        free_bytes([FakeGPU(2, 1), SilentGPU(stats=stats)])


def test_a_gpus_cache_takes_what_weights_and_temporaries_leave_of_the_fullest_gpu():
    gib = 1 << 30
    assert gpu_cache_bytes([67 * gib, 60 * gib, 64 * gib], 35 * gib) == 24 * gib
    assert gpu_cache_bytes([36 * gib], 35 * gib) == 0
    assert gpu_cache_bytes([3 * gib], 35 * gib) == 0


def test_the_cache_on_gpus(monkeypatch):
    """On a mesh of two GPUs, one of which is fuller than the other."""
    weights, page = 10_000, 100
    monkeypatch.setattr("llama_jax.engine.device_memory.weight_bytes", lambda *_: weights)
    monkeypatch.setattr("llama_jax.engine.device_memory.page_bytes", lambda *_: page)
    free = weights + (1 << 30)
    gpus = [FakeGPU(free + 20 * page, 5 * page), FakeGPU(free + 99 * page, 1)]
    mesh = SimpleNamespace(devices=np.array([gpus]), axis_names=("stage", "model"))
    mesh.shape = {"stage": 1, "model": 2}
    options = EngineOptions(path="", page_size=16)
    sizes, longest = choose_mesh_sizes(options, CONFIG, mesh, jnp.bfloat16)
    assert sizes.num_pages == 15 and longest == 15 * 16
    given = EngineOptions(path="", page_size=16, kv_cache_memory=7 * page)
    assert choose_mesh_sizes(given, CONFIG, mesh, jnp.bfloat16)[0].num_pages == 7
    # The attention kernel reads 64 tokens at once.
    assert choose_mesh_sizes(EngineOptions(path=""), CONFIG, mesh, jnp.bfloat16)[0].page_size == 64


def test_jax_takes_its_share_of_a_gpu_unless_the_user_has_set_it(monkeypatch):
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    environment: dict[str, str] = {}
    monkeypatch.setattr(core, "os", SimpleNamespace(environ=environment))
    core.configure_jax()
    assert environment == {names[0]: "0.85"}
    for name in names:
        environment.clear()
        environment[name] = "0.5"
        core.configure_jax()
        assert environment == {name: "0.5"}
        core.configure_jax(0.7)
        assert environment == {names[0]: "0.7"}


@pytest.mark.parametrize(
    ("platform", "option", "ticks"),
    [("cpu", None, 0), ("gpu", None, 2), ("gpu", 0, 0), ("gpu", 3, 3), ("cpu", 1, 1)],
)
def test_how_late_results_are_read(platform, option, ticks):
    options = EngineOptions(path="", results_late=option)
    assert choose_results_late(options, platform) == ticks


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_model_len": 513}, "max_model_len"),
        ({"kv_cache_memory": 49151, "max_model_len": 64}, "kv_cache_memory to 49152 "),
        ({"kv_cache_memory": 100}, "kv_cache_memory to 393216 "),
        # In pages of one token they would hold as many as are asked for.
        ({"page_size": 10**9}, "lower page_size, now 1000000000"),
        ({"kv_cache_memory": 49152, "max_model_len": 64, "page_size": 60}, "lower page_size"),
    ],
)
def test_options_that_do_not_work(options, named):
    with pytest.raises(SizingError, match=named) as caught:
        choose(**options)
    assert "\n" not in str(caught.value)


def test_options_at_their_limits():
    smallest = dict(max_num_seqs=1, max_queue=1, page_size=1, max_chunk=1, results_late=0)
    sizes, longest = choose(**smallest, kv_cache_memory=bytes_of_a_page("1x1", 1, 4) * 2)
    assert (sizes.num_pages, longest) == (2, 2)
    assert choose(max_model_len=512)[1] == 512
    assert choose(max_model_len=2)[1] == 2


def test_the_memory_that_the_error_asks_for_is_enough():
    sizes, longest = choose(kv_cache_memory=49152, max_model_len=64)
    assert (sizes.num_pages, longest) == (4, 64)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"max_chunk": 2 * 10**9}, "lower max_chunk, now 2,000,000,0"),
        ({"max_num_seqs": 2 * 10**9}, "lower max_num_seqs, now 2,000,000,000"),
        (
            {"kv_cache_memory": 10**15, "max_num_seqs": 4 * 10**6},
            "set kv_cache_memory to less than",
        ),
    ],
)
@pytest.mark.parametrize("mesh", ["1x1", "4x2"])
def test_a_start_that_needs_more_than_the_memory_is_refused(mesh, options, remedy):
    with pytest.raises(SizingError, match=f": {remedy}"):
        decide(EngineOptions(path="", mesh=mesh, **options), CONFIG, Llama)


def test_weights_larger_than_the_memory_are_refused_before_they_are_loaded(monkeypatch):
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 1 << 28}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    large = dataclasses.replace(CONFIG, vocab_size=2_000_000)
    decide(EngineOptions(path="", kv_cache_memory=1 << 20), CONFIG, Llama)
    with pytest.raises(SizingError, match="of weights, and may hold 268 MB in all"):
        decide(EngineOptions(path="", kv_cache_memory=1 << 20), large, Llama)


def test_what_an_engine_may_take_of_gpus():
    def allowed(*gpus, **options) -> int:
        mesh = SimpleNamespace(devices=np.array([gpus]))
        return allowed_bytes(EngineOptions(path="", **options), mesh)

    assert allowed(FakeGPU(40, 15), FakeGPU(30, 1)) == 25
    assert allowed(FakeGPU(40, 15), kv_cache_memory=7) == 25
    assert allowed(SilentGPU(), kv_cache_memory=7) > 1 << 60
    with pytest.raises(SizingError):
        allowed(SilentGPU())


def test_every_stage_needs_a_layer():
    check_stages(CONFIG.num_layers, CONFIG)
    with pytest.raises(SizingError):
        check_stages(CONFIG.num_layers + 1, CONFIG)


@pytest.mark.parametrize(("factor", "longest"), [(4.0, 2048), (1.5, 768)])
def test_linear_scaling_extends_the_context(factor, longest):
    config = dataclasses.replace(CONFIG, rope_scaling=LinearScaling(factor=factor))
    check_options(EngineOptions(path="", max_model_len=longest), config)
    with pytest.raises(SizingError, match=str(longest)):
        check_options(EngineOptions(path="", max_model_len=longest + 1), config)


def test_dynamic_scaling_does_not_extend_the_context():
    config = dataclasses.replace(CONFIG, rope_scaling=DynamicScaling(factor=4.0))
    with pytest.raises(SizingError, match="512"):
        check_options(EngineOptions(path="", max_model_len=513), config)
