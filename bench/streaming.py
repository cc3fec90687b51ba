"""What HTTP streaming costs: a part of `python -m bench engine`.

64 streams run at once, their client in a process of its own, in two measurements:

- *engine*: the tokens per second of a real model through HTTP, as a share of those that
  `EngineClient` delivers without HTTP. Both are measured in turn, and the median share counts.
  The target is 95 %.
- *stub*: the tokens per second through the server over an engine without a model, which is never
  the limit. The target is 2,000.

Meanwhile a task on the server's event loop wakes up every few milliseconds. The target for the 99th
percentile of its delays is 50 ms.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import time
import urllib.parse
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from bench.new_process import command, outcome
from bench.result import Result, Row, Target
from llama_jax.client.client import EngineClient
from llama_jax.client.engine_process import ENGINE_COMMAND
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.options import EngineOptions
from llama_jax.serve.app import create_app
from llama_jax.serve.command_line.arguments import DEMO_CHECKPOINT
from llama_jax.serve.monitoring.metrics import Metrics
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.door import Door
from llama_jax.serve.transport.http_server import HttpServer, address_of, listen
from llama_jax.text.tokenizer import Tokenizer
from tests.support.processes import FAKE

STREAMS = 64
PROMPT_TOKENS = 16
TARGET_SHARE, TARGET_RATE, TARGET_LAG = 0.95, 2000.0, 0.05
WAKE_SECONDS = 0.005


async def read_stream(address: str, tokens: int) -> int:
    """Streams one completion over a connection of its own; returns its number of tokens.

    It parses no JSON, so that the client takes little of the machine.
    """
    url = urllib.parse.urlsplit(address)
    body = json.dumps(
        {"prompt": [5] * PROMPT_TOKENS, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        | {"stream": True}
    ).encode()
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\n" + b"Content-Length: %d\r\n\r\n" % len(body) + body
    )
    events, rest = 0, b""
    while data := await reader.read(1 << 16):
        rest += data
        events += rest.count(b"data: {")
        rest = rest[-6:]  # shorter than the pattern, so nothing counts twice
    writer.close()
    return events


async def read_streams(address: str, tokens: int) -> dict[str, float]:
    """Reads all streams at once: tokens, and seconds from the first request to the last end."""
    start = time.perf_counter()
    counts = await asyncio.gather(*(read_stream(address, tokens) for _ in range(STREAMS)))
    return {"tokens": sum(counts), "seconds": time.perf_counter() - start}


def read_all(address: str, tokens: int) -> dict[str, float]:
    """`read_streams` for the process of the client."""
    return asyncio.run(read_streams(address, tokens))


async def through_http(address: str, tokens: int) -> float:
    """Tokens per second of all streams, read by another process."""
    client = await asyncio.create_subprocess_exec(
        *command(read_all, address, tokens), stdout=asyncio.subprocess.PIPE
    )
    output, _ = await client.communicate()
    result = outcome(output.decode())
    assert result["tokens"] == STREAMS * tokens, result
    return float(result["tokens"] / result["seconds"])


async def through_client(engine: EngineClient, tokens: int) -> float:
    """Tokens per second of the same requests without HTTP."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)

    async def read() -> int:
        async with aclosing(engine.generate([5] * PROMPT_TOKENS, params)) as outputs:
            return len([output async for output in outputs])

    start = time.perf_counter()
    counts = await asyncio.gather(*(read() for _ in range(STREAMS)))
    assert sum(counts) == STREAMS * tokens
    return float(sum(counts) / (time.perf_counter() - start))


@contextlib.asynccontextmanager
async def serving(
    options: EngineOptions, engine_command: Sequence[str]
) -> AsyncGenerator[tuple[EngineClient, str], None]:
    """Runs an engine and a server in front of it; yields the engine's client and the address."""
    engine = await EngineClient.start(options, command=engine_command)
    metrics = Metrics("bench", lambda: engine.stats, lambda: engine.alive, "llama_jax")
    served = ServedModel(
        name="bench",
        root="bench",
        engine=engine,
        tokenizer=Tokenizer(DEMO_CHECKPOINT),
        metrics=metrics,
        defaults=SamplingParams(),
    )
    door = Door()
    door.open(create_app(served))
    listener = listen("127.0.0.1", 0)
    try:
        async with HttpServer(door, listener, write_seconds=60.0).running():
            yield engine, address_of(listener)
    finally:
        await engine.close()


async def record_lag(lags: list[float]) -> None:
    """Appends by how many seconds this task woke up too late, until it is cancelled."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(WAKE_SECONDS)
        lags.append(time.perf_counter() - before - WAKE_SECONDS)


def percentile_99(values: list[float]) -> float:
    """The 99th percentile."""
    return sorted(values)[int(0.99 * len(values))]


async def measure_engine(tokens: int, repeats: int) -> Row:
    """The share of the engine's own rate that arrives through HTTP."""
    options = EngineOptions(
        path=str(DEMO_CHECKPOINT), max_num_seqs=STREAMS, max_model_len=1024, wait_for_programs=True
    )
    alone, http, lags = list[float](), list[float](), list[float]()
    async with serving(options, ENGINE_COMMAND) as (engine, address):
        await through_client(engine, 8)
        await through_http(address, 8)
        for _ in range(repeats):
            alone.append(await through_client(engine, tokens))
            lag = asyncio.create_task(record_lag(lags))
            http.append(await through_http(address, tokens))
            lag.cancel()
    return {
        "streams over": "the demo checkpoint",
        "through HTTP": statistics.median(http),
        "engine's client": statistics.median(alone),
        "share": statistics.median(h / a for h, a in zip(http, alone, strict=True)),
        "loop late, p99": percentile_99(lags),
    }


async def measure_stub(tokens: int, repeats: int) -> Row:
    """The rate through the server over an engine that is never the limit."""
    lags, rates = list[float](), []
    options = EngineOptions(path="fake", max_num_seqs=STREAMS)
    async with serving(options, FAKE) as (_, address):
        await through_http(address, 8)
        for _ in range(repeats):
            lag = asyncio.create_task(record_lag(lags))
            rates.append(await through_http(address, tokens))
            lag.cancel()
    return {
        "streams over": "an engine without a model",
        "through HTTP": statistics.median(rates),
        "engine's client": None,
        "share": None,
        "loop late, p99": percentile_99(lags),
    }


def run(args: argparse.Namespace) -> Result:
    """Measures over an engine without a model, and over the demo checkpoint."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        stub = runner.run(measure_stub(args.tokens, args.repeats))
        engine = runner.run(measure_engine(args.tokens, args.repeats))
    late = max(row["loop late, p99"] for row in (stub, engine))
    share = "share of the engine's rate through HTTP"
    return Result.measured(
        "engine",
        f"{STREAMS} streams of {args.tokens} tokens over HTTP, medians of {args.repeats}",
        args=vars(args),
        packages=("jax", "starlette", "uvicorn", "h11"),
        units={
            "through HTTP": "tokens/s",
            "engine's client": "tokens/s",
            "share": "",
            "loop late, p99": "s",
        },
        rows=[stub, engine],
        targets=[
            Target("tokens without a model", stub["through HTTP"], TARGET_RATE, "min", "tokens/s"),
            Target(share, engine["share"], TARGET_SHARE, "min"),
            Target("delay of the event loop, p99", late, TARGET_LAG, "max", "s"),
        ],
    )
