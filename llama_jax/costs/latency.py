"""What requests see of the ticks: the latencies of one, and the most there can be.

These are means in a steady state, by arithmetic; distributions need the simulation of the
scheduler. Imports no JAX.
"""

from typing import NamedTuple

from llama_jax.costs.figure import Band
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from llama_jax.ring.sizes import TILE
from sharding.stages import round_up


class Latency(NamedTuple):
    """Mean latencies, in seconds.

    Attributes:
      ttft: from the arrival of a request to its first token.
      tpot: for each token after the first.
    """

    ttft: Band
    tpot: Band


def prefill_ticks(num_stages: int, prompt: int, chunk: int) -> int:
    """Ticks to the first token: the chunks follow each other through the stages."""
    return num_stages + -(-prompt // chunk) - 1


def time_to_first_token(
    model: TickModel, prompt: int, chunk: int, rows: int = 1, context: float = 0
) -> Band:
    """Seconds from entering an idle ring to the first token.

    In each tick the slowest stage is the one whose chunk has the longest prefix.

    Args:
      model: of the ticks.
      prompt: its tokens.
      chunk: tokens of each chunk.
      rows: of the program, live or not.
      context: keys that each row attends to.
    """
    ticks = prefill_ticks(model.deployment.layout.num_stages, prompt, chunk)
    last = -(-prompt // chunk) - 1
    size = min(chunk, round_up(prompt, TILE))
    total = Band.exactly(0.0)
    for tick in range(ticks):
        work = Work.of(rows, context, size, min(tick, last) * chunk)
        total += model.seconds(work)
    return total


def time_per_token(model: TickModel, rows: int, context: float) -> Band:
    """Seconds per output token while nothing is prefilled: as many ticks as there are stages.

    Args:
      model: of the ticks.
      rows: in each packet.
      context: keys that each row attends to.
    """
    return model.seconds(Work.of(rows, context)) * model.deployment.layout.num_stages


def decode_rate(model: TickModel, rows: int, context: float) -> Band:
    """Tokens per second of all packets, while nothing is prefilled: a packet leaves in each tick.

    Args:
      model: of the ticks.
      rows: in each packet.
      context: keys that each row attends to.
    """
    return _inverse(model.seconds(Work.of(rows, context))) * rows


def saturated_rate(model: TickModel, prompt: int, output: int, chunk: int, rows: int) -> Band:
    """Requests per second if there are always more than enough.

    Args:
      model: of the ticks.
      prompt, output: tokens of each request.
      chunk: tokens of each chunk; several prompts may share one.
      rows: that each packet has room for.
    """
    chunks = prompt / chunk  # of each request
    if rows * chunks > output:  # a chunk in every tick cannot feed more rows
        rows, share = max(1, round(output / chunks)), 1.0
    else:
        share = rows * chunks / output
    stages = model.deployment.layout.num_stages
    share = 1 - (1 - share) ** stages  # of the ticks in which a stage has a chunk
    context = prompt + output / 2
    alone = Work.of(rows, context)
    before = (prompt - min(prompt, chunk)) / 2
    per_prompt = Work.of(0, 0, min(prompt, chunk), before)
    prompts = max(1.0, chunk / prompt)
    both = alone._replace(
        chunk=chunk,
        chunk_pairs=prompts * per_prompt.chunk_pairs,
        chunk_keys=prompts * per_prompt.chunk_keys,
    )
    tick = model.seconds(both) * share + model.seconds(alone) * (1 - share)
    return _inverse(tick) * (rows / output)


def _inverse(band: Band) -> Band:
    """One over a time: a rate."""
    return Band(1 / band.high, 1 / band.expected, 1 / band.low)
