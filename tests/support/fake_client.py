"""An engine client without an engine, whose tokens follow a script, and an HTTP server over it."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Awaitable, Callable

import httpx
import numpy as np

from llama_jax.client.request_check import check_request
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import EngineDead, QueueFull, RequestTimeout
from llama_jax.engine.interface import DeviceInfo, EngineInfo, Output, Stats, TokenLogprobs
from llama_jax.engine.prompt_logprobs import PromptLogprobs, PromptScoring
from llama_jax.serve.app import create_app
from llama_jax.serve.monitoring.http_metrics import handler_finder
from llama_jax.serve.monitoring.metrics import Metrics
from llama_jax.serve.served_model import ServedModel
from llama_jax.serve.transport.door import Door
from llama_jax.serve.transport.front import Front
from tests.support.tiny_tokenizer import tiny_tokenizer

EOT = "<|eot_id|>"
GREEDY = SamplingParams(temperature=0)


def make_info(**changes) -> EngineInfo:
    """A 2 x 2 mesh over four layers, with round numbers."""
    devices = [
        DeviceInfo(
            name=f"cpu:{2 * stage + rank}",
            stage=stage,
            rank=rank,
            layers=[2 * stage, 2 * stage + 1],
            weight_bytes=1_500_000,
            kv_bytes=8_000_000,
        )
        for stage in range(2)
        for rank in range(2)
    ]
    values = dict(
        model="tiny",
        mesh="2x2",
        platform="cpu",
        dtype="float32",
        kv_cache_dtype="float32",
        vocab_size=320,
        max_model_len=200,
        max_num_seqs=4,
        page_size=16,
        num_pages=64,
        devices=devices,
        num_programs=3,
        programs_at_start=2,
        load_seconds=1.0,
        compile_seconds=2.0,
    )
    return EngineInfo(**{**values, **changes})


class FakeClient:
    """Answers every request with `script`, repeated up to the length limit.

    Attributes:
      script: the tokens of every answer.
      eos: the token of the script that ends an answer.
      hold: tokens are produced only while it is set.
      pause: seconds before each token.
      fail_after: the number of tokens after which every request fails, or None.
      cached_tokens: reported with every token.
      requests: all accepted requests, as (prompt, params).
      running: the number of requests in flight.
      aborted: the number of requests that were closed before their end.
    """

    def __init__(self, script: list[int], eos: int, max_in_flight: int = 8) -> None:
        self.info = make_info()
        self.stats = Stats(
            num_running=2, num_waiting=1, pages_total=64, pages_free=48, prompt_tokens=7
        )
        self.script, self.eos = script, eos
        self.max_in_flight = max_in_flight
        self.alive = True
        self.draining = False
        self.responds = True
        self.seconds_since_report = 0.1
        self.hold = asyncio.Event()
        self.hold.set()
        self.pause = 0.0
        self.fail_after: int | None = None
        self.cached_tokens = 0
        self.requests: list[tuple[list[int], SamplingParams]] = []
        self.running = 0
        self.aborted = 0
        self.closed = False

    @property
    def in_flight(self) -> int:
        return self.running

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        if not self.alive:
            raise EngineDead("killed, see /tmp/secret.log")
        check_request(prompt, params, self.info)

    async def generate(
        self,
        prompt: list[int],
        params: SamplingParams,
        *,
        on_token: Callable[[], None] = lambda: None,
        deadline: float | None = None,
    ) -> AsyncGenerator[Output, None]:
        self.check(prompt, params)
        if self.running >= self.max_in_flight:
            raise QueueFull("The engine is full.")
        self.requests.append((prompt, params))
        self.running += 1
        finished = False
        try:
            limit = params.max_tokens or self.info.max_model_len - len(prompt)
            for index in range(limit):
                await self._wait(deadline)
                if index == self.fail_after:
                    finished = True
                    yield Output(0, None, "error", "The logits are not finite.")
                    return
                token = self.script[index % len(self.script)]
                stops = (token == self.eos and not params.ignore_eos) or (
                    token in params.stop_token_ids
                )
                reason = "stop" if stops else "length" if index + 1 == limit else None
                finished = reason is not None
                on_token()
                top = [(token, -0.5), (7, -1.5), (8, -math.inf)][: params.logprobs]
                yield Output(
                    0,
                    token,
                    reason,
                    cached_tokens=self.cached_tokens,
                    logprobs=None if params.logprobs is None else TokenLogprobs(-0.5, top),
                    prompt_logprobs=None if index else score(prompt, params),
                )
                if finished:
                    return
        finally:
            self.running -= 1
            self.aborted += not finished

    async def _wait(self, deadline: float | None) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self.hold.wait()
                await asyncio.sleep(self.pause)
        except TimeoutError:
            raise RequestTimeout from None
        if not self.alive:
            raise EngineDead("killed, see /tmp/secret.log")

    def die(self) -> None:
        self.alive = False
        self.hold.set()

    async def close(self) -> None:
        self.closed = True
        self.die()


def score(prompt: list[int], params: SamplingParams) -> PromptLogprobs | None:
    """Token i of a prompt has log-probability -i and rank 2; token 9 is the likeliest."""
    if params.prompt_logprobs is None:
        return None
    scoring, n = PromptScoring(len(prompt), params.prompt_logprobs), len(prompt) - 1
    if n:
        own = -np.arange(1, n + 1, dtype=np.float32)
        top = np.stack([np.full(n, -0.25), own, *np.full((18, n), -np.inf)], axis=1)
        ids = np.stack([np.full(n, 9), prompt[1:], *np.zeros((18, n), int)], axis=1)
        scoring.put(0, own, np.full(n, 2), ids, top)
    return scoring.result()


class FakeServer:
    """The HTTP application over a `FakeClient` that answers `text` and then <|eot_id|>.

    Attributes:
      engine: the fake client; its script is the tokens of `text`.
      app: the ASGI application.
    """

    def __init__(
        self,
        text: str = "Hello, world!",
        *,
        chat_template: bool = True,
        api_key: str | None = None,
        defaults: SamplingParams = GREEDY,
        prefix: str = "llama_jax",
        max_in_flight: int = 8,
        **info,
    ) -> None:
        self.tokenizer = tiny_tokenizer(chat_template)
        script = self.tokenizer.encode(text + EOT, add_bos=False)
        self.engine = FakeClient(script, script[-1], max_in_flight)
        self.engine.info = make_info(**info)
        self.served = ServedModel(
            engine=self.engine,
            tokenizer=self.tokenizer,
            metrics=Metrics(
                "tiny", lambda: self.engine.stats, lambda: self.engine.alive, prefix=prefix
            ),
            name="tiny",
            root="models/tiny",
            defaults=defaults,
        )
        door = Door([api_key] if api_key else ())
        app = create_app(self.served)
        door.open(app)
        self.app = Front(door, listeners=[self.served.metrics.observe])
        self.app.handler_of = handler_finder(app.routes)

    def run(self, body: Callable[[httpx.AsyncClient], Awaitable]):
        """Runs an async function with an HTTP client on one event loop.

        One that hangs is cancelled, and fails even if it goes on as if nothing had happened: a
        request that is cancelled ends with an answer.
        """

        async def scenario():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                async with asyncio.timeout(30) as limit:
                    result = await body(client)
                assert not limit.expired(), "it hung for 30 seconds"
                return result

        return asyncio.run(scenario())

    def get(self, path: str, **options) -> httpx.Response:
        return self.run(lambda client: client.get(path, **options))

    def post(self, path: str, body, **options) -> httpx.Response:
        return self.run(lambda client: client.post(path, json=body, **options))

    def complete(self, **body) -> dict:
        """The answer to a completion, which must succeed; the default prompt is "Hi"."""
        return ok(self.post("/v1/completions", {"prompt": "Hi", **body})).json()

    def chat(self, content: str = "Hi", **body) -> dict:
        """The answer to a chat of one message, which must succeed."""
        return ok(self.post("/v1/chat/completions", {"messages": user(content), **body})).json()

    def stream(self, path: str, **body) -> list[dict]:
        """The events of a streamed answer; asserts that [DONE] ends it, and leaves that out."""
        given = {"prompt": "Hi"} if path == "/v1/completions" else {"messages": user("Hi")}
        return events(ok(self.post(path, {**given, "stream": True, **body})))


def named_events(response: httpx.Response) -> list[dict]:
    """The data of the events of /v1/responses; asserts their exact format and their numbers."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.content.endswith(b"\n\n")
    found = []
    for block in response.content.decode().removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == "event: " + found[-1]["type"]
    assert [event["sequence_number"] for event in found] == [*range(len(found))]
    return found


def user(content: str) -> list[dict]:
    return [{"role": "user", "content": content}]


def ok(response: httpx.Response) -> httpx.Response:
    assert response.status_code == 200, response.text
    return response


def events(response: httpx.Response) -> list[dict]:
    """The data of server-sent events; asserts their exact format."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.content.endswith(b"\n\n")
    blocks = response.content.decode().removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def error_of(response: httpx.Response) -> dict:
    """The error object of an answer; asserts OpenAI's format and a message of one sentence."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message.endswith(".") and "\n" not in message and "Traceback" not in message
    return body["error"]
