"""A report of a plan. Imports no JAX."""

from dataclasses import replace

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.json_text import question_json
from llama_jax.plan.plan import Plan, make_plan
from llama_jax.plan.reasons import verdict
from llama_jax.plan.report.claims import HOW_TO_READ, Claim, claim_table
from llama_jax.plan.report.document import Report, Section, Table
from llama_jax.plan.report.drawing import NO_PLOTS, can_draw
from llama_jax.plan.report.floor import floor_figure
from llama_jax.plan.report.judgement import Limit
from llama_jax.plan.report.outlook import Outlook
from llama_jax.plan.report.sections.alternatives import (
    frontier_section,
    headroom_section,
    why_section,
)
from llama_jax.plan.report.sections.memory import (
    balance_figures,
    memory_section,
    stage_section,
)
from llama_jax.plan.report.sections.promises import assumptions_section, compliance_section
from llama_jax.plan.report.sections.risks import risk_section
from llama_jax.plan.report.sections.server import server_section
from llama_jax.plan.report.sections.simulated import Outcome, simulation_section, tails
from llama_jax.plan.report.sections.ticks import communication_section, tick_section
from llama_jax.plan.report.sections.timeline import timeline_section
from llama_jax.plan.report.utilization import utilization_section

PROMISED = (0.70, 0.85)  # GPU utilization, in the deployment targets


def plan_report(plan: Plan, outcome: Outcome | None, extra: tuple[Section, ...] = ()) -> Report:
    """The whole report.

    Args:
      plan: that is reported.
      outcome: of the simulation of its best layout; None if it was not simulated.
      extra: sections of what else was asked for, such as the compiler's.
    """
    question = plan.question
    title = (
        f"{question.model} on {question.gpus} × {question.gpu.name}: "
        f"{question.workload.prompt_tokens:,} + {question.workload.output_tokens:,} tokens at "
        f"{question.workload.rate:g} requests/s"
    )
    sections = (
        target_section(plan, outcome),
        why_section(plan),
        server_section(plan),
        *detail_sections(plan, _every_layout(plan), outcome, extra),
    )
    text, met = verdict(plan), plan.best.holds
    if outcome is not None and outcome.figures.inside < question.targets.inside:
        met = False
        text += (
            f" Simulated with {outcome.load}, only {outcome.figures.inside:.1%} of the requests "
            f"are inside the targets, and {100 * question.targets.inside:g}% are asked for."
        )
    return Report(title, text, met, sections, question_json(question))


def _every_layout(plan: Plan) -> Plan:
    """All layouts on these GPUs; if only one was asked for, it is the first."""
    if plan.question.layout is None:
        return plan
    free, asked = make_plan(replace(plan.question, layout=None)), plan.best.layout
    return replace(free, candidates=tuple(sorted(free.candidates, key=lambda c: c.layout != asked)))


def target_section(plan: Plan, outcome: Outcome | None) -> Section:
    """Every target of the best layout with floor, found, margin and evidence."""
    seen, targets = Outlook(plan.best), plan.question.targets
    ttft, tpot, inside = tails(outcome)
    claims = [
        Claim(what, found, Limit(limit), None, floor_figure(floor), simulated)
        for what, found, limit, floor, simulated in (
            ("time to first token", seen.ttft, targets.ttft, seen.floor_ttft,
             ttft),
            ("time per output token", seen.tpot, targets.tpot, seen.floor_tpot,
             tpot),
        )
        if limit is not None
    ]  # fmt: skip
    if targets.ttft is not None or targets.tpot is not None:
        claims.append(
            Claim("requests inside both", seen.inside, Limit(targets.inside, True),
                  simulated=inside)
        )  # fmt: skip
    rate = Limit(plan.question.workload.rate, True)
    claims.append(Claim("highest rate within the targets", seen.max_rate, rate))
    claims.append(_memory_claim(plan))
    text = (
        f"The layout is {plan.best.layout}. Latencies are those that "
        f"{100 * targets.inside:g} % of the requests keep.",
        HOW_TO_READ,
    )
    return Section("targets", "Targets", text, (claim_table(claims),))


def detail_sections(
    plan: Plan, every: Plan, outcome: Outcome | None, extra: tuple[Section, ...] = ()
) -> tuple[Section, ...]:
    """Everything about the best layout.

    Args:
      plan: that is reported.
      every: the same question for all layouts.
      outcome: of the simulation; None if there was none.
      extra: as of `plan_report`.
    """
    best = plan.best
    seen = Outlook(best)
    return (
        stage_section(best.deployment),
        memory_section(best, plan.question.targets.memory_share),
        tick_section(best),
        communication_section(best),
        balance_section(plan),
        utilization_section(seen, PROMISED),
        headroom_section(plan),
        simulation_section(outcome) if outcome else _no_simulation(best),
        *extra,
        frontier_section(every),
        timeline_section(best),
        risk_section(plan),
        compliance_section(),
        assumptions_section(_assumptions(plan)),
    )


def balance_section(plan: Plan) -> Section:
    """How far the GPUs differ."""
    shares = balance_figures(plan.best.deployment)
    rows = tuple((what, figure) for what, figure in shares.items())
    text = "The largest difference between two GPUs, as a share of the larger."
    return Section("balance", "Balance", (text,), (Table("balance", ("of", "difference"), rows),))


def _no_simulation(best: Candidate) -> Section:
    text = "The layout does not keep up with the rate, so that there is no steady state to show."
    if not best.fits:
        text = "The layout does not hold the model and a request, so that no server could start."
    return Section("simulation", "Simulated requests", (text,))


def _memory_claim(plan: Plan) -> Claim:
    memory, share = plan.best.memory, plan.question.targets.memory_share
    best = plan.best
    needed = memory.needed(best.kv_needed if best.fits else best.replica.request) / memory.total
    figure = Figure(
        Band.exactly(needed), "", Evidence.ARITHMETIC,
        "weights, temporaries, and the cache that this load fills",
    )  # fmt: skip
    return Claim("memory of each GPU in use", figure, Limit(share) if share else None)


def _assumptions(plan: Plan) -> tuple[tuple[str, str], ...]:
    question = plan.question
    gpu, workload = question.gpu, question.workload
    rows = [
        ("arrivals, for the arithmetic",
         "Poisson, open loop; lengths constant; no prompt begins like another"),
        ("lengths", f"{workload.prompt_tokens:,} prompt and {workload.output_tokens:,} output "
                    "tokens"),
        ("weights", question_json(question)["weights"]),
        ("KV cache", plan.best.deployment.kv_dtype),
        ("memory bandwidth", f"{gpu.bandwidth / 1e12:g} TB/s ({gpu.source_of('bandwidth')})"),
        ("links", f"{gpu.link_bandwidth / 1e9:g} GB/s in each direction"),
        ("sampling", "greedy; other sampling adds a second, small program to a tick"),
    ]  # fmt: skip
    if question.calibration is None:
        rows.append(("times measured on this machine", "none: `--calibrate` writes them"))
    else:
        rows.append(("times measured on this machine", question.calibration.source))
    if not can_draw():
        rows.append(("plots", NO_PLOTS))
    return tuple(rows)
