"""The server's process, from its command line to its exit code."""

import argparse
import asyncio
import contextlib
import math
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console

from llama_jax.client.client import EngineClient
from llama_jax.client.engine_process import ENGINE_COMMAND
from llama_jax.client.watchdog import end_if_hung
from llama_jax.engine.errors import EngineDead, EngineStartError
from llama_jax.serve.command_line.arguments import parse_arguments
from llama_jax.serve.command_line.ready import show_ready
from llama_jax.serve.dry_run import dry_run
from llama_jax.serve.frozen_heap import frozen_heap
from llama_jax.serve.monitoring.logs import logging_to
from llama_jax.serve.monitoring.metrics import Metrics
from llama_jax.serve.monitoring.throughput import log_throughput
from llama_jax.serve.preflight import PreflightFailed, preflight
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.setup import Setup, find_checkpoint, open_listener, prepare
from llama_jax.serve.site import Site
from llama_jax.serve.stop_signals import StopSignals
from llama_jax.serve.transport.http_server import (
    HttpServer,
    address_of,
    allow_connections,
    is_loopback,
)
from llama_jax.serve.transport.interrupt import Interrupted, unless
from llama_jax.terminal.output import protect_output
from llama_jax.terminal.progress import TerminalDisplay
from llama_jax.text.tokenizer import Tokenizer
from sharding.errors import UserError

# Tokenizing and what else takes long. Each thread that runs Python takes the interpreter's lock for
# 5 ms at a time: with asyncio's own number, 32, streams would stand still for seconds. Two, so that
# short prompts need not wait for a long one.
THREADS = 2


def main(argv: list[str] | None = None, engine_command: Sequence[str] = ENGINE_COMMAND) -> int:
    """Serves until SIGTERM or SIGINT.

    What the user can correct, and the end of the engine, are printed as one sentence. Any other
    exception is a defect of the server and is raised.

    Args:
      argv: the command line; None for that of this process.
      engine_command: the command that runs an engine process.

    Returns:
      The exit code: 0 after a signal, 1 if the server could not start or its engine died, and that
      of the planner's `--validate` if `--preflight` found something wrong. With --dry-run, it is 0
      if the server could start, else 2.

    Raises:
      KeyboardInterrupt: Ctrl-C was pressed before the server was ready.
    """
    protect_output()
    console = Console()
    arguments = parse_arguments(argv)
    if arguments.dry_run:
        return _dry_run(arguments, console)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(logging_to(arguments.log_level, arguments.request_log))
            path, name = find_checkpoint(arguments.path)
            allow_connections()
            # Before anything is loaded: the port is the most likely thing to be wrong.
            listener = stack.enter_context(open_listener(arguments))
            setup = prepare(arguments, path, name, listener)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(_serve(setup, stack, engine_command, console))
    except PreflightFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (UserError, EngineStartError, EngineDead) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _dry_run(arguments: argparse.Namespace, console: Console) -> int:
    try:
        with logging_to(arguments.log_level, None):
            lines = dry_run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0


async def _serve(
    setup: Setup, stack: contextlib.ExitStack, engine_command: Sequence[str], console: Console
) -> None:
    """Starts the engine, serves, and shuts down after a signal.

    What must be closed after the server has ended is added to `stack`.

    Raises:
      KeyboardInterrupt: Ctrl-C was pressed before the server was ready.
      PreflightFailed: this machine is not what was planned.
      EngineStartError: the engine cannot start.
      EngineDead: the engine died; every request has been answered with an error.
    """
    started = time.perf_counter()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "work"))
    stop = StopSignals()
    site = stack.enter_context(contextlib.closing(Site(setup)))
    server = HttpServer(
        site.front,
        setup.listener,
        setup.arguments.write_timeout,
        tls=setup.tls,
        trusted_proxies=setup.arguments.forwarded_allow_ips,
    )
    async with server.running():  # during the start, requests are told that it is starting
        try:
            if setup.arguments.preflight:
                checks = preflight(
                    setup.arguments.preflight_gpu,
                    setup.arguments.mesh,
                    Path(setup.options.path),
                )
                await unless(stop.asked.wait(), checks)
            with TerminalDisplay(console) as display:
                start = EngineClient.start(
                    setup.options,
                    lambda step: display.update(step.title, step.done, step.total, step.detail),
                    command=engine_command,
                )
                engine, tokenizer = await unless(stop.asked.wait(), _with_tokenizer(setup, start))
        except Interrupted:
            if stop.first == signal.SIGINT:
                raise KeyboardInterrupt from None
            return
        try:
            served = _served_model(setup, engine, tokenizer)
            site.open(served)
            stack.enter_context(frozen_heap())
            _show_ready(setup, served, time.perf_counter() - started, console)
            background = _background(engine, setup.arguments)
            try:
                reason = await unless(stop.asked.wait(), engine.wait_dead())
            except Interrupted:
                served.draining = True
                await _drain(server, stop, setup.arguments.shutdown_timeout, console)
            else:
                if not stop.asked.is_set():  # else the same signal has ended both
                    raise EngineDead(reason)
            finally:
                for task in background:
                    task.cancel()
        finally:
            if stop.repeated.is_set():
                engine.kill()
            # Requests that still wait get an error now, before their connections close.
            await engine.close()


async def _with_tokenizer(
    setup: Setup, start: Coroutine[Any, Any, EngineClient]
) -> tuple[EngineClient, Tokenizer]:
    """Loads the tokenizer while the engine starts; an error of one ends the other.

    Raises the errors of both.
    """
    loading = asyncio.to_thread(setup.load_tokenizer)
    tasks = asyncio.create_task(start), asyncio.create_task(loading)
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _background(engine: EngineClient, arguments: argparse.Namespace) -> list[asyncio.Task[None]]:
    """Starts what runs beside the requests: the line about throughput, and the watchdog."""
    work = [end_if_hung(engine, arguments.watchdog_timeout or math.inf)]
    if interval := arguments.log_stats_interval:
        work.append(log_throughput(lambda: engine.stats, interval))
    return [asyncio.create_task(each) for each in work]


async def _drain(server: HttpServer, stop: StopSignals, seconds: float, console: Console) -> None:
    """Waits until all requests have ended, up to `seconds` or a second signal."""
    console.print(
        f"Shutting down: running requests have {seconds:g} s to finish; a second signal ends them "
        "at once.",
        soft_wrap=True,
    )
    with contextlib.suppress(Interrupted, TimeoutError):
        await asyncio.wait_for(unless(stop.repeated.wait(), server.idle()), seconds)


def _served_model(setup: Setup, engine: EngineClient, tokenizer: Tokenizer) -> ServedModel:
    metrics = Metrics(
        setup.names[0],
        lambda: engine.stats,
        lambda: engine.alive and engine.responds,
        setup.arguments.metrics_prefix,
        info=engine.info,
    )
    return ServedModel(
        name=setup.names[0],
        aliases=setup.names[1:],
        root=setup.options.path,
        engine=engine,
        tokenizer=tokenizer,
        metrics=metrics,
        defaults=setup.defaults,
        keep_alive_seconds=setup.arguments.sse_keep_alive_interval or None,
        max_queue_tokens=setup.arguments.max_queue_tokens,
        request_timeout=setup.arguments.request_timeout,
    )


def _show_ready(setup: Setup, served: ServedModel, seconds: float, console: Console) -> None:
    key = bool(setup.keys)
    show_ready(
        console,
        served.engine.info,
        model=setup.names[0],
        address=address_of(setup.listener, tls=setup.tls is not None),
        unix_socket=setup.arguments.uds,
        seconds=seconds,
        chat=served.tokenizer.has_chat_template,
        key=key,
    )
    if not key and not is_loopback(setup.listener):
        console.print(
            "[yellow]Anyone who can reach this machine can use the server: set --api-key.[/]"
        )
