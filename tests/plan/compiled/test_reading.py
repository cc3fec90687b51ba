"""What is read from programs for a GPU.

`data/gpu_programs` holds two small programs as XLA compiled them for an H100: a lookup, a product,
a scatter into a donated cache, and a loop of products. In `good`, the loop runs four times; in
`broken`, the host must ask the device whether it goes on, and the weight is copied first.
"""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.engine.programs import Programs
from llama_jax.plan.compiled.buffers import Buffer, temporaries
from llama_jax.plan.compiled.ideal_traffic import ideal_traffic
from llama_jax.plan.compiled.thunks import find_dump, read_thunks
from llama_jax.plan.compiled.tick_figures import Sizes, copies, kernels_per_layer, large_arrays
from llama_jax.plan.compiled.traffic import PagedReads, counted_loops, kernels
from llama_jax.ring.gpu_options import CONCURRENT, GROUPED_SCALES
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.steps import state_shapes
from llama_jax.weights.placement import param_shapes
from sharding.compiler_options import GPU_OPTIONS, compiler_options, is_known
from sharding.memory import shard_bytes
from sharding.mesh import make_mesh
from tests.support.hlo import count_ops

PROGRAMS = Path(__file__).parents[2] / "data" / "gpu_programs"
# On one of two ranks: smallest matrix 131,072 bytes, widest activation of 64 rows 65,536.
CONFIG = LlamaConfig(
    vocab_size=64,
    embed_dim=256,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=256,
    mlp_dim=512,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=64,
)
ROWS = Bucket(64, 0)
NOTHING_PAGED = PagedReads({}, 0)
X, HEADS = 64 * 256 * 2, 64 * 128 * 2  # bytes of activations [64, 256] and [64, 128]

# A Pallas kernel reads pages of a cache [16, 1024, 128]; before it, the cache is copied.
OPAQUE = """
ENTRY %main (q: bf16[64,128], pages: bf16[16,1024,128], table: s32[3,4]) -> bf16[64,128] {
  %q = bf16[64,128]{1,0} parameter(0), metadata={op_name="packed"}
  %pages = bf16[16,1024,128]{2,1,0} parameter(1), metadata={op_name="state.cache.keys[0]"}
  %copy.1 = bf16[16,1024,128]{2,1,0} copy(%pages)
  %table = s32[3,4]{1,0} parameter(2), metadata={op_name="packed"}
  ROOT %attention = bf16[64,128]{1,0} custom-call(%q, %copy.1, %table), custom_call_target="m"
}
"""


def program(name: str) -> str:
    return (PROGRAMS / f"{name}.hlo").read_text()


def thunks(name: str):
    return read_thunks((PROGRAMS / f"{name}.thunks.txt").read_text())


def found_in(name: str, bucket: Bucket = ROWS) -> list[str]:
    return large_arrays(kernels(program(name), NOTHING_PAGED, 4), sizes(bucket))


def sizes(bucket: Bucket) -> Sizes:
    mesh = make_mesh("1x2")
    ring = RingSizes(64, 64, 16, 4, (bucket.rows,), (0, bucket.chunk) if bucket.chunk else (0,), 64)
    return Sizes.of(Programs(CONFIG, mesh, ring, jnp.dtype(jnp.bfloat16)), bucket)


def test_bytes_of_each_kernel():
    found = {k.name: (k.read, k.written) for k in kernels(program("good"), NOTHING_PAGED, 100)}
    assert found == {
        "loop_gather_fusion": (X + 64 * 4, X),  # 64 rows of the table, not all 1,024
        "custom-call.3": (X + 512 * 256 * 2, 64 * 512 * 2),
        "wrapped_slice": (HEADS, HEADS),
        "input_scatter_fusion": (HEADS + 64 * 4, HEADS),  # in place: the cache has 1 MB
        "copy.10": (4, 4),
        "loop_convert_fusion": (4 * HEADS, 4 * HEADS),  # four times
        "custom-call.1": (4 * (HEADS + 128 * 128 * 2), 4 * HEADS),
        "loop_add_fusion": (4 * 4, 4 * 4),
        "loop_add_fusion.1": (2 * HEADS, HEADS),
    }


def test_a_loop_of_unknown_length_runs_as_often_as_the_caller_says():
    runs = {k.name: k.runs for k in kernels(program("broken"), NOTHING_PAGED, 7)}
    assert runs["custom-call.1"] == 7 and runs["custom-call.3"] == 1
    assert (counted_loops(program("good")), counted_loops(program("broken"))) == (1, 0)


def test_a_good_program_has_no_large_array_and_no_host_loop():
    assert found_in("good") == []
    assert thunks("good").loops - counted_loops(program("good")) == 0


def test_a_copied_weight_and_a_host_loop_are_caught():
    assert thunks("broken").loops - counted_loops(program("broken")) == 1
    [copied] = found_in("broken")
    assert copied.startswith("wrapped_reverse")
    assert copies(kernels(program("broken"), NOTHING_PAGED, 4), sizes(ROWS)) == [copied]


def test_a_copied_weight_is_caught_although_activations_are_larger():
    chunk = Bucket(64, 4096)
    assert found_in("broken", chunk) and not found_in("good", chunk)


def test_an_opaque_kernel_reads_its_pages_and_a_copy_of_the_cache_is_caught():
    cache = 16 * 1024 * 128 * 2
    copy, attention = kernels(OPAQUE, PagedReads({cache: 1000}, table=4), 1)
    assert (copy.read, copy.written, copy.largest) == (cache, cache, cache)
    assert (attention.read, attention.written) == (HEADS + 3 * 1000 + 3 * 4 * 4, HEADS)
    *_, whole = kernels(OPAQUE, PagedReads({cache: 10**9}, table=4), 1)
    assert whole.read == HEADS + cache + 3 * 4 * 4  # no more than there is
    assert len(large_arrays([copy, attention], sizes(ROWS))) == 1
    assert len(copies([copy, attention], sizes(ROWS)._replace(pages=cache))) == 1


# From jax 0.11 on, XLA may pass such a kernel a view of an array, in a fusion around it.
VIEW = """
%around (p0: bf16[96,128], p1: bf16[16,1024,128], p2: s32[3,4]) -> bf16[64,128] {
  %p0 = bf16[96,128]{1,0} parameter(0)
  %view = bf16[64,128]{1,0} slice(%p0), slice={[0:64], [0:128]}
  %p1 = bf16[16,1024,128]{2,1,0} parameter(1)
  %p2 = s32[3,4]{1,0} parameter(2)
  ROOT %inside = bf16[64,128]{1,0} custom-call(%view, %p1, %p2), custom_call_target="m"
}

ENTRY %main (q: bf16[96,128], pages: bf16[16,1024,128], table: s32[3,4]) -> bf16[64,128] {
  %q = bf16[96,128]{1,0} parameter(0), metadata={op_name="packed"}
  %pages = bf16[16,1024,128]{2,1,0} parameter(1), metadata={op_name="state.cache.keys[0]"}
  %table = s32[3,4]{1,0} parameter(2), metadata={op_name="packed"}
  ROOT %attention = bf16[64,128]{1,0} fusion(%q, %pages, %table), kind=kCustom, calls=%around
}
"""


def test_an_opaque_kernel_that_gets_a_view_reads_no_more():
    cache = 16 * 1024 * 128 * 2
    [attention] = kernels(VIEW, PagedReads({cache: 1000}, table=4), 1)
    assert (attention.read, attention.written) == (HEADS + 3 * 1000 + 3 * 4 * 4, HEADS)


# Instructions outside of fusions, and a loop in a loop.
PLAIN = """
%inner (t: bf16[4,128]) -> bf16[4,128] {
  %t = bf16[4,128]{1,0} parameter(0)
  ROOT %again = bf16[4,128]{1,0} copy(%t)
}

%outer (o: bf16[4,128]) -> bf16[4,128] {
  %o = bf16[4,128]{1,0} parameter(0)
  ROOT %unknown = bf16[4,128]{1,0} while(%o), condition=%c, body=%inner
}

ENTRY %main (w: bf16[64,128], x: bf16[4,128], i: s32[]) -> bf16[4,128] {
  %w = bf16[64,128]{1,0} parameter(0), metadata={op_name="params.layers[0]"}
  %x = bf16[4,128]{1,0} parameter(1), metadata={op_name="packed"}
  %i = s32[] parameter(2), metadata={op_name="packed"}
  %rank = u32[] partition-id()
  %slice = bf16[4,128]{1,0} dynamic-slice(%w, %rank, %rank), dynamic_slice_sizes={4,128}
  %update = bf16[64,128]{1,0} dynamic-update-slice(%w, %x, %i, %i)
  %gather = (bf16[4,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%x), replica_groups={{0,1}}
  %square = bf16[64,128]{1,0} multiply(%w, %w)
  %mixed = bf16[64,128]{1,0} add(%square, %update)
  ROOT %loop = bf16[4,128]{1,0} while(%x), condition=%d, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
}
"""  # noqa: E501


def test_bytes_of_instructions_outside_of_fusions():
    found = {kernel.name: kernel for kernel in kernels(PLAIN, NOTHING_PAGED, 5)}
    x, w, index = 4 * 128 * 2, 64 * 128 * 2, 4
    assert {name: (k.read, k.written) for name, k in found.items()} == {
        "slice": (x + 2 * index, x),
        "update": (x + 2 * index, x),  # in place
        "gather": (x, 8 * x),
        "square": (2 * w, w),
        "mixed": (2 * w, w),
        "again": (15 * x, 15 * x),  # three times five
    }
    assert (found["update"].largest, found["square"].largest) == (0, w)
    # What depends on the rank or on the packet must run in every tick.
    assert [name for name, kernel in found.items() if kernel.only_weights] == ["square"]


ASSIGNMENT = """\
allocation 0: size 4096, parameter 0, shape |bf16[2048]| at ShapeIndex {}:
 value: <3 p.1 @0> (size=4096,offset=0): bf16[2048]{0}
allocation 1: size 8192, preallocated-temp:
 value: <5 fusion.1 @0> (size=2048,offset=0): f32[512]{0}
 value: <6 all-reduce-start{1} @0> (size=8192,offset=0): f32[2048]{0}
"""


def test_temporaries_are_what_is_neither_argument_nor_result():
    assert temporaries(ASSIGNMENT) == [
        Buffer("all-reduce-start", "f32[2048]{0}", 8192),
        Buffer("fusion.1", "f32[512]{0}", 2048),
    ]


GRAPH = """\
001: kPartitionId       [source        | next=002 (1)] kPartitionId
004: kAsyncStart        [prev=002 (1)  | next=016 (3)] stream=communication_stream[0], async_id=4
    003: kAllReduce [source | sink] kAllReduce
000: kCommandBuffer     [prev=001 (3)  | next=016 (2)]\x20
    005: kCopy         [source       | next=006 (1)] kCopy
    006: kCustomKernel [prev=005 (1) | next=011 (5)] fusion grid: [146, 1, 1] threads: [128, 1, 1]
    000: kWhile         [prev=000 (1)  | next=037 (1)]\x20
    condition:
        007: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
015: kAsyncDone         [source        | sink        ] async_id=4
017: kCublasLtMatmul    [prev=016 (1)  | next=000 (1)] kCublasLtMatmul
024: kWhile             [prev=000 (1)  | next=037 (1)]\x20
condition:
    025: kCustomKernel [source | sink] compare grid: [1, 1, 1] threads: [1, 1, 1]
  body:
    000: kCommandBuffer  [prev=027 (1) | next=034 (1)]\x20
        028: kCustomKernel [source       | next=029 (1)] fusion grid: [64, 1, 1]
    034: kCustomCall [prev=000 (1) | sink        ] kCustomCall
"""


def test_thunks():
    """A loop inside a graph does not make the host wait."""
    found = read_thunks(GRAPH)
    assert found == (8, 2, 4, 1, Counter({"all-reduce": 1}))
    assert thunks("good").collectives == Counter()


def test_the_thunks_after_the_passes_are_preferred(tmp_path):
    with pytest.raises(FileNotFoundError):
        find_dump(tmp_path)
    (tmp_path / "module_1.jit_f.thunk_sequence.txt").write_text("before")
    assert find_dump(tmp_path) == "before"
    (tmp_path / "module_1.jit_f.thunk_sequence_after_thunk_passes.txt").write_text("after")
    assert find_dump(tmp_path) == "after"


def test_the_ideal_of_one_rank_of_70b():
    """64 rows of 2,048 tokens on 4 x 2: 20 layers of 855,654,400 parameters, half on each rank."""
    config, mesh = LlamaConfig.llama3_70b(), make_mesh("4x2")
    sizes = RingSizes(256, 30517, 16, 256, (64,), (0,), 64)
    params = param_shapes(config, mesh, jnp.bfloat16)
    cache = state_shapes(config, mesh, sizes, jnp.bfloat16).cache
    ideal = ideal_traffic(config, sizes, ROWS, params, cache, 2, context=2048)
    layers = 20 * (855_654_400 - 2 * 8192 + 2 * 2 * 8192)  # each rank has whole norms
    assert ideal.weights == layers + 2 * (128256 * 8192 // 8 + 8192 + 64 * 8192)
    assert ideal.cache == 40_960 * 64 * (2048 + 1)
    widths = 16 * 8192 + (10240 + 8192 + 3 * 28672)  # written and read, by two ranks
    assert ideal.activations == 64 * (20 * 2 * widths + 2 * 4 * 128256 // 8)


def test_kernels_of_a_layer():
    """Neither collectives, whatever XLA names them, nor what belongs to no layer."""
    text = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="packed"}
  %a = f32[8]{0} copy(%x), metadata={op_name="jit(f)/layer_1/mlp/mul"}
  %b = f32[8]{0} copy(%a), metadata={op_name="jit(f)/layer_1/add"}
  %all-reduce-start = f32[8]{0} all-reduce-start(%b), metadata={op_name="jit(f)/layer_1/psum"}
  %psum.3 = f32[8]{0} all-reduce(%b), metadata={op_name="jit(f)/layer_1/psum"}
  %c = f32[8]{0} copy(%b), metadata={op_name="jit(f)/layer_10/add"}
  %e = f32[8]{0} copy(%c), metadata={op_name="jit(f)/layer_10/add"}
  %psum.4 = f32[8]{0} all-reduce(%e), metadata={op_name="jit(f)/layer_10/psum"}
  %f = f32[8]{0} copy(%b), metadata={op_name="jit(f)/layer_0/add"}
  ROOT %d = f32[8]{0} copy(%c), metadata={op_name="jit(f)/head/mul"}
}
"""
    assert kernels_per_layer(kernels(text, NOTHING_PAGED, 1)) == 2


def test_bytes_of_four_bit_values():
    everywhere = NamedSharding(make_mesh("1x1"), P())
    packed = jax.ShapeDtypeStruct((8, 6), jnp.int4, sharding=everywhere)
    assert shard_bytes(packed) == 24


@pytest.mark.parametrize("name", [*GPU_OPTIONS, *GROUPED_SCALES, *CONCURRENT])
def test_every_compiler_option_is_known(name):
    """To the XLA in use: an unknown option of `XLA_FLAGS` would end the process."""
    assert is_known(make_mesh("1x1"), name, (GPU_OPTIONS | GROUPED_SCALES | CONCURRENT)[name])


def test_unknown_options_are_left_out_and_a_cpu_gets_none():
    assert not is_known(make_mesh("1x1"), "xla_gpu_no_such_option", True)
    assert compiler_options(make_mesh("1x1"), GROUPED_SCALES) == {}


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_a_gpu_gets_the_options_that_its_compiler_knows(platform, monkeypatch):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)]))
    known = "sharding.compiler_options.is_known"
    monkeypatch.setattr(known, lambda mesh, name, value: name != "unknown")
    assert compiler_options(mesh, {"more": 1, "unknown": 2}) == GPU_OPTIONS | {"more": 1}


def test_a_loop_counts_once_among_the_instructions():
    assert count_ops(program("good"))["while"] == 1
