"""The server's process, from its command line to its exit code."""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop
from rich.console import Console

from llama_jax.client.client import EngineClient
from llama_jax.client.engine_process import ENGINE_COMMAND
from llama_jax.config import ConfigError
from llama_jax.config.huggingface import generation_defaults
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import EngineDead, EngineStartError
from llama_jax.engine.options import EngineOptions
from llama_jax.serve.app import create_app
from llama_jax.serve.arguments import (
    DEMO_CHECKPOINT,
    DEMO_NAME,
    engine_options,
    parse_arguments,
)
from llama_jax.serve.frontend import Frontend
from llama_jax.serve.http_server import (
    HttpServer,
    ListenError,
    address_of,
    is_loopback,
    listen,
)
from llama_jax.serve.interrupt import Interrupted, unless
from llama_jax.serve.metrics import Metrics
from llama_jax.serve.middleware import Door
from llama_jax.serve.ready import show_ready
from llama_jax.terminal.progress import TerminalDisplay
from llama_jax.text.tokenizer import Tokenizer, TokenizerError
from sharding.errors import UserError


class CheckpointMissing(UserError):
    """There is nothing to serve where the user said; the message is one sentence."""


@dataclass(frozen=True)
class Site:
    """What is served and where: all that was checked before the engine is started."""

    arguments: argparse.Namespace
    options: EngineOptions
    model: str
    tokenizer: Tokenizer
    defaults: SamplingParams
    listener: socket.socket


def main(argv: list[str] | None = None, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serves until SIGTERM or SIGINT.

    Args:
      argv: the command line; None for that of this process.
      engine_command: the program that is the engine.

    Returns:
      The exit code: 0 if the server was told to end, 1 if it could not start or its engine died,
      after one sentence on standard error.
    """
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    console = Console()
    try:
        site = _prepare(arguments)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(site, engine_command, console))
    except (
        CheckpointMissing,
        ConfigError,
        TokenizerError,
        ListenError,
        EngineStartError,
        EngineDead,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before there was anything to end
        return 128 + signal.SIGINT
    return 0


def _prepare(arguments: argparse.Namespace) -> Site:
    """Checks what can be checked in a second or two, cheapest first.

    Raises:
      CheckpointMissing, ConfigError, TokenizerError, ListenError: one sentence.
    """
    path, name = _find_checkpoint(arguments.path)
    defaults = generation_defaults(path)
    tokenizer = Tokenizer(path)
    return Site(
        arguments=arguments,
        options=engine_options(arguments, path),
        model=arguments.served_model_name or name,
        tokenizer=tokenizer,
        defaults=defaults,
        listener=listen(arguments.host, arguments.port),
    )


def _find_checkpoint(path: Path | None) -> tuple[Path, str]:
    """The directory to serve, and what to call it."""
    if path is None:
        if not DEMO_CHECKPOINT.is_dir():
            raise CheckpointMissing(
                "No checkpoint was named, and the demo checkpoint is not beside this package: give "
                "the path of one."
            )
        return DEMO_CHECKPOINT, DEMO_NAME
    if not path.is_dir():
        raise CheckpointMissing(
            f"There is no directory {path}: give that of a checkpoint on this machine (nothing is "
            "downloaded)."
        )
    return path, path.resolve().name


async def _serve(site: Site, engine_command: Sequence[str], console: Console) -> None:
    """Starts the engine, serves, and ends when told to.

    Raises:
      EngineStartError: the engine cannot start.
      EngineDead: it died; every request has been answered, with an error.
    """
    started = time.perf_counter()
    stop = StopSignals()
    door = Door(site.arguments.api_key)
    server = HttpServer(door, site.listener)
    async with server.running():  # from now on somebody answers, if only that there is a start
        try:
            with TerminalDisplay(console) as display:
                start = EngineClient.start(
                    site.options,
                    lambda step: display.update(step.title, step.done, step.total, step.detail),
                    command=engine_command,
                )
                engine = await unless(stop.asked.wait(), start)
        except Interrupted:
            return
        try:
            frontend = _frontend(site, engine)
            door.open(create_app(frontend))
            _show_ready(site, engine, time.perf_counter() - started, console)
            try:
                reason = await unless(stop.asked.wait(), engine.wait_dead())
            except Interrupted:
                frontend.draining = True
                await _drain(server, stop, site.arguments.shutdown_timeout, console)
            else:
                raise EngineDead(reason)
        finally:
            if stop.repeated.is_set():
                engine.kill()
            # Whoever still waits for an answer gets an error now, before the connections close.
            await engine.close()


class StopSignals:
    """SIGTERM and SIGINT: the first asks for an orderly end, the next for one at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.repeated = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._received)

    def _received(self) -> None:
        (self.repeated if self.asked.is_set() else self.asked).set()


async def _drain(server: HttpServer, stop: StopSignals, seconds: float, console: Console) -> None:
    """Waits until all requests have been answered, but not for ever."""
    console.print(
        f"Ending: running requests have {seconds:g} s to finish; a second signal ends them at once."
    )
    with contextlib.suppress(Interrupted, TimeoutError):
        await asyncio.wait_for(unless(stop.repeated.wait(), server.idle()), seconds)


def _frontend(site: Site, engine: EngineClient) -> Frontend:
    metrics = Metrics(
        site.model, lambda: engine.stats, lambda: engine.alive, site.arguments.metrics_prefix
    )
    return Frontend(
        engine=engine,
        tokenizer=site.tokenizer,
        metrics=metrics,
        model=site.model,
        root=site.options.path,
        defaults=site.defaults,
    )


def _show_ready(site: Site, engine: EngineClient, seconds: float, console: Console) -> None:
    key = site.arguments.api_key is not None
    show_ready(
        console,
        engine.info,
        model=site.model,
        address=address_of(site.listener),
        seconds=seconds,
        chat=site.tokenizer.has_chat_template,
        key=key,
    )
    if not key and not is_loopback(site.listener):
        console.print("[yellow]Everyone who reaches this machine can use it: set --api-key.[/]")
