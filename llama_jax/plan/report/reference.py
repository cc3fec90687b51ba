"""The reference deployment: Llama-3-70B on 8 x H100 as 4 x 2, and what was promised of it.

Every verdict is computed from the tables of GPUs and kernels. Imports no JAX.
"""

import argparse
import math
from dataclasses import replace
from typing import Any

from llama_jax.costs.deployment import Layout
from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.costs.gpus import Gpu, find_gpu
from llama_jax.costs.memory import weight_bytes
from llama_jax.plan.model import find_model, with_weights
from llama_jax.plan.plan import Question, make_plan
from llama_jax.plan.report.build import PROMISED, detail_sections
from llama_jax.plan.report.claims import HOW_TO_READ, Claim, claim_table, verdict_text
from llama_jax.plan.report.document import Cell, Report, Section, Table
from llama_jax.plan.report.floor import floor_figure
from llama_jax.plan.report.judgement import Limit, Verdict, overall
from llama_jax.plan.report.outlook import Outlook
from llama_jax.plan.report.quantities import figure_text
from llama_jax.plan.report.sections.alternatives import why_section
from llama_jax.plan.report.sections.memory import balance_figures, counted
from llama_jax.plan.report.sections.promises import assumptions_section, compliance_section
from llama_jax.plan.report.sections.server import server_section
from llama_jax.plan.report.sections.simulated import Outcome, simulate_plan, tails
from llama_jax.plan.report.utilization import utilization_section
from llama_jax.plan.targets import AVAILABILITY, FAULTS_A_MONTH, RESTART, Targets, Workload

MODEL = "llama3-70b"
LAYOUT = Layout(4, 2)
REQUIRED = Targets(0.5, 0.05, 0.85)
CLAIMED = Targets(0.25, 0.025, 0.85)
REQUIRED_RATE, CLAIMED_RATE = 8.0, 10.0
LENGTHS = ((128, 128), (1024, 256), (2048, 128), (1000, 1000))
TYPICAL = (1024, 256)
CACHE = 20 * 10**9  # bytes of KV cache on each GPU
CLAIMED_WEIGHTS = 17.5e9
SIMULATED_SECONDS = 60.0  # in which requests arrive, in each simulation of the rows
_KEPT = (Verdict.HOLDS, Verdict.LIKELY)

# What might make a claim hold: (name, GPU, weights, layout).
VARIANTS = (
    ("4x2, bf16 weights", "h100-sxm", "bf16", Layout(4, 2)),
    ("4x2, fp8 weights", "h100-sxm", "fp8", Layout(4, 2)),
    ("2x4, bf16 weights", "h100-sxm", "bf16", Layout(2, 4)),
    ("1x8, bf16 weights", "h100-sxm", "bf16", Layout(1, 8)),
    ("1x8, fp8 weights", "h100-sxm", "fp8", Layout(1, 8)),
    ("4x2, bf16 weights, 8 × H200", "h200", "bf16", Layout(4, 2)),
)


def question(
    lengths: tuple[int, int] = TYPICAL,
    rate: float = REQUIRED_RATE,
    targets: Targets = REQUIRED,
    variant: tuple[str, str, Layout] = ("h100-sxm", "bf16", LAYOUT),
) -> Question:
    """Llama-3-70B on 8 GPUs under a load."""
    gpu, weights, layout = variant
    config = with_weights(find_model(MODEL), weights)
    return Question(
        MODEL, config, find_gpu(gpu), layout.gpus, Workload(*lengths, rate), targets, layout=layout
    )


def outlook(*arguments: Any) -> Outlook:
    """What it does; `arguments` are those of `question`."""
    asked = question(*arguments)
    assert asked.layout is not None
    return Outlook(asked.candidate(asked.layout))


def reference_report(details: argparse.Namespace | None = None) -> Report:
    """The reference deployment, row by row.

    The rows are simulated as well, always with the same arrivals.

    Args:
      details: None for the rows alone. With the arguments of a command line, which say how to
        simulate, everything is added that a report says of a layout, with its plots.
    """
    asked = question()
    outcome = simulated(REQUIRED_RATE, REQUIRED, details)
    claims = typical_claims(
        outcome, simulated(CLAIMED_RATE, REQUIRED), simulated(CLAIMED_RATE, CLAIMED)
    )
    rest: tuple[Section, ...]
    if details:
        free = make_plan(replace(asked, layout=None))
        plan = make_plan(asked)
        rest = (
            why_section(free),
            server_section(plan),
            *detail_sections(plan, free, outcome),
        )
    else:
        rest = (
            utilization_section(outlook(), PROMISED),
            compliance_section(),
            assumptions_section(_assumptions(asked.gpu)),
        )
    return Report(
        "Reference deployment: Llama-3-70B on 8 × H100 80 GB, 4 stages × 2 ranks, bf16",
        _verdict_text(claims),
        all(claim.required_verdict in (None, *_KEPT) for claim in claims),
        (
            Section(
                "targets",
                "Targets",
                (f"Latencies are those that {100 * REQUIRED.inside:g} % of the requests keep.",
                 HOW_TO_READ),
                (claim_table(claims),),
            ),
            alone_section(),
            workload_section(),
            cure_section(),
            *rest,
        ),
        {"model": MODEL, "gpu": asked.gpu.name, "layout": str(LAYOUT),
         "bandwidth_bytes_per_second": asked.gpu.bandwidth},
    )  # fmt: skip


def _verdict_text(claims: list[Claim]) -> str:
    """Which requirements are missed and which claims do not hold, with their figures."""
    wrong = [_against(c, c.required) for c in claims if c.required_verdict not in (None, *_KEPT)]
    broken = [_against(c, c.claimed) for c in claims if c.claimed_verdict not in (None, *_KEPT)]
    load = f"{REQUIRED_RATE:g} requests/s of {TYPICAL[0]:,} + {TYPICAL[1]} tokens"
    required = "every requirement holds or is likely to."
    if wrong:
        required = f"these requirements are missed: {'; '.join(wrong)}."
    claimed = "So does every claim."
    if broken:
        claimed = f"These claims do not hold: {'; '.join(broken)}."
    return f"At {load}, {required} {claimed}"


def _against(claim: Claim, limit: Limit | None) -> str:
    """A figure and what it should be: "time per output token, 36.1 ms instead of 25 ms"."""
    found = claim.simulated or claim.found
    bound = Figure(Band.exactly(limit.bound if limit else 0.0), found.unit, found.evidence, "")
    return f"{claim.what}, {figure_text(found)} instead of {figure_text(bound)}"


def simulated(
    rate: float, targets: Targets, details: argparse.Namespace | None = None
) -> Outcome | None:
    """Simulates the typical workload; None if the deployment does not keep up.

    Args:
      rate: requests/s.
      targets: that the scheduler knows.
      details: how to simulate, as the arguments of a command line; None for what the rows need.
    """
    from llama_jax.plan.command_line import make_parser

    if details is None:
        details = make_parser().parse_args(["--duration", f"{SIMULATED_SECONDS:g}s"])
    return simulate_plan(details, make_plan(question(TYPICAL, rate, targets)))


def typical_claims(
    outcome: Outcome | None = None,
    faster: Outcome | None = None,
    claimed: Outcome | None = None,
) -> list[Claim]:
    """Every deployment target under the typical workload at the required rate.

    Args:
      outcome: of its simulation; None if there was none.
      faster: of that at the claimed rate.
      claimed: of that at the claimed rate, with the claimed latencies as targets.
    """
    seen = outlook()
    planned, memory = seen.candidate.deployment, seen.candidate.memory
    weights = sum(weight_bytes(planned).values())
    peak = weights + CACHE + memory.temporaries
    balance = balance_figures(planned)
    ttft, tpot, inside = tails(outcome)
    return [
        Claim("time to first token", seen.ttft, Limit(0.5), Limit(0.25),
              floor_figure(seen.floor_ttft), ttft),
        Claim("time per output token", seen.tpot, Limit(0.05), Limit(0.025),
              floor_figure(seen.floor_tpot), tpot),
        Claim("highest rate within 500 / 50 ms", seen.max_rate, Limit(REQUIRED_RATE, True),
              Limit(CLAIMED_RATE, True)),
        Claim("requests inside 500 / 50 ms", seen.inside, Limit(0.99, True),
              simulated=inside),
        _goodput(REQUIRED_RATE, REQUIRED, outcome, is_required=True),
        _goodput(CLAIMED_RATE, REQUIRED, faster),
        _goodput(CLAIMED_RATE, CLAIMED, claimed),
        Claim("weights per GPU", counted(weights), None, Limit(CLAIMED_WEIGHTS)),
        Claim("room for KV cache per GPU", counted(memory.cache, source="85 % of the memory, less "
              "weights and temporaries"), None, Limit(CACHE, True)),
        Claim("peak memory with 20 GB of cache",
              counted(peak / planned.gpu.memory_bytes, "", "weights + cache + temporaries"),
              Limit(0.85), Limit(68e9 / planned.gpu.memory_bytes)),
        Claim("memory variance across GPUs", balance["memory of weights and cache"], Limit(0.05),
              Limit(0.0)),
        Claim("compute variance across GPUs", balance["layers, and so products and attention"],
              Limit(0.05), Limit(0.0)),
        Claim("communication share", seen.communication, Limit(0.2)),
        Claim("GPU utilization: HBM bandwidth (70–85 % promised)",
              seen.utilization["HBM bandwidth"]),
        Claim(f"faults a month that leave {100 * AVAILABILITY:g} %, at {RESTART:g} s each",
              Figure(Band.exactly(FAULTS_A_MONTH), "faults", Evidence.ARITHMETIC, "30 days × 0.1 % "
              "/ 30 s; one host has no spare: `--outage` shows what a fault does to requests")),
    ]  # fmt: skip


def _goodput(
    rate: float, targets: Targets, outcome: Outcome | None, is_required: bool = False
) -> Claim:
    """The requests/s that are answered inside both latencies, of those that arrive."""
    inside = outlook(TYPICAL, rate, targets).inside
    seen = tails(outcome)[2]
    limit = Limit(targets.inside * rate, True)
    ttft, tpot = (1e3 * (limit or 0) for limit in (targets.ttft, targets.tpot))
    return Claim(
        f"goodput within {ttft:g} / {tpot:g} ms, of {rate:g} requests/s",
        replace(inside, value=inside.value * rate, unit="requests/s"),
        limit if is_required else None,
        None if is_required else limit,
        simulated=seen and replace(seen, value=seen.value * rate, unit="requests/s"),
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


def _assumptions(gpu: Gpu) -> tuple[tuple[str, str], ...]:
    return (
        ("arrivals", "Poisson, open loop, lengths constant, no prompt begins like another"),
        ("memory bandwidth", f"{gpu.bandwidth / 1e12:g} TB/s ({gpu.source_of('bandwidth')})"),
        ("percentile of latencies", f"{100 * REQUIRED.inside:g} %"),
        (
            "simulated",
            f"{SIMULATED_SECONDS:g} s of arrivals, always the same ones, unless a report "
            "says otherwise; other lengths and rates: --simulate",
        ),
        ("sampling", "greedy; other sampling adds a second, small program to a tick"),
        ("measured on these GPUs by this project", "nothing yet: `--calibrate` replaces the table"),
    )
