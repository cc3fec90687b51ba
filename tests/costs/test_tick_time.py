"""The time of a tick: against the table itself, and the properties that any model must have."""

import json
from dataclasses import replace
from importlib.resources import files
from itertools import product
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import LlamaConfig, Quantization
from llama_jax.costs.collectives import collectives
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.figure import Evidence
from llama_jax.costs.gpus import CPU, GPUS, find_gpu, gpu_of_device
from llama_jax.costs.kernels import KERNEL_SETS, REFERENCE, Products
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from sharding.errors import UserError

CONFIG_70B, CONFIG_8B = LlamaConfig.llama3_70b(), LlamaConfig.llama3_8b()
H100, H200 = find_gpu("h100-sxm"), find_gpu("h200")
TABLE = json.loads(
    (files("llama_jax.costs") / "data" / "measured_kernels_llama70b.json").read_text()
)


def deployment(config=CONFIG_70B, gpu=H100, mesh=(4, 2), weights=None, kv="bf16", fp8=False):
    if weights:
        config = replace(config, quantization=Quantization(format=weights))
    return Deployment(config, gpu, Layout(*mesh), kv, fp8)


@st.composite
def models(draw):
    gpu = draw(st.sampled_from([*GPUS.values(), CPU]))
    config = draw(st.sampled_from([CONFIG_70B, CONFIG_8B, LlamaConfig.llama3_2_1b()]))
    mesh = draw(st.sampled_from([(1, 1), (4, 2), (2, 4), (3, 1), (1, 8), (1, 16)]))
    weights = draw(st.sampled_from([None, "fp8", "int8", "int4"]))
    kv = draw(st.sampled_from(["bf16", "fp8", "int8", "auto"]))
    return deployment(config, gpu, mesh, weights, kv, draw(st.booleans()))


works = st.builds(
    Work.of,
    rows=st.sampled_from([1, 2, 7, 8, 64, 100, 256]),
    context=st.sampled_from([0, 1, 100, 4096, 100_000]),
    chunk=st.sampled_from([0, 64, 256, 512, 8192, 20_000]),
    prefix=st.sampled_from([0, 64, 5000]),
)


@given(models(), works)
def test_the_bounds_are_in_order_and_above_the_floor(deployment, work):
    model = TickModel(deployment)
    for part in model.parts(work).values():
        assert 0 <= part.low <= part.expected <= part.high
    seconds = model.seconds(work)
    assert 0 < model.floor(work) <= seconds.high
    assert model.expected(work) == pytest.approx(seconds.expected)
    assert seconds.expected == pytest.approx(
        sum(part.expected for part in model.parts(work).values())
    )
    if deployment.gpu.measured_as is None:  # a roofline is never faster than the device
        assert model.floor(work) <= seconds.low


@pytest.mark.parametrize("gpu", [gpu for gpu in GPUS.values() if gpu.measured_as])
@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_attention_is_never_faster_than_the_memory_or_the_arithmetic(gpu, kv):
    """Some measured times of large batches on an H200 are: they cannot be right."""
    for mesh in ((1, 1), (4, 2), (1, 8)):
        attention = TickModel(deployment(CONFIG_8B, gpu, mesh, kv=kv)).attention
        for rows, context in product((1, 8, 64, 256), (100, 2048, 8000, 50_000)):
            keys = rows * context
            least = attention.decode_floor(keys) * (1 - 1e-9)
            assert all(curve.at(context) >= least for curve in attention.decode_curves(rows))
        for pairs in (1e3, 1e6, 1e9, 1e11):
            assert attention.prefill(pairs, 0).low >= attention.prefill_floor(pairs) * (1 - 1e-9)


@given(models(), works, st.floats(1.0, 4.0))
def test_more_bandwidth_never_slows_a_tick(deployment, work, factor):
    faster = replace(deployment.gpu, bandwidth=deployment.gpu.bandwidth * factor)
    before = TickModel(deployment).seconds(work)
    after = TickModel(replace(deployment, gpu=faster)).seconds(work)
    for bound in ("low", "expected", "high"):
        assert getattr(after, bound) <= getattr(before, bound) * (1 + 1e-9)


def test_bandwidth_changes_the_time_of_measured_kernels():
    half = replace(H100, bandwidth=H100.bandwidth / 2)
    work = Work.of(1, 2048)
    before, after = (TickModel(deployment(gpu=gpu)).parts(work) for gpu in (H100, half))
    assert after["products"].expected == pytest.approx(2 * before["products"].expected, rel=0.02)


@given(models(), works, st.integers(0, 300), st.integers(0, 20), st.integers(0, 5000))
def test_time_never_falls_with_more_rows_chunk_or_context(deployment, work, rows, tiles, keys):
    model = TickModel(deployment)
    tiles *= bool(work.chunk) or not deployment.fp8_activations  # which a chunk speeds up
    more = work._replace(
        rows=work.rows + rows,
        chunk=work.chunk + 64 * tiles,
        row_keys=work.row_keys + rows * work.row_keys / work.rows + keys,
        chunk_pairs=work.chunk_pairs + 64 * tiles * keys,
        chunk_keys=work.chunk_keys + tiles * keys,
    )
    few, many = model.seconds(work), model.seconds(more)
    for bound in ("low", "expected", "high"):
        assert getattr(many, bound) >= getattr(few, bound) * (1 - 1e-9)


@pytest.mark.parametrize(("system", "gpu"), [("h100_sxm", H100), ("h200_sxm", H200)])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 64, 2048])
def test_products_of_llama_3_70b_are_those_of_the_table(system, gpu, ranks, rows):
    """A time may be lowered to that of more rows, and never by more than the noise."""
    for of, weights in (("bfloat16", None), ("fp8", "fp8")):
        sums = {}
        for key, times in TABLE["gemm_us"].items():
            on, by, dtype, tp, _ = key.split("|")
            if (on, dtype, tp) == (system, of, f"TP{ranks}"):
                sums[by] = sums.get(by, 0.0) + times[str(rows)]
        low, middle, high = (20 * time * 1e-6 for time in sorted(sums.values()))
        planned = deployment(gpu=gpu, mesh=(4, ranks), weights=weights, fp8=bool(weights))
        model = TickModel(planned)
        found = model.products.time(rows)
        assert found.low <= low * 1.001 and found.high <= high * 1.001
        assert found.expected == pytest.approx(middle, rel=0.1)
        assert model.products.known.evidence is Evidence.MEASURED_ELSEWHERE
        assert model.floor(Work.of(rows, 1000)) <= model.seconds(Work.of(rows, 1000)).low


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("rows", [1.0, 64.0, 2048.0])
def test_a_shape_left_out_of_the_fit_comes_out_near(dtype, rows):
    errors = []
    for system in REFERENCE:
        for kernels in KERNEL_SETS:
            known = Products(system, dtype)
            for shape, times in list(known._measured[kernels].items()):
                del known._measured[kernels][shape]
                known._fitted.clear()
                assert not known.is_measured(shape) or kernels != "vllm"
                found = known.curve(kernels, shape).at(rows)
                errors.append(abs(found / times[rows] - 1))
                known._measured[kernels][shape] = times
    assert len(errors) == 2 * 3 * 16 and median(errors) < 0.1


def test_another_model_is_fitted_and_says_so():
    """SGLang with torch.compile decodes 155.7 tokens/s of the 8B on an H100."""
    model = TickModel(deployment(CONFIG_8B, mesh=(1, 1)))
    assert model.products.known.evidence is Evidence.ARITHMETIC
    assert 1 / model.expected(Work.of(1, 512)) == pytest.approx(155.7, rel=0.15)


def test_every_part_says_how_it_is_known():
    work = Work.of(8, 1000, 256)
    for gpu in GPUS.values():
        model = TickModel(deployment(gpu=gpu))
        figures = model.figures(work)
        assert figures.keys() == model.parts(work).keys()
        assert all(figure.source and figure.unit == "s" for figure in figures.values())
        measured = figures["products"].evidence is Evidence.MEASURED_ELSEWHERE
        assert measured == (gpu in (H100, H200))
        if gpu.measured_as is None:
            assert "roofline" in figures["products"].source


def test_only_ticks_with_a_chunk_multiply_in_fp8():
    plain, multiplied = (TickModel(deployment(weights="fp8", fp8=fp8)) for fp8 in (False, True))
    rows, chunk = Work.of(64, 1000), Work.of(64, 1000, 256)
    assert multiplied.figures(rows) == plain.figures(rows)
    assert multiplied.seconds(rows) == plain.seconds(rows)
    assert multiplied.floor(rows) == plain.floor(rows)
    assert multiplied.seconds(chunk).expected < plain.seconds(chunk).expected
    assert multiplied.floor(chunk) < plain.floor(chunk)
    assert multiplied.figures(chunk)["products"].evidence is Evidence.MEASURED_ELSEWHERE
    assert plain.figures(chunk)["products"].evidence is Evidence.ARITHMETIC
    bfloat16 = TickModel(deployment(fp8=True))  # there is no matrix in fp8
    assert bfloat16.seconds(chunk) == TickModel(deployment()).seconds(chunk)


def test_weights_in_8_bits_save_reading_and_not_arithmetic():
    plain, narrow, multiplied = (
        TickModel(deployment(weights=weights, fp8=fp8)).products
        for weights, fp8 in ((None, False), ("fp8", False), ("fp8", True))
    )
    assert narrow.time(1).low < 0.65 * plain.time(1).low
    assert narrow.time(4096).expected == pytest.approx(plain.time(4096).expected, rel=0.05)
    assert multiplied.time(4096).expected < 0.7 * plain.time(4096).expected


@pytest.mark.parametrize(
    ("mesh", "kinds"),
    [
        ((1, 1), {}),
        ((4, 2), {"all-reduce": 42, "collective-permute": 1, "all-gather": 1}),
        ((8, 1), {"all-reduce": 2, "collective-permute": 1, "all-gather": 1}),
        ((1, 8), {"all-reduce": 161, "all-gather": 1}),
    ],
)
def test_the_collectives_are_those_of_the_ring(mesh, kinds):
    found: dict[str, int] = {}
    for each in collectives(deployment(mesh=mesh), tokens=64, segments=64):
        found[each.kind] = found.get(each.kind, 0) + each.count
    assert found == kinds
    layers = [c for c in collectives(deployment(mesh=(4, 2)), 64, 64) if c.what == "layers"]
    assert [each.bytes for each in layers] == [64 * 8192 * 2]


def test_a_mesh_over_several_hosts_pays_for_the_network():
    """Stages may lie on different hosts; the ranks of a stage do not."""
    near, far = (
        {each.what: each for each in collectives(deployment(mesh=mesh), 64, 64)}
        for mesh in ((2, 4), (4, 4))
    )
    for what, each in near.items():
        ratio = far[what].seconds.expected / far[what].count / (each.seconds.expected / each.count)
        assert ratio == pytest.approx(1) if what == "layers" else ratio > 1.5
        assert (far[what].evidence is Evidence.ASSUMED) == (what != "layers")


def test_the_cache_in_8_bits_halves_long_contexts():
    work = Work.of(64, 8192)
    wide, narrow = (
        TickModel(deployment(kv=kv)).parts(work)["attention"] for kv in ("bf16", "int8")
    )
    assert 0.4 < narrow.expected / wide.expected < 0.85


def test_gpus_have_sources_and_are_found():
    for gpu in GPUS.values():
        assert find_gpu(gpu.name) is gpu
        for figure in ("memory_bytes", "bandwidth", "flops", "link_bandwidth"):
            assert gpu.source_of(figure)
    assert gpu_of_device("NVIDIA H200") is H200
    assert gpu_of_device("NVIDIA H100 80GB HBM3") is H100
    assert gpu_of_device("NVIDIA T1000") is None
    with pytest.raises(UserError, match="h100-sxm"):
        find_gpu("h100")
