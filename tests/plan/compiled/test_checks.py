"""A change that adds a collective, a copy of the cache, or 1 % of memory is caught.

The checks are those of `python -m llama_jax.plan --compile`; the programs are small ones for CPU
meshes, where XLA has the same collectives and arguments as on GPUs.
"""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import CPU
from llama_jax.engine.programs import Programs
from llama_jax.model import sampling
from llama_jax.plan.compiled.checks import differences, missed, missed_by_tick
from llama_jax.plan.compiled.deployment import CompiledDeployment, MemoryMap
from llama_jax.plan.compiled.program import CompiledTick, ProgramMemory
from llama_jax.plan.compiled.thunks import read_thunks
from llama_jax.plan.compiled.tick_figures import TickFigures, read_tick
from llama_jax.ring import kv_cache
from llama_jax.ring.sizes import Bucket
from sharding.axes import AXES
from sharding.collectives import psum
from sharding.mesh import make_mesh
from tests.support.programs import CONFIG, SIZES
from tests.support.xla_options import PRODUCTION

FLOAT32 = jnp.dtype(jnp.float32)
DECODE, PREFILL = Bucket(4, 0), Bucket(4, 128)


def make_programs(mesh: str) -> Programs:
    return Programs(replace(CONFIG, dtype="float32"), make_mesh(mesh), SIZES, FLOAT32)


def compile_for_cpu(programs: Programs, bucket: Bucket) -> TickFigures:
    compiled = programs.lowered(bucket).compile(PRODUCTION)
    memory = ProgramMemory.of(compiled)
    tick = CompiledTick(bucket, compiled.as_text(), read_thunks(""), memory, [], 0.0)
    return read_tick(programs, tick, context=64)


@pytest.fixture(scope="module")
def programs() -> Programs:
    return make_programs("2x2")


@pytest.fixture(scope="module")
def tick(programs) -> TickFigures:
    return compile_for_cpu(programs, DECODE)


def deployed(programs: Programs, tick: TickFigures, **changes) -> CompiledDeployment:
    """A deployment on 2 x 2 whose working memory is what a large model's would be: little."""
    memory = MemoryMap(
        weights=tick.arguments.weights, kv_cache=tick.arguments.kv_cache, state=0, results=0,
        temporaries=0,
    )  # fmt: skip
    memory = memory._replace(**changes)
    allowed = round(1.01 * sum(memory))
    deployment = Deployment(programs.config, CPU, Layout(2, 2), "auto")
    return CompiledDeployment(deployment, programs, allowed, [tick], 0, memory)


def test_a_mesh_has_the_collectives_that_it_needs(tick):
    assert missed_by_tick(tick) == []
    assert tick.collectives == tick.expected  # with their groups and bytes
    assert len(tick.expected) == 4


@pytest.mark.parametrize(
    ("mesh", "bucket"),
    [
        pytest.param("1x1", DECODE, marks=pytest.mark.slow),
        pytest.param("2x2", PREFILL, marks=pytest.mark.slow),
        pytest.param("2x1", PREFILL, marks=pytest.mark.slow),
        pytest.param("1x2", PREFILL, marks=pytest.mark.slow),
        pytest.param("1x8", DECODE, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_has_the_collectives_that_it_needs(mesh, bucket):
    programs = make_programs(mesh)
    tick = compile_for_cpu(programs, bucket)
    assert missed_by_tick(tick) == []
    assert tick.collectives == tick.expected  # with their groups and bytes
    assert bool(tick.expected) == (mesh != "1x1")


def test_the_arithmetic_agrees_with_the_compiler_to_the_byte(programs, tick):
    found = differences(deployed(programs, tick))
    assert [found[name].bytes for name in ("weights", "kv_cache")] == [0, 0]


def test_the_arguments_of_a_program_add_up(tick):
    assert sum(tick.arguments) == tick.memory.arguments
    assert min(tick.arguments) > 0


def test_a_collective_too_many_is_caught(monkeypatch):
    def summed(x):
        return psum(jnp.argmax(x, -1).astype(jnp.int32), AXES)

    monkeypatch.setattr(sampling, "greedy", summed)
    found = missed_by_tick(compile_for_cpu(make_programs("2x2"), DECODE))
    assert len(found) == 2  # an all-reduce instead of the all-gather


def test_a_collective_of_wider_numbers_is_caught(tick):
    [first, *rest] = tick.collectives
    wider = replace(tick, collectives=[first._replace(payload=2 * first.payload), *rest])
    assert len(missed_by_tick(wider)) == 1


def test_a_copy_of_the_cache_is_caught(monkeypatch):
    write = kv_cache.write

    def write_or_keep(pages, new, page, offset):
        return jnp.where(jnp.isnan(new).any(), pages, write(pages, new, page, offset))

    monkeypatch.setattr(kv_cache, "write", write_or_keep)
    tick = compile_for_cpu(make_programs("2x2"), DECODE)
    assert tick.copies and len(missed_by_tick(tick)) == 1


def test_one_percent_of_memory_is_caught(programs, tick):
    assert missed(deployed(programs, tick)) == []
    weights, kv_cache_bytes, _ = tick.arguments
    total = weights + kv_cache_bytes
    for changes in (
        {"temporaries": total // 100},
        {"results": total // 100},
        {"weights": weights + weights // 100},
        {"kv_cache": kv_cache_bytes + kv_cache_bytes // 100},
        {"state": total // 50},
    ):
        compiled = deployed(programs, tick, **changes)
        allowed = round(1.01 * total)
        assert len(missed(replace(compiled, allowed=allowed))) == 1, changes


def test_the_cache_that_fits_takes_the_rest(programs, tick):
    compiled = deployed(programs, tick)
    page = compiled.page_bytes
    assert compiled.kv_tokens == SIZES.num_pages * SIZES.page_size
    exact = replace(compiled, allowed=sum(compiled.memory))
    assert exact.fitting_kv_tokens == exact.kv_tokens
    more = replace(compiled, allowed=sum(compiled.memory) + 3 * page)
    assert more.fitting_kv_tokens == exact.kv_tokens + 3 * SIZES.page_size
    assert replace(compiled, allowed=0).fitting_kv_tokens == 0
