"""What the loss of a GPU does: the engine dies, all that it holds is lost, and it starts again."""

from dataclasses import dataclass

from llama_jax.plan.simulation.figures import is_inside
from llama_jax.plan.simulation.load import Load
from llama_jax.plan.simulation.replicas import simulate
from llama_jax.plan.simulation.server import Server
from llama_jax.plan.simulation.simulated import Simulated
from llama_jax.plan.simulation.simulation import Outage
from llama_jax.plan.targets import AVAILABILITY, MONTH, Targets


@dataclass(frozen=True)
class Failure:
    """A run with an outage, compared with the same run without one.

    Attributes:
      outage: the outage.
      simulated: the run with it.
      lost: requests that were completed without it, and not with it.
      late: requests that were inside the targets without it, completed with it, and not inside.
      settled: seconds from the death until requests that arrive are inside the targets again, as
        far as they were without it.
      availability: share of the requests of a month with one such outage that are completed, at
        the rate of this run.
      outages_allowed: such outages in a month that keep `AVAILABILITY` of the requests; None if
        they lose none.
    """

    outage: Outage
    simulated: Simulated
    lost: int
    late: int
    settled: float
    availability: float
    outages_allowed: int | None


def failure(
    server: Server,
    load: Load,
    replicas: int,
    targets: Targets,
    outage: Outage,
    without: Simulated,
) -> Failure:
    """Runs a load with an outage.

    Args:
      server: of each replica.
      load: an open one, of all replicas.
      replicas: how many; one of them dies.
      targets: the latencies.
      outage: when, how long, and whether clients send again what was lost.
      without: the same load without an outage.
    """
    found = simulate(server, load, replicas, outage)
    lost = late = 0
    settled = 0.0
    for before, after in zip(without.samples, found.samples, strict=True):
        gone = before.outcome == "completed" != after.outcome
        missed = is_inside(before, targets) and not is_inside(after, targets)
        lost += gone
        late += missed and not gone
        if gone or missed:
            settled = max(settled, after.at - outage.at)
    span = max((sample.at for sample in found.samples), default=0.0)
    month = len(found.samples) / span * MONTH if span else 0.0
    return Failure(
        outage=outage,
        simulated=found,
        lost=lost,
        late=late,
        settled=settled,
        availability=1 - lost / month if month else 1.0,
        outages_allowed=int((1 - AVAILABILITY) * month / lost) if lost else None,
    )
