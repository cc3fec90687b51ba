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

from llama_jax.checkpoint.directory import servable_layout
from llama_jax.client.client import EngineClient
from llama_jax.client.engine_process import ENGINE_COMMAND
from llama_jax.config.huggingface import read_checkpoint_config
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import EngineDead, EngineStartError
from llama_jax.engine.options import EngineOptions
from llama_jax.serve.app import create_app
from llama_jax.serve.command_line.arguments import (
    DEMO_CHECKPOINT,
    DEMO_NAME,
    parse_arguments,
)
from llama_jax.serve.command_line.engine_arguments import engine_options
from llama_jax.serve.command_line.model_arguments import check_quantization, default_params
from llama_jax.serve.command_line.ready import show_ready
from llama_jax.serve.monitoring.metrics import Metrics
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.door import Door
from llama_jax.serve.transport.http_server import HttpServer, address_of, is_loopback, listen
from llama_jax.serve.transport.interrupt import Interrupted, unless
from llama_jax.terminal.output import protect_output
from llama_jax.terminal.progress import TerminalDisplay
from llama_jax.text.tokenizer import Tokenizer
from sharding.errors import UserError

log = logging.getLogger("llama_jax.serve")


class CheckpointMissing(UserError):
    """The path on the command line is not a directory, or there is no demo checkpoint."""


@dataclass(frozen=True)
class Setup:
    """A checked command line: everything that the server needs before the engine starts."""

    arguments: argparse.Namespace
    options: EngineOptions
    names: tuple[str, ...]
    tokenizer: Tokenizer
    defaults: SamplingParams
    listener: socket.socket


def main(argv: list[str] | None = None, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serves until SIGTERM or SIGINT.

    What the user can correct, and the end of the engine, are printed as one sentence. Any other
    exception is a defect of the server and is raised.

    Args:
      argv: the command line; None for that of this process.
      engine_command: the command that runs an engine process.

    Returns:
      The exit code: 0 after a signal, 1 if the server could not start or its engine died.

    Raises:
      KeyboardInterrupt: Ctrl-C was pressed before the server was ready.
    """
    protect_output()
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    console = Console()
    try:
        path, name = _find_checkpoint(arguments.path)
        # Before anything is loaded: the port is the most likely thing to be wrong.
        with listen(arguments.host, arguments.port) as listener:
            setup = _prepare(arguments, path, name, listener)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(setup, engine_command, console))
    except (UserError, EngineStartError, EngineDead) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _prepare(
    arguments: argparse.Namespace, path: Path, name: str, listener: socket.socket
) -> Setup:
    """Loads what the server needs besides the engine, which takes a second or two.

    Raises:
      ConfigError, TokenizerError: it cannot be served.
    """
    declared = read_checkpoint_config(path)
    options = engine_options(arguments, path)
    declared.report_unknown(options.strict_config)
    check_quantization(declared, arguments.quantization)
    defaults = default_params(declared, arguments)  # cheaper than the tokenizer, so first
    tokenizer = Tokenizer(path, arguments.chat_template)
    if tokenizer.chat_problem is not None:
        log.warning(tokenizer.chat_problem)
    return Setup(
        arguments=arguments,
        options=options,
        names=tuple(arguments.served_model_name or [name]),
        defaults=defaults,
        tokenizer=tokenizer,
        listener=listener,
    )


def _find_checkpoint(path: Path | None) -> tuple[Path, str]:
    """Returns the checkpoint's directory or GGUF file, and its name for requests."""
    if path is None:
        if not DEMO_CHECKPOINT.is_dir():
            raise CheckpointMissing(
                "No checkpoint was given, and there is no demo checkpoint beside this package: "
                "give the path of a checkpoint."
            )
        return DEMO_CHECKPOINT, DEMO_NAME
    path = path.expanduser()  # `make serve MODEL=~/...` quotes it
    servable_layout(path)
    if path.is_file():
        return path, path.stem
    return path, path.resolve().name


async def _serve(setup: Setup, engine_command: Sequence[str], console: Console) -> None:
    """Starts the engine, serves, and shuts down after a signal.

    Raises:
      KeyboardInterrupt: Ctrl-C was pressed before the server was ready.
      EngineStartError: the engine cannot start.
      EngineDead: the engine died; every request has been answered with an error.
    """
    started = time.perf_counter()
    stop = StopSignals()
    door = Door(setup.arguments.api_key, setup.arguments.max_body_size)
    server = HttpServer(door, setup.listener, setup.arguments.write_timeout)
    async with server.running():  # during the start, requests are told that it is starting
        try:
            with TerminalDisplay(console) as display:
                start = EngineClient.start(
                    setup.options,
                    lambda step: display.update(step.title, step.done, step.total, step.detail),
                    command=engine_command,
                )
                engine = await unless(stop.asked.wait(), start)
        except Interrupted:
            if stop.first == signal.SIGINT:
                raise KeyboardInterrupt from None
            return
        try:
            served = _served_model(setup, engine)
            door.open(create_app(served))
            _show_ready(setup, engine, time.perf_counter() - started, console)
            try:
                reason = await unless(stop.asked.wait(), engine.wait_dead())
            except Interrupted:
                served.draining = True
                await _drain(server, stop, setup.arguments.shutdown_timeout, console)
            else:
                if not stop.asked.is_set():  # else the same signal has ended both
                    raise EngineDead(reason)
        finally:
            if stop.repeated.is_set():
                engine.kill()
            # Requests that still wait get an error now, before their connections close.
            await engine.close()


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP: the first asks for a graceful shutdown.

    A second SIGTERM or SIGINT asks for an immediate one. SIGHUP never counts as the second signal,
    nor one after it: a service manager may send it together with SIGTERM.

    Attributes:
      asked: set by the first signal.
      first: the first signal.
      repeated: set by the second.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.repeated = asyncio.Event()
        self.first: signal.Signals | None = None
        self._terminated = False
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # Under nohup, SIGHUP is ignored and must stay so.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        self.first = self.first or number
        self.asked.set()
        if number != signal.SIGHUP:
            if self._terminated:
                self.repeated.set()
            self._terminated = True


async def _drain(server: HttpServer, stop: StopSignals, seconds: float, console: Console) -> None:
    """Waits until all requests have ended, up to `seconds` or a second signal."""
    console.print(
        f"Shutting down: running requests have {seconds:g} s to finish; a second signal ends them "
        "at once.",
        soft_wrap=True,
    )
    with contextlib.suppress(Interrupted, TimeoutError):
        await asyncio.wait_for(unless(stop.repeated.wait(), server.idle()), seconds)


def _served_model(setup: Setup, engine: EngineClient) -> ServedModel:
    metrics = Metrics(
        setup.names[0],
        lambda: engine.stats,
        lambda: engine.alive and engine.responds,
        setup.arguments.metrics_prefix,
    )
    return ServedModel(
        name=setup.names[0],
        aliases=setup.names[1:],
        root=setup.options.path,
        engine=engine,
        tokenizer=setup.tokenizer,
        metrics=metrics,
        defaults=setup.defaults,
        keep_alive_seconds=setup.arguments.sse_keep_alive_interval or None,
        max_queue_tokens=setup.arguments.max_queue_tokens,
        request_timeout=setup.arguments.request_timeout,
    )


def _show_ready(setup: Setup, engine: EngineClient, seconds: float, console: Console) -> None:
    key = setup.arguments.api_key is not None
    show_ready(
        console,
        engine.info,
        model=setup.names[0],
        address=address_of(setup.listener),
        seconds=seconds,
        chat=setup.tokenizer.has_chat_template,
        key=key,
    )
    if not key and not is_loopback(setup.listener):
        console.print(
            "[yellow]Anyone who can reach this machine can use the server: set --api-key.[/]"
        )
