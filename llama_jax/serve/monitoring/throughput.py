"""A line in the log every few seconds: how fast the engine is, and how full."""

import asyncio
import logging
import time
from collections.abc import Callable

from llama_jax.engine.interface import Stats

log = logging.getLogger("llama_jax.serve")


async def log_throughput(stats: Callable[[], Stats], interval: float) -> None:
    """Writes the line every `interval` seconds while there is something to tell. Never returns."""
    before, since = stats(), time.monotonic()
    told_idle = True
    while True:
        await asyncio.sleep(interval)
        after, now = stats(), time.monotonic()
        idle = _work(before) == _work(after) and not after.num_running + after.num_waiting
        if not (idle and told_idle):  # the first idle interval shows that everything has ended
            log.info(throughput_line(before, after, now - since))
        if after.wait_reason == "target" != before.wait_reason:
            log.warning(
                "%d requests wait though slots are free: with more than the %d that run, output "
                "tokens would take longer than --tpot-slo %g ms.",
                after.num_waiting,
                after.num_running,
                1000 * (after.latency.tpot or 0.0),
            )
        before, since, told_idle = after, now, idle


def throughput_line(before: Stats, after: Stats, seconds: float) -> str:
    """Describes an interval in vLLM's words, for which programs search.

    Args:
      before: the engine's report at its beginning.
      after: the same at its end.
      seconds: its length.
    """
    prompt, cached, generated = (a - b for a, b in zip(_work(after), _work(before), strict=True))
    looked_up = prompt + cached
    return (
        f"Engine 000: Avg prompt throughput: {looked_up / seconds:.1f} tokens/s, "
        f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
        f"Running: {after.num_running} reqs, Waiting: {after.num_waiting} reqs, "
        f"GPU KV cache usage: {100 * after.kv_usage:.1f}%, "
        f"Prefix cache hit rate: {100 * cached / looked_up if looked_up else 0.0:.1f}%"
    )


def _work(stats: Stats) -> tuple[int, int, int]:
    return stats.prompt_tokens, stats.cached_tokens, stats.generation_tokens
