"""Open-loop load on any server that speaks OpenAI's protocol.

Requests arrive at times drawn beforehand, whether or not the server keeps up, and all latencies
count from the intended arrival. So a server that stalls for a second shows it in every request that
should have arrived meanwhile. How late the client itself was is reported ("sent too late"); if that
is much, the client is the limit. Tokens are counted by the server's usage, not by its events.

    python -m bench serve --url http://127.0.0.1:8000/v1 --rate 2 4 8 --duration 60
        --prompt-tokens lognormal:512,0.6 --answer-tokens 64-256 --ttft 500 --tpot 50

With several rates, each is a test of its own, one after the other, with other prompts. With --trace
FILE, the requests are those of a trace in one of the formats that the planner simulates
(docs/simulation.md), at their times. The API key, if the server wants one, is read from
OPENAI_API_KEY. The exit status is 1 if fewer than --goal of the requests of a test keep their
targets.
"""

import argparse
import asyncio
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.load.client import PATHS, Server, ServerError, find_model, send_all
from bench.load.figures import UNITS, Goals, error_rows, latency_rows, total_row
from bench.load.sample import Sample
from bench.load.workload import LoadRequest, Replay, Workload
from bench.partial import keep
from bench.result import Plot, Result, Row, Target
from llama_jax.plan.simulation.figures import percentile
from llama_jax.plan.simulation.lengths import LengthError, Lengths
from llama_jax.plan.simulation.load import ARRIVALS
from llama_jax.plan.simulation.traces import read_trace
from sharding.errors import UserError

URL = "http://127.0.0.1:8000/v1"
EXTRA = '{"temperature": 0, "ignore_eos": true}'
KEY = "OPENAI_API_KEY"
# Of the flags that say what a trace says otherwise.
DRAWN: dict[str, Any] = {
    "rate": [1.0],
    "arrivals": "poisson",
    "prompt_tokens": "256",
    "answer_tokens": "128",
    "prefix_tokens": 0,
    "prefixes": 1,
}
TOO_LATE = 0.010  # seconds at the 99th percentile
MAX_RATE, MAX_SECONDS, MAX_COUNT = 1e5, 1e6, 10**6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `python -m bench serve`."""
    add = parser.add_argument
    rate = number(float, 0, MAX_RATE, above=True)
    seconds = number(float, 0, MAX_SECONDS, above=True)
    natural, positive = number(int, 0, MAX_COUNT), number(int, 1, MAX_COUNT)
    add("--url", default=URL, help="of the server, with /v1 (default: %(default)s)")
    add("--endpoint", choices=PATHS, default="completions", help="default: %(default)s")
    add("--model", help="name of the model (default: the first that the server lists)")
    add("--trace", type=Path, metavar="FILE", help="send the requests of a trace at their times")
    add("--rate", type=rate, nargs="+", metavar="R", help="requests per second (1)")
    add("--arrivals", choices=ARRIVALS, help="(poisson)")
    many = parser.add_mutually_exclusive_group()
    many.add_argument(
        "--requests", type=positive, metavar="N", help="of each test (100, or the whole trace)"
    )
    many.add_argument(
        "--duration", type=seconds, metavar="S", help="seconds in which requests arrive, instead"
    )
    forms = "256, 64-512, normal:256,64, lognormal:256,0.6 (median, sigma) or empirical:FILE"
    add("--prompt-tokens", type=lengths, metavar="L", help=f"lengths (256): {forms}")
    add("--answer-tokens", type=lengths, metavar="L", help="lengths, likewise (128)")
    add("--prefix-tokens", type=natural, metavar="N", help="shared, before each prompt (0)")
    add("--prefixes", type=positive, metavar="N", help="different shared prefixes (1)")
    add(
        "--vocab-size",
        type=positive,
        metavar="V",
        help="send random token ids below V (default: English words, about a token each)",
    )
    add(
        "--extra-body",
        type=json_object,
        default=EXTRA,
        metavar="JSON",
        help="more fields of every request (default: %(default)s)",
    )
    add("--ttft", type=seconds, metavar="MS", help="target: time to the first token")
    add("--tpot", type=seconds, metavar="MS", help="target: time per output token")
    add("--e2e", type=seconds, metavar="MS", help="target: time to the last token")
    add(
        "--goal",
        type=number(float, 0, 1),
        default=0.99,
        metavar="SHARE",
        help="of the requests that must keep all targets (default: %(default)s)",
    )
    add(
        "--warm-up",
        type=natural,
        default=1,
        metavar="N",
        help="requests before each test that do not count (default: %(default)s)",
    )
    add(
        "--timeout",
        type=seconds,
        default=600.0,
        metavar="S",
        help="after which a request counts as failed (default: %(default)g)",
    )
    add("--seed", type=natural, default=0, metavar="N", help="of all random numbers")  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    """Runs a test for each rate, or replays a trace; keeps what is measured so far.

    Raises:
      UserError: the flags make no sense, a trace is broken, or the server cannot be tested.
    """
    loads = make_loads(args)
    server = make_server(args)
    goals = Goals(*(None if ms is None else ms / 1e3 for ms in (args.ttft, args.tpot, args.e2e)))
    raise_file_limit()
    drawn = [load.to_send() for _, load in loads]
    tests: list[tuple[float, list[Sample]]] = []
    for (rate, load), requests in zip(loads, drawn, strict=True):
        before = load.warm_up(args.warm_up) if args.warm_up else []
        samples = asyncio.run(run_test(server, before, requests))
        tests.append((rate, samples))
        print(line(rate, samples), flush=True)
        warn_if_late(rate, samples)
        keep(result(args, server, goals, tests), args.output)
    return result(args, server, goals, tests)


def result(
    args: argparse.Namespace,
    server: Server,
    goals: Goals,
    tests: Sequence[tuple[float, list[Sample]]],
) -> Result:
    """The result of these tests, each with its rate."""
    totals = {rate: total_row(samples, goals) for rate, samples in tests}
    rows: list[Row] = [
        {"rate": rate, **row} for rate, samples in tests for row in latency_rows(samples)
    ]
    rows += [{"rate": rate, **row} for rate, row in totals.items()]
    rows += [{"rate": rate, **row} for rate, samples in tests for row in error_rows(samples)]
    return Result.measured(
        "serve",
        f"Open-loop load on {server.model} at {server.url}, "
        + (f"the trace {args.trace.name}." if args.trace else f"{args.arrivals} arrivals."),
        args=vars(args) | {"model": server.model},
        packages=("httpx",),
        units=UNITS,
        rows=rows,
        targets=[
            Target(f"share of requests within the targets at {rate:g} requests/s",
                   row["goodput_share"], args.goal, "min")
            for rate, row in totals.items()
        ],
        plots=[
            Plot("Latency against load", "rate", ("p99",), by=("latency",), log="y"),
            Plot("Goodput against load", "rate", ("goodput", "requests_per_second")),
        ],
    )  # fmt: skip


def line(rate: float, samples: Sequence[Sample]) -> str:
    """What has become of a test, for the terminal."""
    failed = sum(sample.error is not None for sample in samples)
    return f"{rate:g} requests/s: {len(samples) - failed} answered, {failed} failed"


async def run_test(
    server: Server,
    before: Sequence[LoadRequest],
    requests: Sequence[LoadRequest],
    transport: Any = None,
) -> list[Sample]:
    """Warms the server up with the requests before a test, and runs the test.

    Raises:
      ServerError: the server answers none of the requests before.
    """
    if before:
        check_answers(await send_all(server, before, transport))
    return await send_all(server, requests, transport)


def check_answers(samples: list[Sample]) -> None:
    """Checks that at least one request was answered.

    Raises:
      ServerError: none was.
    """
    if all(sample.error is not None for sample in samples):
        raise ServerError(
            f"The requests before the test failed ({samples[0].error}: {samples[0].detail}): check "
            "that the server runs, and --endpoint, --model and --extra-body."
        )


def make_server(args: argparse.Namespace) -> Server:
    """The server that the flags describe; asks it for its model if they name none.

    Raises:
      UserError: the flags make no sense.
      ServerError: the server cannot be reached.
    """
    check_url(args.url)
    if args.endpoint == "chat" and args.vocab_size is not None:
        raise UserError("--vocab-size is for completions: a chat takes no token ids.")
    server = Server(
        url=args.url.rstrip("/"),
        endpoint=args.endpoint,
        model=args.model or "",
        api_key=os.environ.get(KEY) or None,
        extra=json.loads(args.extra_body),
        seconds=args.timeout,
    )
    return server if server.model else replace(server, model=asyncio.run(find_model(server)))


def check_url(text: str) -> None:
    """Checks the address of a server.

    Raises:
      UserError: it is no address, or it holds a password, which results would show.
    """
    try:
        url = urlsplit(text)
        valid = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # a bad port or IPv6 address
        valid = False
    if not valid or url.query or url.fragment:
        raise UserError(f"--url must be the address of a server, such as {URL}.")
    if url.username is not None or url.password is not None:
        raise UserError(f"--url may hold no password: put the key into {KEY} in the environment.")


def make_loads(args: argparse.Namespace) -> list[tuple[float, Workload | Replay]]:
    """The requests per second and the load of each test; completes the flags with their defaults.

    Raises:
      UserError: flags contradict each other, or the trace is broken.
    """
    if args.trace is None:
        for name, default in DRAWN.items():
            if getattr(args, name) is None:
                setattr(args, name, default)
        if len(set(args.rate)) < len(args.rate):
            raise UserError("--rate names a rate twice: leave one of them out, or run it again.")
        if args.requests is None and args.duration is None:
            args.requests = 100
        return [(rate, make_workload(args, rate, test)) for test, rate in enumerate(args.rate)]
    for name in DRAWN:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"--trace says what is sent, so leave {option} out.")
    requests = read_trace(args.trace)[: args.requests]
    if args.duration is not None:
        requests = [request for request in requests if request.at < args.duration]
    rate = len(requests) / max(requests[-1].at, 1.0)
    return [(rate, Replay(requests=requests, vocab_size=args.vocab_size, seed=args.seed))]


def make_workload(args: argparse.Namespace, rate: float, test: int) -> Workload:
    """The load of one test, the first of which is 0, with requests that are drawn."""
    return Workload(
        rate=rate,
        arrivals=args.arrivals,
        num_requests=args.requests,
        duration=args.duration,
        prompt=Lengths.parse(args.prompt_tokens),
        answer=Lengths.parse(args.answer_tokens),
        prefix_tokens=args.prefix_tokens,
        prefixes=args.prefixes,
        vocab_size=args.vocab_size,
        seed=args.seed,
        test=test,
    )


def warn_if_late(rate: float, samples: list[Sample]) -> None:
    """Says so if the client, not the server, was the limit."""
    late = percentile([sample.late for sample in samples], 99)
    if late > TOO_LATE:
        print(
            f"At {rate:g} requests/s the client sent 1 % of the requests at least {1e3 * late:.0f} "
            "ms too late: its own machine is too slow for this load.",
            file=sys.stderr,
        )


def raise_file_limit() -> None:
    """Allows as many connections as the system does: each is an open file."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def number(
    kind: type[int] | type[float], least: float, most: float, above: bool = False
) -> Callable[[str], float]:
    """A type of `argparse`: a number from `least` (or, if `above`, from beyond it) to `most`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value <= most:
            name = "an integer" if kind is int else "a number"
            lowest = f"above {least:g} and" if above else f"from {least:g}"
            raise argparse.ArgumentTypeError(
                f"must be {name} {lowest} up to {most:g}, got {text!r}"
            )
        return value

    return parse


def lengths(text: str) -> str:
    """A type of `argparse`: what `Lengths.parse` reads."""
    try:
        Lengths.parse(text)
    except LengthError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def json_object(text: str) -> str:
    """A type of `argparse`: a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return text
