"""Sends the requests of a load test at their times, and records what comes back and when.

It works with any server that speaks OpenAI's protocol. The loop that sends waits for no answer.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.load.sample import Sample
from bench.load.workload import LoadRequest
from sharding.errors import UserError

if TYPE_CHECKING:  # a machine that only measures its GPU lacks it
    import httpx

PATHS = {"completions": "/completions", "chat": "/chat/completions"}
MAX_EVENT = 10_000_000  # bytes
MAX_DETAIL = 200  # characters
START_SECONDS = 0.1  # until the first arrival
EXTRA_SECONDS = 10  # for the questions before the test


class ServerError(UserError):
    """The server cannot be tested at all."""


class RequestFailed(Exception):
    """A request has failed; the arguments are the kind of failure and what it said."""


@dataclass(frozen=True)
class Server:
    """The server to test.

    Attributes:
      url: up to and including `/v1`.
      endpoint: a key of `PATHS`.
      model: the name to ask for.
      api_key: sent as a bearer token; None for none.
      extra: more fields of every body.
      seconds: after which a request counts as failed, from its sending.
    """

    url: str
    endpoint: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 600.0

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def body(self, request: LoadRequest) -> dict[str, Any]:
        """The body of a request, which asks for a stream and for the usage at its end."""
        if self.endpoint == "chat":
            prompt = {"messages": [{"role": "user", "content": request.prompt}]}
        else:
            prompt = {"prompt": request.prompt}
        return {
            "model": self.model,
            **prompt,
            "max_tokens": request.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


async def find_model(server: Server, transport: "httpx.AsyncBaseTransport | None" = None) -> str:
    """The name of the first model that a server lists.

    Raises:
      ServerError: it cannot be reached, or does not answer as such a server does.
    """
    import httpx

    try:
        async with httpx.AsyncClient(
            headers=server.headers, timeout=EXTRA_SECONDS, transport=transport
        ) as client:
            response = await client.get(server.url + "/models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(
            f"{server.url} cannot be reached ({_text(error)}): start the server, or give its "
            "address with --url."
        ) from error
    if response.status_code in (401, 403):
        raise ServerError(
            f"{server.url} wants an API key that it knows: set OPENAI_API_KEY in the environment."
        )
    if response.status_code >= 500:
        raise ServerError(
            f"{server.url} is not ready (status {response.status_code}): try again once it answers."
        )
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ServerError(
            f"{server.url}/models lists no model (status {response.status_code}): check --url, or "
            "name the model with --model."
        ) from error


async def send_all(
    server: Server,
    requests: Sequence[LoadRequest],
    transport: "httpx.AsyncBaseTransport | None" = None,
) -> list[Sample]:
    """Sends every request at its time and waits for all answers.

    Args:
      server: the server.
      requests: in the order of their arrival.
      transport: in place of the network, for tests.

    Returns:
      A sample for each request, in the same order. No failure of a request raises.
    """
    import httpx

    loop = asyncio.get_running_loop()
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with (
        httpx.AsyncClient(
            headers=server.headers, timeout=None, limits=unlimited, transport=transport
        ) as client,
        asyncio.TaskGroup() as tasks,
    ):
        bodies = [json.dumps(server.body(request)).encode() for request in requests]
        start = loop.time() + START_SECONDS
        samples = []
        for request, body in zip(requests, bodies, strict=True):
            await asyncio.sleep(max(0, start + request.at - loop.time()))
            samples.append(Sample(request.at))
            tasks.create_task(_send(client, server, body, samples[-1], start))
    return samples


async def _send(
    client: "httpx.AsyncClient", server: Server, body: bytes, sample: Sample, start: float
) -> None:
    """Sends one request and fills in its sample."""
    import httpx

    loop = asyncio.get_running_loop()
    sample.sent = loop.time() - start
    try:
        async with asyncio.timeout(server.seconds):
            await _stream(client, server, body, sample, start)
    except RequestFailed as error:
        sample.error, sample.detail = error.args
    except TimeoutError:
        sample.error, sample.detail = "timeout", f"no end after {server.seconds:g} s"
    except httpx.ConnectError as error:
        sample.error, sample.detail = "no connection", _text(error)
    except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
        sample.error, sample.detail = "disconnected", _text(error)
    except Exception as error:  # whatever an answer does, the test goes on
        sample.error, sample.detail = type(error).__name__, _text(error)
    sample.end = loop.time() - start


async def _stream(
    client: "httpx.AsyncClient", server: Server, body: bytes, sample: Sample, start: float
) -> None:
    loop = asyncio.get_running_loop()
    url = server.url + PATHS[server.endpoint]
    headers = {"Content-Type": "application/json"}
    finished, usage, rest = False, None, b""
    async with client.stream("POST", url, content=body, headers=headers) as response:
        if response.status_code != 200:
            raise RequestFailed(f"HTTP {response.status_code}", await _beginning(response))
        async for data in response.aiter_bytes():
            now = loop.time() - start
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > MAX_EVENT:
                raise RequestFailed("bad event", "an event of more than 10 MB")
            for event in _events(lines):
                if event.get("error"):
                    raise RequestFailed("error in the stream", _text(event["error"]))
                usage = event.get("usage") or usage
                choices = event.get("choices") or ()
                finished |= any(choice.get("finish_reason") for choice in choices)
                if any(map(_has_output, choices)):
                    sample.events.append(now)
    if not finished:
        raise RequestFailed("cut off", "the stream ended without a finish_reason")
    if not isinstance(usage, dict) or not usage.get("completion_tokens"):
        raise RequestFailed("no usage", "the server does not count its tokens")
    if not sample.events:
        raise RequestFailed("no output", "no event had any text")
    sample.prompt_tokens = int(usage.get("prompt_tokens") or 0)
    sample.output_tokens = int(usage["completion_tokens"])


def _events(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """The data of server-sent events."""
    for line in lines:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            continue
        try:
            event = json.loads(data)
        except ValueError as error:
            raise RequestFailed("bad event", _text(error)) from error
        if not isinstance(event, dict):
            raise RequestFailed("bad event", "an event is no JSON object")
        yield event


def _has_output(choice: dict[str, Any]) -> bool:
    """Whether a choice of an event stands for a token.

    The text of a token may be empty, for example if it is half a character. The first event of a
    chat that only names the role, and a last one that only gives the reason, stand for none.
    """
    delta = choice.get("delta")
    if delta is None:
        text = choice.get("text")
        return bool(text) or (text is not None and not choice.get("finish_reason"))
    named = {"content", "reasoning_content", "reasoning", "tool_calls"} & delta.keys()
    if any(delta[name] for name in named):
        return True
    return bool(named) and "role" not in delta and not choice.get("finish_reason")


async def _beginning(response: "httpx.Response") -> str:
    """The beginning of the body of an error."""
    data = b""
    async for part in response.aiter_bytes():
        data += part
        if len(data) > MAX_EVENT:
            break
    return _text(data.decode(errors="replace"))


def _text(what: object) -> str:
    """A short text in one line."""
    text = " ".join(str(what).split()) or type(what).__name__
    return text if len(text) <= MAX_DETAIL else f"{text[:MAX_DETAIL]}…"
