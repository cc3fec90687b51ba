"""The reference deployment: Llama-3-70B on 8 x H100 as 4 x 2, and what was promised of it.

Every verdict is computed from the tables of GPUs and kernels. Imports no JAX.
"""

import argparse
from dataclasses import replace

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.costs.gpus import Gpu
from llama_jax.costs.memory import weight_bytes
from llama_jax.plan.plan import make_plan
from llama_jax.plan.report.build import PROMISED, detail_sections
from llama_jax.plan.report.claims import HOW_TO_READ, Claim, claim_table
from llama_jax.plan.report.document import Report, Section
from llama_jax.plan.report.floor import floor_figure
from llama_jax.plan.report.judgement import Limit, Verdict
from llama_jax.plan.report.quantities import figure_text
from llama_jax.plan.report.reference_conditions import (
    alone_section,
    cure_section,
    workload_section,
)
from llama_jax.plan.report.reference_question import (
    CLAIMED,
    CLAIMED_RATE,
    LAYOUT,
    MODEL,
    REQUIRED,
    REQUIRED_RATE,
    TYPICAL,
    outlook,
    question,
)
from llama_jax.plan.report.sections.alternatives import why_section
from llama_jax.plan.report.sections.memory import balance_figures, counted
from llama_jax.plan.report.sections.promises import assumptions_section, compliance_section
from llama_jax.plan.report.sections.server import server_section
from llama_jax.plan.report.sections.simulated import Outcome, simulate_plan, tails
from llama_jax.plan.report.utilization import utilization_section
from llama_jax.plan.targets import AVAILABILITY, FAULTS_A_MONTH, RESTART, Targets

CACHE = 20 * 10**9  # bytes of KV cache on each GPU
CLAIMED_WEIGHTS = 17.5e9
SIMULATED_SECONDS = 60.0  # in which requests arrive, in each simulation of the rows
_KEPT = (Verdict.HOLDS, Verdict.LIKELY)


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
