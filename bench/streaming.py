"""What HTTP streaming costs: a part of `python -m bench engine`.

64 streams run at once, read by a process of its own (`bench.light_reader`), in two measurements:

- *engine*: the tokens per second of a real model through HTTP, as a share of those that
  `EngineClient` delivers without HTTP, for the same requests to the same engine. They count from
  the first request to the last token, so that the arrival of the requests and the end of the
  streams count, too. Both are measured in pairs, each of them first in every other pair, and the
  median of the pairs' shares counts. The target is 95 %. The *steady share* is that of the rates
  at which the engine generates the middle 80 % of the tokens, when all streams run.
- *stub*: the tokens per second through the server over an engine without a model, which is never
  the limit. The target is 2,000.

The CPU times per token explain the share: those of the server's process, which holds the engine's
client, of the reader, and of the engine's client alone. They hardly depend on what else the machine
does.

Meanwhile a task on the server's event loop wakes up every 20 milliseconds. The target for the 99th
percentile of its delays is 50 ms.
"""

import argparse
import asyncio
import contextlib
import json
import math
import statistics
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from bench.light_reader import read_streams
from bench.new_process import command, outcome
from bench.result import Result, Row, Target
from llama_jax.client.client import EngineClient
from llama_jax.client.engine_process import ENGINE_COMMAND
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.options import EngineOptions
from llama_jax.plan.simulation.figures import percentile
from llama_jax.serve.app import create_app
from llama_jax.serve.command_line.arguments import DEMO_CHECKPOINT
from llama_jax.serve.frozen_heap import frozen_heap
from llama_jax.serve.monitoring.metrics import Metrics
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.door import Door
from llama_jax.serve.transport.http_server import HttpServer, address_of, listen
from llama_jax.text.tokenizer import Tokenizer
from tests.support.processes import FAKE

STREAMS = 64
PROMPT_TOKENS = 16
TARGET_SHARE, TARGET_RATE, TARGET_LAG = 0.95, 2000.0, 0.05
WAKE_SECONDS = 0.02


@dataclass(frozen=True)
class Streamed:
    """What reading all streams once took.

    Attributes:
      rate: tokens per second of all streams.
      here: CPU seconds of this process, which runs the server and the engine's client, per token.
      reader: CPU seconds of the process that reads over HTTP, per token.
    """

    rate: float
    here: float
    reader: float = 0.0


async def through_http(address: str, tokens: int) -> Streamed:
    """Reads all streams over HTTP in another process."""
    body = {"prompt": [5] * PROMPT_TOKENS, "max_tokens": tokens, "ignore_eos": True}
    request = json.dumps({**body, "temperature": 0, "stream": True})
    client = await asyncio.create_subprocess_exec(
        *command(read_streams, address, "/v1/completions", request, STREAMS),
        stdout=asyncio.subprocess.PIPE,
    )
    start = time.process_time()
    output, _ = await client.communicate()
    here = time.process_time() - start
    result, total = outcome(output.decode()), STREAMS * tokens
    assert result["events"] == total, result
    return Streamed(total / result["seconds"], here / total, result["cpu_seconds"] / total)


async def through_client(engine: EngineClient, tokens: int) -> Streamed:
    """Reads the outputs of the same requests without HTTP."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)

    async def read() -> int:
        async with aclosing(engine.generate([5] * PROMPT_TOKENS, params)) as outputs:
            return len([output async for output in outputs])

    start, cpu_start = time.perf_counter(), time.process_time()
    counts = await asyncio.gather(*(read() for _ in range(STREAMS)))
    seconds, here = time.perf_counter() - start, time.process_time() - cpu_start
    assert counts == [tokens] * STREAMS
    return Streamed(sum(counts) / seconds, here / sum(counts))


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
            with frozen_heap():
                yield engine, address_of(listener)
    finally:
        await engine.close()


@dataclass
class Watch:
    """What a task on the event loop sees that wakes up every 20 milliseconds.

    Attributes:
      lags: by how many seconds it wakes up late.
      progress: by how many tokens the engine had generated, when the engine told so first.
    """

    lags: list[float] = field(default_factory=list)
    progress: dict[int, float] = field(default_factory=dict)

    def steady_rate(self, total: int) -> float:
        """Tokens per second of the middle 80 % of these tokens; NaN without two reports of them."""
        first = min(self.progress)
        middle = [
            (tokens, now)
            for tokens, now in self.progress.items()
            if 0.1 * total <= tokens - first <= 0.9 * total
        ]
        if len(middle) < 2:
            return math.nan
        (tokens, start), (more, end) = middle[0], middle[-1]
        return (more - tokens) / (end - start)


@contextlib.asynccontextmanager
async def watching(engine: EngineClient) -> AsyncGenerator[Watch, None]:
    """Watches the event loop and the engine inside the context."""
    watch = Watch()

    async def record() -> None:
        while True:
            before = time.perf_counter()
            watch.progress.setdefault(engine.stats.generation_tokens, before)
            await asyncio.sleep(WAKE_SECONDS)
            watch.lags.append(time.perf_counter() - before - WAKE_SECONDS)

    task = asyncio.create_task(record())
    try:
        yield watch
    finally:
        task.cancel()


async def measure_engine(tokens: int, repeats: int) -> Row:
    """The share of the engine's own rate that arrives through HTTP."""
    options = EngineOptions(
        path=str(DEMO_CHECKPOINT), max_num_seqs=STREAMS, max_model_len=1024, wait_for_programs=True
    )
    alone, http = list[Streamed](), list[Streamed]()
    alone_watch, http_watch = list[Watch](), list[Watch]()
    async with serving(options, ENGINE_COMMAND) as (engine, address):
        await through_client(engine, 8)
        await through_http(address, 8)
        for number in range(repeats):
            for over_http in (number % 2 == 1, number % 2 == 0):
                async with watching(engine) as watch:
                    if over_http:
                        http.append(await through_http(address, tokens))
                        http_watch.append(watch)
                    else:
                        alone.append(await through_client(engine, tokens))
                        alone_watch.append(watch)
    shares = sorted(h.rate / a.rate for h, a in zip(http, alone, strict=True))
    total = STREAMS * tokens
    steady = [
        h.steady_rate(total) / a.steady_rate(total)
        for h, a in zip(http_watch, alone_watch, strict=True)
    ]
    return {
        "streams over": "the demo checkpoint",
        **figures(http, http_watch),
        "engine's client": statistics.median(each.rate for each in alone),
        "its CPU": 1e6 * statistics.median(each.here for each in alone),
        "share": statistics.median(shares),
        "least share": shares[0],
        "greatest share": shares[-1],
        "steady share": statistics.median(steady),
    }


async def measure_stub(tokens: int, repeats: int) -> Row:
    """The rate through the server over an engine that is never the limit."""
    http, watches = list[Streamed](), list[Watch]()
    options = EngineOptions(path="fake", max_num_seqs=STREAMS)
    async with serving(options, FAKE) as (engine, address):
        await through_http(address, 8)
        for _ in range(repeats):
            async with watching(engine) as watch:
                http.append(await through_http(address, tokens))
            watches.append(watch)
    return {"streams over": "an engine without a model", **figures(http, watches)}


def figures(http: Sequence[Streamed], watches: Sequence[Watch]) -> Row:
    """What a row says about HTTP."""
    return {
        "through HTTP": statistics.median(each.rate for each in http),
        "server's CPU": 1e6 * statistics.median(each.here for each in http),
        "reader's CPU": 1e6 * statistics.median(each.reader for each in http),
        "loop late, p99": percentile([lag for watch in watches for lag in watch.lags], 99),
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
            "server's CPU": "µs/token",
            "reader's CPU": "µs/token",
            "loop late, p99": "s",
            "engine's client": "tokens/s",
            "its CPU": "µs/token",
            "share": "",
            "least share": "",
            "greatest share": "",
            "steady share": "",
        },
        rows=[stub, engine],
        targets=[
            Target("tokens without a model", stub["through HTTP"], TARGET_RATE, "min", "tokens/s"),
            Target(share, engine["share"], TARGET_SHARE, "min"),
            Target("delay of the event loop, p99", late, TARGET_LAG, "max", "s"),
        ],
    )
