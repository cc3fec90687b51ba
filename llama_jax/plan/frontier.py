"""The frontier of all layouts: speed for each user against throughput of each GPU.

Imports no JAX.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llama_jax.costs.deployment import Layout
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.plan import Plan

# Of the highest rate: in equal factors where few users are, then in equal steps.
SHARES = sorted({2 ** (-step / 2) for step in range(2, 17)} | {n / 24 for n in range(12, 25)})


class Point(NamedTuple):
    """A layout at a rate, as expected.

    Attributes:
      layout: how the model lies on the GPUs.
      chunk: tokens of a chunk.
      rate: requests/s, of all replicas together.
      live: sequences that decode at once, on average, of all replicas together.
      user: output tokens/s for each user: 1 / TPOT.
      gpu: output tokens/s of each GPU.
      ttft: seconds to the first token, on average.
    """

    layout: Layout
    chunk: int
    rate: float
    live: float
    user: float
    gpu: float
    ttft: float


def points(plan: Plan) -> list[Point]:
    """What every layout of a plan does at rates up to its highest, whatever the TPOT.

    There are none for answers of one token, which no user sees grow.
    """
    return [point for candidate in plan.candidates for point in _points(candidate)]


def frontier(found: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both, the fastest for a user first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (-point.user, -point.gpu, point.layout)):
        if not best or point.gpu > best[-1].gpu:
            best.append(point)
    return best


def _points(candidate: Candidate) -> Iterator[Point]:
    """A layout at growing rates, with the chunk that makes each token fastest.

    A chunk only counts if it keeps the TTFT, where that has a target.
    """
    replica, layout = candidate.replica, candidate.layout
    most = replica.max_load()
    if not most or not replica.workload.has_tpot:
        return
    limit = replica.targets.ttft or float("inf")
    for share in SHARES:
        rate = most * share
        states = ((replica.state(rate, chunk), chunk) for chunk in replica.chunks)
        kept = [(state, c) for state, c in states if state.ttft <= limit]
        if kept:
            state, chunk = min(kept, key=lambda entry: entry[0].mean_tpot)
            total = rate * layout.replicas
            yield Point(
                layout,
                chunk,
                total,
                state.live * layout.replicas,
                1 / state.mean_tpot,
                total * replica.workload.output_tokens / layout.gpus,
                state.mean_ttft,
            )
