"""Ticks corrected by measured ones: exact where measured, and near between them."""

import random
from dataclasses import replace

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.costs.calibration import (
    BadCalibration,
    Calibration,
    MeasuredCollective,
    MeasuredTick,
    model_sizes,
)
from llama_jax.costs.correction import Correction, Example
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.figure import Evidence
from llama_jax.costs.gpus import CPU, find_gpu
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work

TINY = replace(
    LlamaConfig.llama3_70b(),
    vocab_size=1024,
    embed_dim=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    mlp_dim=512,
    dtype="float32",
    eos_token_ids=(),
)
ON_CPU = Deployment(TINY, CPU, Layout(1, 1), "auto")
ON_RING = Deployment(LlamaConfig.llama3_70b(), find_gpu("h100-sxm"), Layout(4, 2))
BATCHES = [
    (rows, context, chunk, prefix)
    for rows in (1, 8, 64)
    for context, prefix in ((128, 0), (2048, 1024))
    for chunk in (0, 64, 256)
]


def calibration(deployment, seconds, batches=BATCHES, **changes):
    """A calibration in which each tick takes what `seconds` says of its work."""
    ticks = [
        MeasuredTick(*batch, seconds(Work.of(*batch)))  # type: ignore[call-arg]
        for batch in batches
    ]
    return replace(
        Calibration(
            device="cpu" if deployment.gpu is CPU else "NVIDIA H100 80GB HBM3",
            mesh=deployment.layout.mesh,
            model=model_sizes(deployment.config),
            weights=deployment.weights,
            kv_cache_dtype=deployment.kv_dtype,
            ticks=tuple(ticks),
            source="a test",
        ),
        **changes,
    )


def cpu_truth(work: Work) -> float:
    """A machine whose ticks are linear in what they compute."""
    return 2e-3 + 3e-5 * work.tokens + 4e-9 * work.row_keys + 2e-8 * work.chunk_pairs


@pytest.mark.parametrize("deployment", [ON_CPU, ON_RING])
def test_a_measured_tick_comes_out_as_measured(deployment):
    found = calibration(deployment, cpu_truth)
    model = TickModel(deployment, found)
    for tick in found.ticks:
        assert model.expected(tick.work) == pytest.approx(tick.seconds)
        seconds = model.seconds(tick.work)
        assert seconds.low < tick.seconds < seconds.high
        parts = model.parts(tick.work).values()
        assert sum(part.expected for part in parts) == pytest.approx(tick.seconds)
        evidence = {figure.evidence for figure in model.figures(tick.work).values()}
        assert evidence == {Evidence.MEASURED_HERE}


def test_ticks_between_are_near():
    """Other rows and contexts than the measured ones, on a CPU without a data sheet."""
    rates = {"copy_bytes_per_second": 1e10, "matrix_flops_per_second": {"float32": 5e10}}
    model = TickModel(ON_CPU, calibration(ON_CPU, cpu_truth, **rates))
    for batch in [(4, 128, 0, 0), (32, 500, 0, 0), (16, 1024, 64, 512), (8, 256, 128, 0)]:
        work = Work.of(*batch)
        assert model.expected(work) == pytest.approx(cpu_truth(work), rel=0.1)


def test_a_cpu_is_as_fast_as_it_was_measured_and_a_gpu_as_its_data_sheet():
    """Measured rates are those of kernels at best: 90 % of the peak of a CPU."""
    rates = {"copy_bytes_per_second": 1e10, "matrix_flops_per_second": {"float32": 5e10}}
    cpu = TickModel(ON_CPU, calibration(ON_CPU, cpu_truth, **rates))
    keys = 2 * 4 * 4 * 32 * 4  # bytes: 4 layers of 4 heads of 32 numbers in float32
    assert cpu.attention.decode_floor(1000) == pytest.approx(1000 * keys * 0.9 / 1e10)
    flop = 4 * 4 * 8 * 32 * 1000
    assert cpu.attention.prefill_floor(1000) == pytest.approx(flop * 0.9 / 5e10)
    gpu, work = TickModel(ON_RING, calibration(ON_RING, cpu_truth, **rates)), Work.of(8, 1000)
    assert gpu.floor(work) == TickModel(ON_RING).floor(work)


def test_a_gpu_that_is_slower_by_a_factor_is_found_out():
    plain = TickModel(ON_RING)
    slower = TickModel(ON_RING, calibration(ON_RING, lambda work: 1.3 * plain.expected(work)))
    work = Work.of(100, 700, 512, 300)
    assert slower.expected(work) == pytest.approx(1.3 * plain.expected(work), rel=0.05)


def test_noise_makes_no_tick_shorter_by_15_percent_with_more_rows():
    noise = random.Random(0)
    plain = TickModel(ON_RING)
    noisy = calibration(ON_RING, lambda work: noise.uniform(0.96, 1.04) * plain.expected(work))
    model = TickModel(ON_RING, noisy)
    times = [model.expected(Work.of(rows, 512)) for rows in range(1, 129)]
    assert all(
        later > 0.85 * most
        for later, most in zip(times[1:], (max(times[:n]) for n in range(1, 128)), strict=True)
    )


def test_collectives_are_added_to_the_ticks_of_a_rank_alone():
    plain = TickModel(ON_RING)
    alone = calibration(ON_RING, cpu_truth, with_collectives=False)
    model = TickModel(ON_RING, alone)
    work = alone.ticks[0].work
    added = plain.parts(work)["communication"].expected
    assert added > 0
    assert model.parts(work)["communication"].expected == pytest.approx(added)
    assert model.expected(work) == pytest.approx(cpu_truth(work) + added)
    parts = model.parts(work).values()
    assert sum(part.expected for part in parts) == pytest.approx(model.expected(work))
    band, sent = model.seconds(work), plain.parts(work)["communication"]
    doubt = 1 - (band.low - sent.low) / cpu_truth(work)
    assert 0.03 <= doubt < 0.5
    assert band.high == pytest.approx((1 + doubt) * cpu_truth(work) + sent.high)
    measured = replace(
        alone,
        collectives=tuple(
            MeasuredCollective("all_reduce", ranks, size, 50e-6)
            for ranks in (2, 4)
            for size in (16, 1 << 30)
        ),
    )
    slow = TickModel(ON_RING, measured)
    layers = next(each for each in slow.collectives(work) if each.what == "layers")
    assert layers.seconds.expected == pytest.approx(40 * 50e-6)
    known = {each.what: each.evidence is Evidence.MEASURED_HERE for each in slow.collectives(work)}
    assert known["layers"] and known["finished"] and not known["embedding"]  # of 2, 4 and 8 ranks


def test_what_remains_is_interpolated_by_the_inverse_squared_distance_in_doublings():
    """Ticks of the same program if there are any; else those of the nearest sizes."""
    works = [Work(1, 0, 3), Work(1, 0, 63), Work(3, 0, 15), Work(15, 0, 15), Work(0, 1, 0, 3)]
    works.append(Work(0, 1, 0, 63))
    times = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    found = Correction([Example(work, (1.0,), t) for work, t in zip(works, times, strict=True)])
    assert found.seconds(Work(1, 0, 15), (1.0,)) == pytest.approx(1.5)  # halfway
    assert found.seconds(Work(0, 1, 0, 15), (1.0,)) == pytest.approx(5.5)
    squares = (4 + 4, 4 + 4, 1, 1, 9 + 1 + 16 + 4, 9 + 1 + 16 + 36)  # rows, chunk, keys, pairs
    mean = sum(t / s for t, s in zip(times, squares, strict=True)) / sum(1 / s for s in squares)
    assert found.seconds(Work(7, 0, 15), (1.0,)) == pytest.approx(mean)


def test_the_doubt_is_the_median_error_of_ticks_left_out():
    works = [Work(1, 0, 3), Work(1, 0, 15), Work(1, 0, 63)]  # two doublings apart

    def doubt(*times: float) -> float:
        return Correction(
            [Example(work, (1.0,), t) for work, t in zip(works, times, strict=False)]
        ).doubt

    # Without the last, it is (1.0 / 16 + 1.2 / 4) / (5 / 16) = 1.16; without the second, itself.
    assert doubt(1.0, 1.2, 1.4) == pytest.approx(1 - 1.16 / 1.4)
    assert (doubt(1.0), doubt(1.0, 10.0)) == (0.03, 0.5)


def test_no_part_gets_a_negative_factor():
    examples = [Example(Work(1, 0, n), (1.0, float(n)), 3.0 - n) for n in range(3)]
    assert Correction(examples).seconds(Work(1, 0, 2), (1.0, 100.0)) > 0


def test_one_tick_is_enough():
    model = TickModel(ON_CPU, calibration(ON_CPU, cpu_truth, BATCHES[:1]))
    assert model.expected(Work.of(1, 128)) == pytest.approx(cpu_truth(Work.of(1, 128)))


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": "1x1"},
        {"weights": "fp8"},
        {"kv_cache_dtype": "int8"},
        {"device": "NVIDIA H200"},
        {"model": model_sizes(LlamaConfig.llama3_8b())},
    ],
)
def test_a_calibration_of_something_else_is_refused(changes):
    with pytest.raises(BadCalibration):
        TickModel(ON_RING, replace(calibration(ON_RING, cpu_truth), **changes))
