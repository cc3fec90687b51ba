"""What XLA makes of the steps: collectives, copies, and buffers that are reused.

Nothing runs here.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import Quantization
from llama_jax.model import Llama, sampling
from llama_jax.model.controls import CONTROL_WIDTH
from llama_jax.ring import choosing, gpu_options, kv_cache, observation, stage, steps, tick
from llama_jax.ring.backend import AUTO, HOPPER, PLAIN, Backend
from llama_jax.ring.packet import LENGTH
from llama_jax.ring.sizes import Bucket
from llama_jax.ring.static_args import StaticArgs
from llama_jax.weights.placement import placements
from sharding.axes import AXES
from sharding.collectives import pmax, psum
from sharding.mesh import make_mesh
from sharding.mesh_name import parse_mesh
from sharding.ring import ring_tick
from sharding.stages import round_up
from tests.support import programs
from tests.support.hlo import (
    aliased_outputs,
    count_ops,
    large_copies,
    unordered_collectives,
)
from tests.support.programs import SIZES
from tests.support.xla_options import PRODUCTION

LAYERS_PER_STAGE = 2
COLLECTIVES = ("all-reduce", "all-gather", "collective-permute", "reduce-scatter", "all-to-all")
CONFIG = replace(programs.CONFIG, num_layers=4 * LAYERS_PER_STAGE)
# A scatter of one token needs care not to copy the cache (`kv_cache.write`), so (1, 0) is quick.
BUCKETS = [Bucket(1, 0), Bucket(4, 128), pytest.param(Bucket(4, 0), marks=pytest.mark.slow)]


def compile_step(bucket: Bucket, mesh: str) -> jax.stages.Compiled:
    num_stages, _ = parse_mesh(mesh)
    config = replace(CONFIG, num_layers=num_stages * LAYERS_PER_STAGE)
    return programs.compile_step(bucket, mesh, config)


@pytest.mark.parametrize(
    ("weights", "bucket", "backend", "concurrent"),
    [
        (None, Bucket(1, 0), AUTO, True),
        (None, Bucket(64, 0), HOPPER, True),
        (None, Bucket(64, 0), PLAIN, False),
        (None, Bucket(1, 64), AUTO, False),
        ("fp8", Bucket(1, 0), AUTO, True),
        ("fp8", Bucket(2, 0), AUTO, False),
    ],
)
def test_kernels_run_at_the_same_time_only_where_that_is_measured_and_small(
    weights, bucket, backend, concurrent
):
    quantization = Quantization(format=weights) if weights else None
    config = replace(CONFIG, quantization=quantization)
    static = StaticArgs(config, SIZES, bucket, Llama, Backend(backend))
    expected = gpu_options.CONCURRENT if concurrent else {}
    assert gpu_options.graph_options(static) == expected


def test_products_that_xla_may_split():
    def options(weights, bucket):
        quantization = Quantization(format=weights) if weights else None
        return gpu_options.product_options(replace(CONFIG, quantization=quantization), bucket)

    one, several = Bucket(1, 0), Bucket(1, 64)
    assert (options(None, one), options(None, several)) == ({}, gpu_options.UNSPLIT)
    assert (options("fp8", one), options("fp8", several)) == ({}, {})
    assert (options("int4", one), options("int4", several)) == (gpu_options.GROUPED_SCALES,) * 2


def test_the_steps_are_compiled_with_these_options(monkeypatch):
    given = []
    options = "sharding.program.compiler_options"
    monkeypatch.setattr(options, lambda mesh, more: given.append(more) or {})
    config = replace(CONFIG, quantization=Quantization(format="int4"))
    on_hopper = (Llama, Backend(AUTO))
    for make in (steps.decode_step, steps.masked_decode_step):
        make(config, make_mesh("1x1"), SIZES, 1, *on_hopper)
    steps.prefill_step(config, make_mesh("1x1"), SIZES, 1, 64, *on_hopper)
    chunk = StaticArgs(config, SIZES, Bucket(0, 64), *on_hopper)
    observation.observed_step(chunk, make_mesh("1x1"), ())
    grouped, concurrent = gpu_options.GROUPED_SCALES, gpu_options.CONCURRENT
    assert given == [grouped | concurrent] * 2 + [grouped] * 2


def compile_sampling(program: str, mesh: str, vocab_size: int = CONFIG.vocab_size):
    device_mesh = make_mesh(mesh)
    rows, vocab = 4, round_up(vocab_size, device_mesh.size)

    logits = jax.ShapeDtypeStruct(
        (rows, vocab), jnp.float32, sharding=NamedSharding(device_mesh, steps.LOGITS_SPEC)
    )
    chosen = jax.ShapeDtypeStruct((rows,), jnp.int32)
    output = tick.StepOutput(logits, tokens=chosen, slots=chosen)
    tokens = jax.ShapeDtypeStruct((SIZES.num_slots,), jnp.int32)
    controls = jax.ShapeDtypeStruct((rows, CONTROL_WIDTH), jnp.int32)
    if program == "filter":
        return choosing.filter_step(device_mesh).lower(output, controls).compile(PRODUCTION)
    return choosing.sample_step(device_mesh).lower(tokens, output, controls).compile(PRODUCTION)


@pytest.fixture(scope="module", params=BUCKETS, ids=str)
def compiled(request):
    return compile_step(request.param, "4x2")


def bytes_of_one_layers_keys() -> int:
    """On one device of a mesh with two ranks, in float32."""
    return 4 * CONFIG.num_kv_heads // 2 * SIZES.num_pages * SIZES.page_size * CONFIG.head_dim


def collectives(compiled) -> dict[str, int]:
    counts = count_ops(compiled.as_text())
    return {name: counts[name] for name in COLLECTIVES if counts[name]}


def test_budget_of_collectives(compiled):
    # A layer: its attention and its MLP. The vocabulary: embedding and finished hidden state are
    # one all-reduce each, the greedy choice is one all-gather. The ring: one hop.
    assert collectives(compiled) == {
        "all-reduce": 2 * LAYERS_PER_STAGE + 2,
        "all-gather": 1,
        "collective-permute": 1,
    }


def test_each_collective_depends_on_the_previous_one(compiled):
    assert unordered_collectives(compiled.as_text()) == []


@pytest.mark.parametrize(
    "mesh",
    [
        "4x2",
        pytest.param("2x1", marks=pytest.mark.slow),
        pytest.param("1x2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("program", ["sample", "filter"])
def test_each_collective_of_sampling_depends_on_the_previous_one(program, mesh):
    text = compile_sampling(program, mesh).as_text()
    assert count_ops(text)["all-gather"] == 1
    assert count_ops(text)["all-reduce"] >= 2
    assert unordered_collectives(text) == []


def test_candidates_are_not_sorted():
    """XLA turns top_k into a sort of the whole vocabulary if it can merge it with a slice."""
    for mesh in ("1x1", "4x2"):
        text = compile_sampling("filter", mesh, 8000).as_text()
        assert "TopK" in text and count_ops(text)["sort"] == 0


def test_no_branch(compiled):
    assert count_ops(compiled.as_text())["conditional"] == 0


def test_nothing_as_large_as_one_layers_keys_is_copied(compiled):
    assert large_copies(compiled.as_text(), bytes_of_one_layers_keys()) == []
    assert compiled.memory_analysis().temp_size_in_bytes < bytes_of_one_layers_keys()


def test_the_state_is_updated_in_place(compiled):
    state = jax.tree.leaves(steps.state_shapes(CONFIG, make_mesh("4x2"), SIZES, jnp.float32))
    num_params = len(jax.tree.leaves(placements(CONFIG, 4, 2)))
    assert aliased_outputs(compiled.as_text()) == {i: num_params + i for i in range(len(state))}
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == sum(map(bytes_on_a_device, state))
    # Only logits, tokens and slots of the leaving packet are new.
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096


def bytes_on_a_device(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        pytest.param("1x1", {}, marks=pytest.mark.slow),
        ("4x1", {"all-reduce": 2, "all-gather": 1, "collective-permute": 1}),
        ("1x2", {"all-reduce": 2 * LAYERS_PER_STAGE + 1, "all-gather": 1}),
    ],
)
def test_an_axis_of_size_1_issues_no_collective(mesh, expected):
    assert collectives(compile_step(Bucket(4, 0), mesh)) == expected


# --- the checks above can fail ------------------------------------------------------------------


def compile_small_decode_step():
    return programs.compile_step(Bucket(4, 0), "2x2")


def test_a_cache_that_passes_through_a_branch_is_found(monkeypatch):
    def branching(state, entering, sizes, cache, *, run_stage, **functions):
        def clear(x, metadata, cache):
            return x, jax.tree.map(lambda pages: pages.at[:, :, 0].set(0), cache)

        def run_or_clear(x, metadata, cache):
            busy = jnp.any(metadata[:, LENGTH] > 0)
            return lax.cond(busy, run_stage, clear, x, metadata, cache)

        return ring_tick(state, entering, sizes, cache, run_stage=run_or_clear, **functions)

    monkeypatch.setattr(tick, "ring_tick", branching)
    # jaxlib 0.10 copies the cache for it, 0.12 does not: no version may have the branch.
    assert count_ops(compile_small_decode_step().as_text())["conditional"]


def test_independent_collectives_are_found():
    def two(x):
        return psum(x, AXES) + pmax(x * x, AXES)

    mapped = jax.shard_map(two, mesh=make_mesh("4x2"), in_specs=P(AXES), out_specs=P())
    text = jax.jit(mapped).lower(jnp.ones((8, 4))).compile(PRODUCTION).as_text()
    assert len(unordered_collectives(text)) == 1


def copies_in_decode_step() -> list[str]:
    return large_copies(compile_small_decode_step().as_text(), bytes_of_one_layers_keys())


def test_a_second_cache_is_found(monkeypatch):
    write = kv_cache.write

    def write_or_keep(pages, new, page, offset):
        return jnp.where(jnp.isnan(new).any(), pages, write(pages, new, page, offset))

    monkeypatch.setattr(kv_cache, "write", write_or_keep)
    assert copies_in_decode_step()


def test_layers_sliced_out_of_one_array_are_found(monkeypatch):
    """K and V of a layer in one array, as a stacked cache would have them."""
    attention = stage.paged_attention

    def stacked(q, k_pages, v_pages, *rest, **blocks):
        both = lax.optimization_barrier(jnp.stack([k_pages, v_pages]))
        return attention(q, both[0], both[1], *rest, **blocks)

    monkeypatch.setattr(stage, "paged_attention", stacked)
    assert copies_in_decode_step()


def test_one_collective_too_many_is_found(monkeypatch):
    def summed(x):
        return psum(jnp.argmax(x, -1).astype(jnp.int32), AXES)

    monkeypatch.setattr(sampling, "greedy", summed)
    one_layer_per_stage = 2 * 1 + 2
    assert collectives(compile_small_decode_step())["all-reduce"] == one_layer_per_stage + 1


def test_a_state_that_is_not_donated_is_found():
    doubled = jax.jit(lambda x: x * 2).lower(jnp.zeros(8)).compile(PRODUCTION)
    assert aliased_outputs(doubled.as_text()) == {}
