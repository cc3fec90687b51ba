"""Ends an engine that hangs: its process lives, but is not heard from any more. Imports no JAX."""

import asyncio

from llama_jax.client.client import EngineClient

CHECK_SECONDS = 1.0


async def end_if_hung(engine: EngineClient, seconds: float) -> None:
    """Waits until the engine has been silent for so long, and for 20 ticks, and kills it.

    Only time in which this process runs counts: when it goes on after Ctrl-Z, or with the whole
    machine, an engine that is well has not been heard from for hours.
    """
    silent = 0.0
    while silent < seconds or engine.responds:
        await asyncio.sleep(CHECK_SECONDS)
        silent = min(silent + CHECK_SECONDS, engine.seconds_since_report)
    engine.end_hung(f"The engine sent no report for {silent:.0f} seconds and was killed.")
