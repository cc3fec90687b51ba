"""The highest rate at which enough requests stay inside both targets, by simulation."""

from dataclasses import dataclass, replace

from llama_jax.plan.simulation.figures import is_inside
from llama_jax.plan.simulation.load import Draw, Load
from llama_jax.plan.simulation.server import Server
from llama_jax.plan.simulation.simulated import Sample
from llama_jax.plan.simulation.simulation import Simulation
from llama_jax.plan.targets import Targets

SEEDS = 3
PRECISION = 0.02  # of the rate
MOST = 1e4  # requests/s


@dataclass(frozen=True)
class HighestRate:
    """The highest rates in requests/s, of all replicas together.

    Attributes:
      rates: found with each seed.
      requests: in each try.
    """

    rates: tuple[float, ...]
    requests: int

    @property
    def middle(self) -> float:
        """The median."""
        return sorted(self.rates)[len(self.rates) // 2]

    @property
    def spread(self) -> float:
        """The greatest less the least, as a share of the median."""
        return (max(self.rates) - min(self.rates)) / self.middle if self.middle else 0.0


def highest_rate(server: Server, draw: Draw, targets: Targets, replicas: int = 1) -> HighestRate:
    """Finds the rate by bisection, once with each of `SEEDS` seeds, from that of `draw` on.

    Every try with a seed has the same lengths and the same gaps, only shorter ones (common random
    numbers). A replica's requests arrive at random like all of them: it is tried alone.

    Args:
      server: one replica.
      draw: the load; its `num_requests` come to one replica in each try, whatever its rate.
      targets: the latencies, and the share of the requests that must be inside them.
      replicas: among which the rate is divided.
    """
    assert draw.num_requests is not None
    rates = [
        replicas * _one(server, replace(draw, seed=draw.seed + seed), targets)
        for seed in range(SEEDS)
    ]
    return HighestRate(tuple(rates), draw.num_requests)


def _one(server: Server, draw: Draw, targets: Targets) -> float:
    low, high = 0.0, draw.rate
    while _holds(server, replace(draw, rate=high), targets):
        low, high = high, 2 * high
        if high > MOST:
            return low
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        if middle < 1e-3:
            return 0.0
        if _holds(server, replace(draw, rate=middle), targets):
            low = middle
        else:
            high = middle
    return low


def _holds(server: Server, draw: Draw, targets: Targets) -> bool:
    """Whether enough requests are inside; ends as soon as too many are not."""
    requests = draw.requests()
    missed = 0

    def enough() -> bool:
        return (len(requests) - missed) / len(requests) >= targets.inside

    def goes_on(sample: Sample) -> bool:
        nonlocal missed
        missed += not is_inside(sample, targets)
        return enough()

    Simulation(server, Load(requests), goes_on=goes_on).run()
    return enough()
