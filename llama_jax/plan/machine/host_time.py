"""The engine's own work in a tick: scheduling, encoding the packet, matching results to requests.

The call of the program and the wait for its result do not count. On a GPU the host works while the
devices run an earlier tick, and the time matters only where it is longer than theirs; on a CPU it
comes on top.
"""

import statistics

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.tick_loop import TickLoop

TICKS = 64
PROMPT = [1, 2, 3]


def host_seconds(loop: TickLoop, ticks: int = TICKS) -> float:
    """Seconds of the host in a tick, while all slots decode: the median of some ticks.

    Args:
      loop: of an engine that serves nothing; it serves nothing afterwards.
      ticks: to look at.
    """
    scheduler, sizes = loop.scheduler, loop.sizes
    length = sizes.pages_per_sequence * sizes.page_size
    rounds = -(-ticks // loop.num_stages)
    answer = min(length - len(PROMPT), rounds + 2 * sizes.num_slots)
    params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
    for number in range(sizes.num_slots):
        scheduler.add(
            -1 - number, PROMPT, params,
            max_model_len=length, seed=0, stop_ids=frozenset(),
        )  # fmt: skip
    while scheduler.waiting or scheduler.prefilling:
        loop.step()
    found = []
    for _ in range(ticks):
        before = loop.host_seconds
        loop.step()
        found.append(loop.host_seconds - before)
    for number in range(sizes.num_slots):
        scheduler.abort(-1 - number)
    while loop.has_work:
        loop.step()
    return statistics.median(found)
