"""The metrics of the ring: every value of a report is exported."""

from llama_jax.engine.interface import (
    LatencyStats,
    MemoryStats,
    ProgramStats,
    StageStats,
    Stats,
    TickTime,
)
from llama_jax.serve.monitoring.metrics import Metrics
from tests.serve.test_metrics import samples


def exported(stats: Stats) -> dict[str, float]:
    return samples(Metrics("tiny", lambda: stats, lambda: True, "llama_jax").text().decode())


def test_every_value_is_exported():
    found = exported(
        Stats(
            num_waiting=3,
            wait_reason="pages",
            programs=(ProgramStats(4, 0, 11, 1.5), ProgramStats(4, 64, 12, 2.5)),
            stages=(StageStats(1, 2), StageStats(3, 4)),
            memory=(MemoryStats(5, 6), MemoryStats(7, 8)),
            latency=LatencyStats(0.05, 0.5, 256, (TickTime(4, 64, 0.25, 0.125, 3),), 24),
        )
    )
    expected = {
        "program_ticks_total{0}{4}": 11,
        "program_ticks_total{64}{4}": 12,
        "program_tick_seconds_total{0}{4}": 1.5,
        "program_tick_seconds_total{64}{4}": 2.5,
        "stage_rows{0}": 1,
        "stage_rows{1}": 3,
        "stage_chunk_tokens{0}": 2,
        "stage_chunk_tokens{1}": 4,
        "num_requests_waiting_for{slot}": 0,
        "num_requests_waiting_for{pages}": 3,
        "num_requests_waiting_for{prefill}": 0,
        "num_requests_waiting_for{target}": 0,
        "device_memory_bytes{0}": 5,
        "device_memory_bytes{1}": 7,
        "device_memory_limit_bytes{0}": 6,
        "device_memory_limit_bytes{1}": 8,
        "latency_target_seconds{tpot}": 0.05,
        "latency_target_seconds{ttft}": 0.5,
        "chunk_limit_tokens": 256,
        "running_limit_sequences": 24,
        "program_expected_tick_seconds{64}{4}": 0.25,
        "program_modeled_tick_seconds{64}{4}": 0.125,
    }
    assert {name: found[name] for name in expected} == expected


def test_an_engine_that_reports_no_memory_exports_none():
    assert not [name for name in exported(Stats()) if name.startswith("device_memory")]


def test_a_target_that_is_not_set_is_not_exported():
    found = exported(Stats(latency=LatencyStats(ttft=0.5, chunk_limit=64)))
    assert [name for name in found if name.startswith("latency_")] == [
        "latency_target_seconds{ttft}"
    ]
