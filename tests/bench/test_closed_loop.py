"""`bench closed-loop`: what HTTP costs is found from short requests."""

from types import SimpleNamespace

import pytest

from bench.closed_loop import Twin, compare, probe, workload
from bench.load.sample import Sample
from llama_jax.config import LlamaConfig
from llama_jax.costs.calibration import Calibration, MeasuredTick, model_sizes
from llama_jax.ring.sizes import RingSizes
from llama_jax.serve.command_line.arguments import DEMO_CHECKPOINT

SIZES = RingSizes(
    num_slots=32,
    num_pages=2048,
    page_size=16,
    pages_per_sequence=64,
    row_buckets=(1, 2, 4, 8),
    chunk_buckets=(0, 64, 128),
    tile=64,
)
SETTINGS = {"rate": 2.0, "requests": 300, "prompt": "100", "answer": "20"}
HOST, FRONT = 0.004, 0.020  # seconds that HTTP takes in this test, from each tick and each request


@pytest.fixture(scope="module")
def twin():
    config = LlamaConfig.from_pretrained(DEMO_CHECKPOINT)
    calibration = Calibration(
        device="cpu",
        mesh="4x2",
        model=model_sizes(config),
        weights="float32",
        kv_cache_dtype="fp32",
        ticks=tuple(
            MeasuredTick(rows, context, chunk, 0, 0.005 + 1e-4 * (rows + chunk))
            for rows, chunk in SIZES.buckets()
            for context in (64, 512)
        ),
        host_seconds_per_tick=0.001,
    )
    programs = SimpleNamespace(config=config)
    loop = SimpleNamespace(sizes=SIZES, executor=SimpleNamespace(programs=programs))
    return Twin(SimpleNamespace(calibration=lambda: calibration, loop=loop))


def served(simulated, front: float) -> list[Sample]:
    """Samples of a client that sees what was simulated, and the front."""
    return [
        Sample(s.at, s.at, events=[s.first + front, s.last + front], output_tokens=s.output_tokens)
        for s in simulated
    ]


def test_what_http_costs_is_found_and_added(twin):
    load = workload(SETTINGS, 1)
    even = probe(0)
    # 4 ticks a token, each with the engine's own work.
    tpots = [sample.tpot for sample in twin.samples(even)]
    assert min(tpots) == pytest.approx(4 * (0.0051 + 0.001), rel=0.05)
    before = twin.host_seconds
    twin.host_seconds += HOST
    truth = twin.samples(even), twin.samples(load)
    twin.host_seconds = before
    twin.add_front([even], served(truth[0], FRONT))
    assert twin.host_seconds == pytest.approx(before + HOST, rel=0.02)
    assert twin.front_seconds == pytest.approx(FRONT, rel=0.05)
    rows = compare(twin.samples(load), served(truth[1], FRONT), twin)
    ratios = {row["figure"]: row["simulated / served"] for row in rows if "served" in row}
    assert len(ratios) == 6
    for figure in ("TTFT p50", "TPOT p50"):
        assert ratios[figure] == pytest.approx(1, abs=0.05)


def test_both_sides_get_the_same_requests():
    load = workload(SETTINGS, 7)
    for sent, simulated in zip(load.to_send(), load.requests(), strict=True):
        assert (sent.at, sent.max_tokens) == (simulated.at, simulated.output_tokens)
        assert len(sent.prompt) == simulated.prompt_tokens
