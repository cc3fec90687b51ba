"""What the simulation shows: latencies, goodput, and how the engine is used.

The simulation is imported when it runs.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.report import drawing
from llama_jax.plan.report.document import Cell, Plot, Section, Table
from llama_jax.plan.targets import Targets

if TYPE_CHECKING:
    from llama_jax.plan.simulation.figures import Figures
    from llama_jax.plan.simulation.simulated import Simulated

SECONDS = 180.0  # in which requests arrive
SOURCE = "the engine's own scheduler on a logical clock, over the expected times of ticks"


@dataclass(frozen=True)
class Outcome:
    """A simulation and its figures.

    Attributes:
      simulated: every request.
      figures: the sums.
      targets: that they are against.
      load: in words.
    """

    simulated: "Simulated"
    figures: "Figures"
    targets: Targets
    load: str


def tails(outcome: Outcome | None) -> tuple[Figure | None, Figure | None, Figure | None]:
    """TTFT and TPOT that 99 % of the requests keep, and the share inside both targets."""
    if outcome is None:
        return None, None, None
    ttft, tpot = (
        _simulated(spread.p99, "s") if spread else None
        for spread in (outcome.figures.ttft, outcome.figures.tpot)
    )
    return ttft, tpot, _simulated(outcome.figures.inside, "")


def simulate_layout(candidate: Candidate, seconds: float = SECONDS) -> Outcome | None:
    """Simulates one replica of a layout under its share of the load, with Poisson arrivals.

    Args:
      candidate: the layout.
      seconds: in which requests arrive; the simulation ends with the last answer.

    Returns:
      None if the layout cannot hold a request, or does not keep up with the rate.
    """
    from llama_jax.engine.options import EngineOptions
    from llama_jax.plan.simulation.engine import simulate
    from llama_jax.plan.simulation.figures import figures
    from llama_jax.plan.simulation.lengths import Lengths
    from llama_jax.plan.simulation.load import Draw, Load
    from llama_jax.plan.simulation.server import server_for

    replica, layout = candidate.replica, candidate.layout
    workload, targets = replica.workload, replica.targets
    longest = workload.prompt_tokens + workload.output_tokens
    if not candidate.fits or candidate.state().most_live > replica.max_live:
        return None
    options = EngineOptions(
        path="",
        mesh=f"{layout.num_stages}x{layout.num_ranks}",
        max_num_seqs=candidate.max_num_seqs,
        max_model_len=longest,
        max_chunk=replica.max_chunk,
        tpot_slo=targets.tpot,
        ttft_slo=targets.ttft,
    )
    draw = Draw(
        rate=candidate.replica_rate,
        duration=seconds,
        prompt=Lengths.parse(f"{workload.prompt_tokens}"),
        answer=Lengths.parse(f"{workload.output_tokens}"),
    )
    server = server_for(replica.model, options, candidate.memory.cache)
    result = simulate(server, Load(draw.requests()))
    load = f"Poisson arrivals at {candidate.replica_rate:.3g} requests/s for {seconds:g} s"
    return Outcome(result, figures(result, targets), targets, load)


def simulation_section(outcome: Outcome) -> Section:
    """The distributions of the latencies, and how the engine was used."""
    found = outcome.figures
    rows: list[tuple[Cell, ...]] = [
        (name, *(_simulated(value, "s") for value in (s.mean, s.p50, s.p90, s.p99)))
        for name, s in (
            ("time to first token", found.ttft),
            ("time per output token", found.tpot),
            ("queueing", found.queueing),
            ("end to end", found.e2e),
        )
        if s is not None
    ]
    used = (
        ("requests inside both targets", found.inside, ""),
        ("goodput", found.goodput, "requests/s"),
        ("rejected", found.rejected, "requests"),
        ("preemptions", found.preemptions, "times"),
        ("stages busy", 1 - found.bubble, ""),
        ("slots used", found.slots_used, ""),
        ("KV pool in use, mean", found.pool, ""),
        ("KV pool in use, peak", found.pool_peak, ""),
        ("communication share", found.communication, ""),
    )
    return Section(
        "simulation",
        "Simulated requests",
        (
            f"{found.requests:,} requests, {outcome.load}, one replica. TTFT and queueing count "
            "from the arrival; TPOT = (last - first) / (n - 1). The server has the targets as "
            "`--ttft-slo` and `--tpot-slo`.",
        ),
        (
            Table("latencies", ("latency", "mean", "p50", "p90", "p99"), tuple(rows)),
            Table(
                "use",
                ("figure", "found"),
                tuple((name, _simulated(value, unit)) for name, value, unit in used),
            ),
        ),
        tuple(_plots(outcome)),
    )


def _plots(outcome: Outcome) -> list[Plot]:
    done = [s for s in outcome.simulated.samples if s.outcome == "completed"]
    return [
        _plot(name, [value for value in values if value is not None], limit)
        for name, values, limit in (
            ("time to first token", [s.ttft for s in done], outcome.targets.ttft),
            ("time per output token", [s.tpot for s in done], outcome.targets.tpot),
        )
        if any(value is not None for value in values)
    ]


def _plot(name: str, values: list[float], limit: float | None) -> Plot:
    milliseconds = sorted(round(1e3 * value, 3) for value in values)
    limits = {} if limit is None else {"target": round(1e3 * limit, 3)}
    return Plot(
        name.replace(" ", "_"),
        f"Simulated {name}",
        {"milliseconds": milliseconds, "limits_milliseconds": limits},
        drawing.draw(
            f"simulated {name}",
            lambda: drawing.distributions({name: milliseconds}, f"{name} (ms)", limits),
        ),
    )


def _simulated(value: float, unit: str) -> Figure:
    return Figure(Band.exactly(value), unit, Evidence.SIMULATED, SOURCE)
