"""The engine's own work in a tick: scheduling, encoding the packet, matching results to requests.

The call of the program and the wait for its result do not count. On a GPU the host works while the
devices run an earlier tick, and the time matters only where it is longer than theirs; on a CPU it
comes on top.

It grows with what the tick does, so it has three parts: what every tick takes, what each token that
it gives adds, and what each new request adds.
"""

import statistics
from typing import NamedTuple

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.tick_loop import TickLoop

TICKS = 64
REQUESTS = 16
PROMPT = [1, 2, 3]


class HostTime(NamedTuple):
    """Seconds of the host: in every tick, and more for each token and each new request."""

    per_tick: float
    per_token: float
    per_request: float


def host_time(loop: TickLoop, ticks: int = TICKS) -> HostTime:
    """The host's time in a tick, from ticks with one and with all slots in use, and from short
    requests.

    Args:
      loop: of an engine that serves nothing; it serves nothing afterwards.
      ticks: to look at.
    """
    stages, slots = loop.num_stages, loop.sizes.num_slots
    one, all_slots = (_decoding(loop, live, ticks) for live in (1, slots))
    per_token = max(0.0, all_slots - one) * stages / (slots - 1) if slots > 1 else 0.0
    per_tick = max(0.0, one - per_token / stages)
    found = []
    for number in range(REQUESTS):
        before, count = loop.host_seconds, loop.ticks
        _add(loop, -1 - number, answer=1)
        while loop.has_work:
            loop.step()
        own = (loop.ticks - count) * per_tick + per_token
        found.append(loop.host_seconds - before - own)
    return HostTime(per_tick, per_token, max(0.0, statistics.median(found)))


def _decoding(loop: TickLoop, live: int, ticks: int) -> float:
    """The mean over the stages of the median seconds in a tick while so many sequences decode."""
    scheduler, sizes, stages = loop.scheduler, loop.sizes, loop.num_stages
    rounds = -(-ticks // stages)
    longest = sizes.pages_per_sequence * sizes.page_size - len(PROMPT)
    for number in range(live):
        _add(loop, -1 - number, answer=min(longest, rounds + 2 * sizes.num_slots))
    while scheduler.waiting or scheduler.prefilling:
        loop.step()
    found: list[list[float]] = [[] for _ in range(stages)]  # few rows lie in few of the packets
    for _ in range(rounds):
        for each in found:
            before = loop.host_seconds
            loop.step()
            each.append(loop.host_seconds - before)
    for number in range(live):
        scheduler.abort(-1 - number)
    while loop.has_work:
        loop.step()
    return statistics.fmean(map(statistics.median, found))


def _add(loop: TickLoop, number: int, answer: int) -> None:
    """Queues a request with an answer of so many tokens."""
    loop.scheduler.add(
        number,
        PROMPT,
        SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True),
        max_model_len=loop.sizes.pages_per_sequence * loop.sizes.page_size,
        seed=0,
        stop_ids=frozenset(),
    )
