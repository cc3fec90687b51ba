"""Ends an engine that hangs: its process lives, but is not heard from any more. Imports no JAX."""

import asyncio
import logging

from llama_jax.client.client import SILENCE_SECONDS, EngineClient

CHECK_SECONDS = 1.0

log = logging.getLogger("llama_jax.client")


async def end_if_hung(engine: EngineClient, seconds: float, level: int = logging.WARNING) -> None:
    """Waits until the engine has been silent for so long, and for 20 ticks, and kills it.

    The log says when it stops answering, and when it answers again. Only time in which this process
    runs counts: when it goes on after Ctrl-Z, or with the whole machine, an engine that is well has
    not been heard from for hours.

    Args:
      engine: the engine.
      seconds: infinity never kills it.
      level: of the lines of the log.
    """
    silent, hangs = 0.0, False
    while silent < seconds or not hangs:
        await asyncio.sleep(CHECK_SECONDS)
        silent = min(silent + CHECK_SECONDS, engine.seconds_since_report)
        hung, hangs = hangs, silent >= SILENCE_SECONDS and not engine.responds
        if hangs and not hung:
            log.log(level, "The engine has sent no report for %.0f s.", silent)
        elif hung and not hangs:
            log.log(level, "The engine answers again.")
    engine.end_hung(f"The engine sent no report for {silent:.0f} seconds and was killed.")
