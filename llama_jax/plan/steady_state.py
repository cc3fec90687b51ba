"""A replica under a steady load: how many sequences live, and how long requests take.

Closed formulas over the time of a tick. They stand for what the simulation counts one by one, and
take no time, so that every layout, chunk and rate can be tried. Imports no JAX.

The ring runs one program per tick on all stages, P of them for each token (docs/ring.md):

- A prompt of k chunks enters in k consecutive ticks. While any stage holds a chunk, every stage
  runs the program with a chunk. Prompts arrive at random, one after another through one entrance:
  an M/D/1 queue whose service time is k ticks. The ring runs without a chunk only if the entrance
  has been idle for P - 1 ticks.
- Each sequence gets one token in P ticks. By Little's law, rate x time to answer sequences live.
- An answer takes longer the more prompts arrive meanwhile, a Poisson number. At worst, every tick
  of it has a chunk.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from llama_jax.engine.sizing import GPU_RESULTS_LATE
from llama_jax.plan.targets import Workload
from llama_jax.ring.sizes import TILE
from sharding.stages import round_up

Ticks = Callable[[int, int], float]  # live rows in a packet, chunk tokens → seconds of the tick


@dataclass(frozen=True)
class SteadyState:
    """What one replica does under a steady load. Times are in seconds; infinite where it falls
    behind.

    Attributes:
      live: sequences that decode, on average.
      most_live: those that `inside` of the time are not exceeded.
      decode_tick, chunk_tick: of a tick without and with a chunk, with the rows of `live`.
      chunk_share: of the time in which a chunk is in the ring.
      entrance: share of the time in which a chunk enters.
      mean_tpot: per output token after the first.
      tpot: which `inside` of the requests keep.
      worst_tpot: of a request during which prompts never cease: P ticks, each with a chunk.
      mean_ttft: to the first token.
      ttft: which `inside` of the requests keep.
      overload: why it falls behind: "prompts" arrive faster than they are computed, or more
        "sequences" live than its cache has room for, or than the "limit" of a replica; "" if it
        keeps up.
    """

    live: float
    most_live: int
    decode_tick: float
    chunk_tick: float
    chunk_share: float
    entrance: float
    mean_tpot: float
    tpot: float
    worst_tpot: float
    mean_ttft: float
    ttft: float
    overload: str = ""


def overloaded(why: str) -> SteadyState:
    """The state of a replica that falls behind."""
    endless = math.inf
    return SteadyState(
        endless, 2**31, endless, endless, 1.0, 1.0, endless, endless, endless, endless, endless, why
    )


def steady_state(
    ticks: Ticks,
    num_stages: int,
    load: Workload,
    chunk: int,
    inside: float,
    most_live: int,
    results_late: int = GPU_RESULTS_LATE,
) -> SteadyState:
    """The steady state of a replica.

    Args:
      ticks: the time of a tick.
      num_stages: P.
      load: of this replica alone.
      chunk: C, tokens of the chunks that prompts are cut into.
      inside: the share of the time, and of the requests, that the tails are for.
      most_live: sequences that it can decode at once.
      results_late: ticks that are dispatched ahead, which a new prompt waits for.

    Returns:
      The state; an `overloaded` one if more arrives than it can do.
    """
    chunks = -(-load.prompt_tokens // chunk)
    share_of_chunk = round_up(load.prompt_tokens, TILE) / chunk  # prompts share chunks
    rows = 0
    while True:
        decode, with_chunk = ticks(max(1, rows), 0), ticks(max(1, rows), chunk)
        service = share_of_chunk * with_chunk
        entrance = load.rate * service
        if entrance >= 1:
            return overloaded("prompts")
        drained = math.exp(-load.rate * (num_stages - 1) * with_chunk)
        chunk_share = 1 - (1 - entrance) * drained
        tick = 1 / (chunk_share / with_chunk + (1 - chunk_share) / decode)
        live = load.rate * (load.output_tokens - 1) * num_stages * tick
        if live > most_live:
            return overloaded("sequences")
        needed = math.ceil(live / num_stages)
        if needed <= rows:
            break
        rows = needed
    deviations = NormalDist().inv_cdf(max(inside, 0.5))
    most = math.ceil(live + deviations * math.sqrt(live))
    if most > most_live:
        return overloaded("sequences")
    before = (results_late + 0.5) * tick  # what is left of the one that runs is half of it
    through = (chunks + num_stages - 1) * with_chunk
    worst = num_stages * ticks(max(1, -(-most // num_stages)), chunk)
    # Each prompt brings so many ticks with a chunk, which make the answer longer.
    tokens = max(1, load.output_tokens - 1)
    per_prompt = chunk_share / with_chunk / load.rate * max(0.0, with_chunk - decode)
    prompts = load.rate * tokens * num_stages * tick
    spread = deviations * math.sqrt(prompts) * per_prompt / tokens
    return SteadyState(
        live,
        most,
        decode,
        with_chunk,
        chunk_share,
        entrance,
        num_stages * tick,
        min(worst, num_stages * tick + spread),
        worst,
        before + mean_wait(entrance, service) + through,
        before + tail_wait(entrance, service, 1 - inside) + through,
    )


def mean_wait(utilization: float, service: float) -> float:
    """The mean wait in an M/D/1 queue (Pollaczek and Khinchine)."""
    return utilization * service / (2 * (1 - utilization))


def tail_wait(utilization: float, service: float, share: float) -> float:
    """The wait in an M/D/1 queue that only this share of the arrivals exceeds.

    P(wait > t) is about c exp(-x t / service) (Cramér and Lundberg), where x > 0 solves
    u (exp(x) - 1) = x, and c = (1 - u) / (u exp(x) - 1).
    """
    if utilization <= share or not 0 < utilization < 1:
        return 0.0 if utilization < 1 else math.inf
    low, high = 0.0, 1.0
    while utilization * math.expm1(high) < high:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        if utilization * math.expm1(middle) < middle:
            low = middle
        else:
            high = middle
    decay = (low + high) / 2
    scale = (1 - utilization) / (utilization * math.exp(decay) - 1)
    return max(0.0, math.log(scale / share) / decay) * service
