"""The metrics of the ring: its programs, its stages, its queue and its devices' memory.

They come from the engine's latest report, and their names are this project's own.
"""

from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llama_jax.engine.interface import Stats, WaitReason


def ring_families(prefix: str, labels: Mapping[str, str], stats: Stats) -> Iterator[Metric]:
    """Yields the metrics of the ring.

    Args:
      prefix: metrics are named `prefix:name`.
      labels: the labels that every metric has.
      stats: the engine's report.
    """
    kind: type[CounterMetricFamily | GaugeMetricFamily]
    for name, about, kind, own, samples in (
        (
            "program_ticks",
            "Ticks by program.",
            CounterMetricFamily,
            ("rows", "chunk"),
            [((p.rows, p.chunk), p.ticks) for p in stats.programs],
        ),
        (
            "program_tick_seconds",
            "Time spent in ticks by program.",
            CounterMetricFamily,
            ("rows", "chunk"),
            [((p.rows, p.chunk), p.seconds) for p in stats.programs],
        ),
        (
            "stage_rows",
            "Decode rows at a stage.",
            GaugeMetricFamily,
            ("stage",),
            [((i,), stage.rows) for i, stage in enumerate(stats.stages)],
        ),
        (
            "stage_chunk_tokens",
            "Prompt tokens at a stage.",
            GaugeMetricFamily,
            ("stage",),
            [((i,), stage.chunk_tokens) for i, stage in enumerate(stats.stages)],
        ),
        (
            "num_requests_waiting_for",
            "Sequences in the queue by what the next of them waits for.",
            GaugeMetricFamily,
            ("reason",),
            [
                ((reason,), stats.num_waiting if reason == stats.wait_reason else 0)
                for reason in get_args(WaitReason)
            ],
        ),
        (
            "queue_tokens",
            "Tokens of the sequences in the queue.",
            GaugeMetricFamily,
            (),
            [((), stats.queue_tokens)],
        ),
        (
            "kv_pages_cached",
            "Free KV-cache pages that hold a known text.",
            GaugeMetricFamily,
            (),
            [((), stats.pages_cached)],
        ),
        (
            "device_memory_bytes",
            "Memory in use on a device.",
            GaugeMetricFamily,
            ("device",),
            [((i,), memory.in_use) for i, memory in enumerate(stats.memory)],
        ),
        (
            "device_memory_limit_bytes",
            "Memory that may be used on a device.",
            GaugeMetricFamily,
            ("device",),
            [((i,), memory.limit) for i, memory in enumerate(stats.memory)],
        ),
        (
            "latency_target_seconds",
            "Latency targets that are set: per output token (tpot), to the first token (ttft).",
            GaugeMetricFamily,
            ("target",),
            [
                ((name,), seconds)
                for name, seconds in (("tpot", stats.latency.tpot), ("ttft", stats.latency.ttft))
                if seconds is not None
            ],
        ),
        (
            "chunk_limit_tokens",
            "Prompt tokens of the largest chunk that may enter now.",
            GaugeMetricFamily,
            (),
            [((), stats.latency.chunk_limit)],
        ),
        (
            "running_limit_sequences",
            "Sequences that may run at once now: slots, or fewer by the target per output token.",
            GaugeMetricFamily,
            (),
            [((), stats.latency.most_running)],
        ),
        (
            "program_expected_tick_seconds",
            "Time of a tick by program, without context, corrected by the ticks that were seen.",
            GaugeMetricFamily,
            ("rows", "chunk"),
            [((t.rows, t.chunk), t.seconds) for t in stats.latency.ticks],
        ),
        (
            "program_modeled_tick_seconds",
            "The same before it was corrected.",
            GaugeMetricFamily,
            ("rows", "chunk"),
            [((t.rows, t.chunk), t.modeled) for t in stats.latency.ticks],
        ),
    ):
        family = kind(f"{prefix}:{name}", about, labels=[*labels, *own])
        for values, count in samples:
            family.add_metric([*labels.values(), *map(str, values)], count)
        yield family
