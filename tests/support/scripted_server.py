"""An OpenAI-compatible server without a network, whose every answer follows a script."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import httpx

END = b"data: [DONE]\n\n"


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(word: str = "a", finish_reason: str | None = None) -> bytes:
    """An event of a completion with text."""
    return event(choices=[{"index": 0, "text": word, "finish_reason": finish_reason}])


def delta(finish_reason: str | None = None, **fields) -> bytes:
    """An event of a chat."""
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish_reason}])


def usage(output: int, prompt: int = 7) -> bytes:
    """The last event, which counts the tokens."""
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": output})


# Seconds to wait, bytes to send, or an exception to raise.
Step = float | bytes | Exception
# (request, number of requests before it) -> the steps of the answer; status 200
Script = Callable[[httpx.Request, int], Sequence[Step] | Awaitable[Sequence[Step]]]


class ScriptedServer(httpx.AsyncBaseTransport):
    """Answers by a script.

    Attributes:
      requests: all requests so far, each with the time of its arrival.
    """

    def __init__(self, script: Script, status: int = 200) -> None:
        self._script, self._status = script, status
        self.requests: list[tuple[float, httpx.Request]] = []

    @property
    def bodies(self) -> list[dict]:
        return [json.loads(request.content) for _, request in self.requests]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        number = len(self.requests)
        self.requests.append((asyncio.get_running_loop().time(), request))
        steps = list(self._script(request, number))
        while steps and not isinstance(steps[0], bytes):  # before the headers
            await _do(steps.pop(0))
        return httpx.Response(self._status, stream=_Stream(steps))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, steps: list[Step]) -> None:
        self._steps = steps

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for step in self._steps:
            if isinstance(step, bytes):
                yield step
            else:
                await _do(step)


async def _do(step: Step) -> None:
    if isinstance(step, Exception):
        raise step
    await asyncio.sleep(step)
