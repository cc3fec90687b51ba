"""`bench closed-loop`: what HTTP costs is found from a few streams, and holds for other loads."""

from dataclasses import replace

import pytest

from bench import http_cost
from bench.closed_loop import VOCABULARY, Twin, compare, workload
from bench.http_cost import Streams
from bench.load.sample import Sample
from llama_jax.config import LlamaConfig
from llama_jax.costs.calibration import Calibration, MeasuredTick, model_sizes
from llama_jax.ring.sizes import RingSizes
from llama_jax.serve.command_line.arguments import DEMO_CHECKPOINT

SIZES = RingSizes(
    num_slots=32,
    num_pages=4096,
    page_size=16,
    pages_per_sequence=64,
    row_buckets=(1, 2, 4, 8),
    chunk_buckets=(0, 64, 128),
    tile=64,
)
SETTINGS = {"rate": 6.0, "requests": 80, "prompt": "100", "answer": "20"}


@pytest.fixture(scope="module", params=["1x1", "4x2"])
def twin(request):
    """The simulated server, its calibration without HTTP, and the number of stages."""
    config = LlamaConfig.from_pretrained(DEMO_CHECKPOINT)
    stages = int(request.param[0])
    # The engine of one stage has 32 rows in a packet.
    rows = (1, 2, 4, 8, 16, 32) if stages == 1 else (1, 2, 4, 8)
    sizes = replace(SIZES, row_buckets=rows, num_pages=2048)
    calibration = Calibration(
        device="cpu",
        mesh=request.param,
        model=model_sizes(config),
        weights="float32",
        kv_cache_dtype="fp32",
        ticks=tuple(
            MeasuredTick(rows, context, chunk, 0, 0.002 + 1e-4 * (rows + chunk))
            for rows, chunk in sizes.buckets()
            for context in (64, 512)
        ),
        host_seconds_per_tick=0.0003,
        host_seconds_per_token=1e-5,
    )
    return Twin(config, sizes), calibration, stages


def served(simulated) -> list[Sample]:
    """Samples of a client that sees what was simulated."""
    return [
        Sample(s.at, s.at, events=[s.first, s.last], output_tokens=s.output_tokens)
        for s in simulated
    ]


def test_what_http_costs_is_found_and_holds_for_another_load(twin):
    """The truth is a server whose ticks take longer with each token, as on shared cores."""
    simulated, alone, stages = twin
    truth = replace(
        alone, host_seconds_per_tick=0.0012, host_seconds_per_token=3e-4,
        host_seconds_per_request=0.004, front_seconds=0.009,
    )  # fmt: skip
    streams = [
        Streams(load, served(simulated.samples(truth, load)))
        for load in http_cost.loads(1, VOCABULARY)[: len(http_cost.STREAMS)]
    ]
    found = http_cost.with_http(alone, stages, streams, simulated.samples)
    assert found.host_seconds_per_tick == pytest.approx(0.0012, rel=0.05)
    assert found.host_seconds_per_token == pytest.approx(3e-4, rel=0.05)
    assert found.host_seconds_per_request == pytest.approx(0.004, rel=0.2)
    assert found.front_seconds == pytest.approx(0.009, rel=0.2)
    assert {stream.streams for stream in found.streams} == set(http_cost.STREAMS)
    load = workload(SETTINGS, 1)
    real = served(simulated.samples(truth, load))

    def ratios(calibration):
        rows = compare(simulated.samples(calibration, load), real, calibration)
        return {row["figure"]: row["simulated / served"] for row in rows if "served" in row}

    for ratio in ratios(found).values():
        assert ratio == pytest.approx(1, abs=0.05)
    # One time for every tick, however many streams, is what a lone stream would show.
    constant = replace(found, host_seconds_per_token=0.0)
    assert ratios(constant)["TPOT p50"] < ratios(found)["TPOT p50"]


def test_http_takes_nothing_away_from_the_engines_own_time(twin):
    simulated, alone, stages = twin
    fast = replace(alone, host_seconds_per_tick=0.0, host_seconds_per_token=0.0)
    streams = [
        Streams(load, served(simulated.samples(fast, load)))
        for load in http_cost.loads(1, VOCABULARY)[: len(http_cost.STREAMS)]
    ]
    found = http_cost.with_http(alone, stages, streams, simulated.samples)
    assert found.host_seconds_per_tick == alone.host_seconds_per_tick
    assert found.host_seconds_per_token == alone.host_seconds_per_token


def test_both_sides_get_the_same_requests():
    load = workload(SETTINGS, 7)
    for sent, simulated in zip(load.to_send(), load.requests(), strict=True):
        assert (sent.at, sent.max_tokens) == (simulated.at, simulated.output_tokens)
        assert len(sent.prompt) == simulated.prompt_tokens
