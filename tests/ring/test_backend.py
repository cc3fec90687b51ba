"""Which attention the ring runs, where, and for which models."""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.model import Attention, DecoderLayer, Llama, hopper_attention
from llama_jax.model.attention import KEY_BLOCK, QUERY_BLOCK, no_score_mod, no_tap, paged_attention
from llama_jax.ring import backend as backends
from llama_jax.ring import steps
from llama_jax.ring.backend import (
    AUTO,
    FEW_SPLITS,
    GPU_BLOCKS,
    HOPPER,
    PLAIN,
    Backend,
    check_backend,
    choose_backend,
)
from llama_jax.ring.packet import packet_size
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.stage import PagedAttend, locate_tokens
from llama_jax.ring.static_args import StaticArgs
from llama_jax.weights.placement import param_shapes
from sharding.errors import UserError
from sharding.mesh import make_mesh
from sharding.program import MeshProgram
from tests.support.programs import CONFIG, SIZES

BF16 = jnp.bfloat16


class Device(NamedTuple):
    platform: str
    compute_capability: str = ""
    device_kind: str = "a device"
    core_count: int = 132


class FakeMesh:
    def __init__(self, *device):
        self.devices = np.empty((1, 1), object)
        self.devices[0, 0] = Device(*device)


CPU, H100, A100, B200 = (
    FakeMesh(*device) for device in (("cpu",), ("gpu", "9.0"), ("gpu", "8.0"), ("gpu", "10.0"))
)


@pytest.fixture(autouse=True)
def say_again():
    backends._say_once.cache_clear()


@pytest.mark.parametrize(
    ("mesh", "name", "chosen"),
    [
        (CPU, AUTO, Backend(PLAIN)),
        (CPU, PLAIN, Backend(PLAIN)),
        (H100, AUTO, Backend(AUTO, 132, *GPU_BLOCKS, int4_kernel=True)),
        (H100, HOPPER, Backend(HOPPER, 132, *GPU_BLOCKS, int4_kernel=True)),
        (H100, PLAIN, Backend(PLAIN, 0, *GPU_BLOCKS)),
        (A100, AUTO, Backend(PLAIN, 0, *GPU_BLOCKS)),
        (B200, AUTO, Backend(PLAIN, 0, *GPU_BLOCKS)),
    ],
)
def test_the_choice_follows_the_device(mesh, name, chosen):
    assert choose_backend(name, mesh) == choose_backend(chosen, mesh) == chosen


def test_the_meshes_of_this_machine():
    assert choose_backend(AUTO, make_mesh("1x1")) == Backend(PLAIN, 0, KEY_BLOCK, QUERY_BLOCK)


@pytest.mark.parametrize("mesh", [CPU, A100, B200])
def test_the_kernel_where_it_cannot_run_is_refused(mesh):
    with pytest.raises(UserError):
        choose_backend(HOPPER, mesh)


@pytest.mark.parametrize("mesh", [CPU, H100])
def test_an_unknown_name_is_refused(mesh):
    with pytest.raises(UserError, match="must be one of auto, plain, hopper, got 'flash'"):
        choose_backend("flash", mesh)


class Biased(Llama):
    class layer_class(DecoderLayer):
        class attention_class(Attention):
            def score_mod(self, scores, head, query_position, key_position):
                return scores + head


@pytest.mark.parametrize(
    "change",
    [
        {"model_class": Biased},
        {"head_dim": 80},
        {"page_size": 12},
        {"dtype": jnp.float32},
        {"kv_dtype": jnp.float16},
    ],
)
def test_a_model_that_the_kernel_cannot_run_is_refused_only_if_it_was_demanded(change):
    fits = dict(model_class=Llama, head_dim=128, page_size=16, dtype=BF16, kv_dtype=BF16)
    check_backend(HOPPER, H100, **fits)
    check_backend(AUTO, H100, **{**fits, **change})
    with pytest.raises(UserError):
        check_backend(HOPPER, H100, **{**fits, **change})


def shapes(head_dim=128, page_size=16):
    struct = jax.ShapeDtypeStruct
    pages = struct((2, 9, page_size, head_dim), BF16)
    ints = [struct(shape, jnp.int32) for shape in ((3, 4), (3, 1), (3,))]
    return struct((3, 1, 8, head_dim), BF16), pages, pages, *ints


@pytest.fixture
def ran(monkeypatch):
    """What ran: the kernel's arguments, or the keys per iteration of plain attention."""
    found = []

    def kernel(q, *rest, num_cores, **few_splits):
        found.append((HOPPER, len(rest), num_cores, *few_splits.values()))
        return q

    def plain(*args, key_block, query_block):
        found.append((PLAIN, key_block, query_block))
        return paged_attention(*args, key_block=key_block, query_block=query_block)

    def run(backend, score_mod=no_score_mod, chunk=0, **sizes):
        def call(*arrays):
            return backend.attend(plain, Bucket(3, chunk))(*arrays, score_mod, 0)

        jax.eval_shape(call, *shapes(**sizes))
        return found.pop()

    monkeypatch.setattr(hopper_attention, "hopper_attention", kernel)
    return run


def test_what_runs(ran, caplog):
    on_hopper, biased = choose_backend(AUTO, H100), Biased.layer_class.attention_class.score_mod
    assert ran(on_hopper) == (HOPPER, 7, 132)
    usual = Attention.score_mod
    for score_mod in (usual, usual.__get__(object())):  # of the class, or of a layer
        assert ran(on_hopper, score_mod) == (HOPPER, 7, 132)
    assert ran(on_hopper, chunk=64) == (HOPPER, 7, 132, FEW_SPLITS)
    assert not caplog.records
    for _ in range(2):  # each reason is logged once, not in every layer of every program
        assert ran(on_hopper, lambda scores, *_: scores) == (PLAIN, *GPU_BLOCKS)
        assert ran(on_hopper, biased.__get__(object())) == (PLAIN, *GPU_BLOCKS)
        assert ran(on_hopper, page_size=12) == (PLAIN, *GPU_BLOCKS)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert ran(choose_backend(PLAIN, H100)) == (PLAIN, *GPU_BLOCKS)
    assert ran(choose_backend(AUTO, A100)) == (PLAIN, *GPU_BLOCKS)
    assert ran(choose_backend(AUTO, CPU)) == (PLAIN, KEY_BLOCK, QUERY_BLOCK)
    with pytest.raises(UserError):
        ran(choose_backend(HOPPER, H100), head_dim=80)


@pytest.mark.parametrize(
    ("make", "bucket"),
    [
        (steps.decode_step, Bucket(1, 0)),
        (steps.masked_decode_step, Bucket(1, 0)),
        (steps.prefill_step, Bucket(1, 64)),
    ],
)
def test_a_step_runs_the_model_and_the_attention_that_it_is_given(make, bucket):
    """Here they do not go together, which shows as the step is traced."""
    mesh, dtype = make_mesh("1x1"), jnp.dtype(jnp.float32)
    rows_and_chunk = bucket if bucket.chunk else bucket[:1]
    step = make(CONFIG, mesh, SIZES, *rows_and_chunk, Biased, Backend(HOPPER, 132))
    state = steps.state_shapes(CONFIG, mesh, SIZES, dtype)
    packed = jax.ShapeDtypeStruct((packet_size(SIZES, bucket),), jnp.int32)
    masks = [jax.ShapeDtypeStruct((1, 8), jnp.int32)] if make is steps.masked_decode_step else []
    with pytest.raises(UserError, match="its own score_mod"):
        step.lower(param_shapes(CONFIG, mesh, dtype), state, packed, *masks)


@pytest.mark.slow
@pytest.mark.timeout(300, method="thread")
def test_rows_and_tiles_of_a_packet_through_the_kernel(monkeypatch):
    """Both see what plain attention sees: the kernel takes the first position of each segment."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    sizes = RingSizes(4, 20, 16, 6, (3,), (128,), tile=64)
    rng = np.random.default_rng(0)
    segments = np.zeros((5, 3 + 6), np.int32)
    segments[:, 3:] = 20  # no page
    free = iter(rng.permutation(20))
    # Rows at the first and at the last place of a page, and none; a full tile after a prefix, and
    # a part of one.
    for i, (position, length) in enumerate([(0, 1), (31, 1), (0, 0), (17, 64), (0, 33)]):
        pages = -(-(position + length) // 16) if length else 0
        segments[i, 1:3] = position, length
        segments[i, 3 : 3 + pages] = [next(free) for _ in range(pages)]
    q, k, v = (rng.normal(size=(3 + 128, heads, 64)) for heads in (8, 2, 2))
    pools = rng.normal(size=(2, 2, 20, 16, 64))  # the prefixes, and garbage

    def run(backend):
        static = StaticArgs(LlamaConfig.llama3_8b(), sizes, Bucket(3, 128), Llama, backend)

        def attend(segments, pools, q, k, v):
            attend = PagedAttend(static, segments, locate_tokens(static, segments), *pools)
            return attend(q, k, v, score_mod=no_score_mod, tap=no_tap)

        arrays = [jnp.asarray(array, BF16) for array in (pools, q, k, v)]
        mesh_program = MeshProgram(attend, make_mesh("1x1"), P(), P(), name="attend")
        return np.asarray(mesh_program(jnp.asarray(segments), *arrays), np.float32)

    calls = []
    original = hopper_attention.hopper_attention

    def interpreted(*args, num_cores, max_filling_splits):
        calls.append(args[0].shape)
        return original(*args, splits=1, interpret=InterpretGPUParams())

    monkeypatch.setattr(hopper_attention, "hopper_attention", interpreted)
    out, expected = run(Backend(HOPPER, 132)), run(Backend())
    assert calls == [(3, 1, 8, 64), (2, 64, 8, 64)]
    assert np.linalg.norm(out - expected) <= 1e-2 * np.linalg.norm(expected)
    assert not out[2].any()
