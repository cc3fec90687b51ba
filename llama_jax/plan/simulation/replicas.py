"""Runs a load through several engines, each with its share."""

from dataclasses import fields, replace

from llama_jax.engine.interface import ProgramStats
from llama_jax.plan.simulation.load import Load, Request
from llama_jax.plan.simulation.server import Server
from llama_jax.plan.simulation.simulated import Simulated
from llama_jax.plan.simulation.simulation import Outage, Simulation

_SUMMED = (
    *("busy_seconds", "communication_seconds", "down_seconds", "page_seconds", "preemptions"),
    *("prompt_tokens", "cached_tokens", "generated_tokens", "stage_ticks_busy", "ticks"),
    *("token_slots", "token_slots_used", "replicas"),
)


def simulate(
    server: Server, load: Load, replicas: int = 1, outage: Outage | None = None
) -> Simulated:
    """Runs a load through replicas, to which a router deals the requests in turn.

    If there are several, the router sends none to an engine that is down: the others get in turn
    what would have come to it, and at once what it loses, if clients try again.

    Args:
      server: each of them.
      load: of all together.
      replicas: how many.
      outage: of the first.
    """
    if replicas == 1:
        return Simulation(server, load, outage).run()
    first, *others = load.deal(replicas)
    if outage is None or load.users is not None:
        found = [Simulation(server, first, outage).run()]
        return merged(found + [Simulation(server, other).run() for other in others])
    back = outage.at + outage.seconds
    rerouted = [request for request in first.requests if outage.at <= request.at < back]
    kept = [request for request in first.requests if not outage.at <= request.at < back]
    dying = Simulation(server, replace(first, requests=kept), outage._replace(retry=False))
    found = [dying.run()]
    if outage.retry:
        lost = [kept[n] for n, sample in sorted(dying.samples) if sample.outcome == "failed"]
        again = [request._replace(at=outage.at, since=request.at) for request in lost]
        rerouted = again + rerouted
        answered = tuple(s for s in found[0].samples if s.outcome != "failed")
        found[0] = replace(found[0], samples=answered)
    for number, other in enumerate(others):
        more = rerouted[number :: len(others)]
        requests = sorted([*other.requests, *more], key=_time)
        found.append(Simulation(server, replace(other, requests=requests)).run())
    return merged(found)


def merged(found: list[Simulated]) -> Simulated:
    """One result of several replicas: the counts are summed."""
    first = found[0]
    programs: dict[tuple[int, int], ProgramStats] = {}
    for ran in [program for each in found for program in each.programs]:
        bucket = ran.rows, ran.chunk
        programs[bucket] = programs.get(bucket, ProgramStats(*bucket)).plus(ran.ticks, ran.seconds)
    samples = sorted((sample for each in found for sample in each.samples), key=lambda s: s.at)
    assert set(_SUMMED) < {field.name for field in fields(Simulated)}
    return replace(
        first,
        samples=tuple(samples),
        seconds=max(each.seconds for each in found),
        programs=tuple(programs.values()),
        **{name: sum(getattr(each, name) for each in found) for name in _SUMMED},
    )


def _time(request: Request) -> float:
    return request.at
