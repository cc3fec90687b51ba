"""Under which conditions what was claimed of the reference deployment holds. Imports no JAX."""

import math

from llama_jax.costs.deployment import Layout
from llama_jax.plan.report.claims import verdict_text
from llama_jax.plan.report.document import Cell, Section, Table
from llama_jax.plan.report.floor import floor_figure
from llama_jax.plan.report.judgement import Limit, Verdict, overall
from llama_jax.plan.report.outlook import Outlook
from llama_jax.plan.report.reference_question import (
    CLAIMED,
    CLAIMED_RATE,
    LAYOUT,
    LENGTHS,
    REQUIRED,
    REQUIRED_RATE,
    TYPICAL,
    outlook,
)
from llama_jax.plan.targets import Targets

# What might make a claim hold: (name, GPU, weights, layout).
VARIANTS = (
    ("4x2, bf16 weights", "h100-sxm", "bf16", Layout(4, 2)),
    ("4x2, fp8 weights", "h100-sxm", "fp8", Layout(4, 2)),
    ("2x4, bf16 weights", "h100-sxm", "bf16", Layout(2, 4)),
    ("1x8, bf16 weights", "h100-sxm", "bf16", Layout(1, 8)),
    ("1x8, fp8 weights", "h100-sxm", "fp8", Layout(1, 8)),
    ("4x2, bf16 weights, 8 × H200", "h200", "bf16", Layout(4, 2)),
)


def alone_section() -> Section:
    """Latencies without any load."""
    rows: list[tuple[Cell, ...]] = []
    for lengths in LENGTHS:
        seen = outlook(lengths)
        rows.append(
            (
                _lengths_text(lengths),
                floor_figure(seen.floor_ttft),
                seen.alone_ttft,
                verdict_text(Limit(CLAIMED.ttft or 0), seen.alone_ttft),
                floor_figure(seen.floor_tpot),
                seen.alone_tpot,
                verdict_text(Limit(CLAIMED.tpot or 0), seen.alone_tpot),
            )
        )
    columns = ("prompt/output", "TTFT floor", "TTFT", "250 ms", "TPOT floor", "TPOT", "25 ms")
    return Section(
        "alone",
        "One request alone",
        (_bandwidth_text(),),
        (Table("alone", columns, tuple(rows)),),
    )


def bandwidth_needed(weights: str) -> tuple[float, float, float]:
    """The shares of the peak bandwidth that the claimed time per token needs.

    Args:
      weights: "bf16", or a name from `quantization.FORMATS`.

    Returns:
      If nothing but reading took time; beside communication and small kernels; and beside these
      and waiting for the host, all as expected.
    """
    seen = outlook(TYPICAL, REQUIRED_RATE, REQUIRED, ("h100-sxm", weights, LAYOUT))
    parts = seen.replica.model.parts(seen.replica.work(1, 0))
    others = LAYOUT.num_stages * (parts["communication"] + parts["small"]).expected
    gap = LAYOUT.num_stages * parts["launch"].expected
    target = CLAIMED.tpot or math.inf
    alone, beside, late = (
        seen.floor_tpot / max(target - taken, 1e-9) for taken in (0.0, others, others + gap)
    )
    return alone, beside, late


def _bandwidth_text() -> str:
    """What the claimed time per token asks of the memory, with each kind of weights."""
    needed = [bandwidth_needed(weights) for weights in ("bf16", "fp8")]
    alone, beside, late = (
        " and ".join(f"{100 * share:.0f} %" for share in shares)
        for shares in zip(*needed, strict=True)
    )
    return (
        f"{1e3 * (CLAIMED.tpot or 0):g} ms per token needs {beside} of the peak bandwidth with "
        "bf16 and fp8 weights: reading must fit beside communication and small kernels. If nothing "
        f"else took time, it would be {alone}; with the expected waiting for the host, {late}."
    )


def workload_section() -> Section:
    """The latencies under each workload at the required and the claimed rate."""
    rows: list[tuple[Cell, ...]] = []
    for lengths in LENGTHS:
        for rate in (REQUIRED_RATE, CLAIMED_RATE):
            seen = outlook(lengths, rate)
            rows.append(
                (
                    f"{_lengths_text(lengths)}, {rate:g}/s",
                    seen.ttft,
                    seen.tpot,
                    str(latency_verdict(seen, REQUIRED)),
                    str(latency_verdict(seen, CLAIMED)),
                    seen.max_rate,
                    f"{seen.candidate.chunk}",
                )
            )
    columns = (
        *("prompt/output, rate", "TTFT, p99", "TPOT, p99", "500/50 ms"),
        *("250/25 ms", "rate up to which 500/50 ms hold", "chunk"),
    )
    return Section(
        "workloads",
        "Under load",
        (
            "`chunk` is the number of prompt tokens in a tick that suits 500/50 ms best, as "
            "expected. Each end of the highest rate has the chunk that suits it.",
        ),
        (Table("workloads", columns, tuple(rows)),),
    )


def cure_section() -> Section:
    """Which change makes the claims hold, by trying each."""
    tables = []
    for targets, rate in ((CLAIMED, CLAIMED_RATE), (REQUIRED, REQUIRED_RATE)):
        rows: list[tuple[Cell, ...]] = []
        for name, gpu, weights, layout in VARIANTS:
            variant = gpu, weights, layout
            seen = [outlook(lengths, rate, targets, variant) for lengths in LENGTHS]
            rows.append((name, *(_cure_text(each, targets) for each in seen)))
        ttft, tpot = (1e3 * (limit or 0) for limit in (targets.ttft, targets.tpot))
        caption = (
            f"{ttft:g} ms to the first token and {tpot:g} ms per token at {rate:g} requests/s:"
        )
        columns = ("deployment", *map(_lengths_text, LENGTHS))
        tables.append(Table(f"at_{rate:g}", columns, tuple(rows), caption))
    return Section(
        "cures",
        "What would make them hold",
        ("Each cell has TTFT/TPOT at the 99th percentile, as expected.",),
        tuple(tables),
    )


def latency_verdict(seen: Outlook, targets: Targets) -> Verdict:
    """Whether both latencies are kept."""
    return overall(
        [
            Limit(limit).judge(figure)
            for limit, figure in ((targets.ttft, seen.ttft), (targets.tpot, seen.tpot))
            if limit is not None
        ]
    )


def _cure_text(seen: Outlook, targets: Targets) -> str:
    verdict = latency_verdict(seen, targets)
    if not seen.sustained:
        return f"{verdict}: overloaded"
    ttft, tpot = seen.ttft.value.expected, seen.tpot.value.expected
    return f"{verdict}: {1e3 * ttft:.0f}/{1e3 * tpot:.0f} ms"


def _lengths_text(lengths: tuple[int, int]) -> str:
    return f"{lengths[0]}/{lengths[1]}"
