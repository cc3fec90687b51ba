"""A client at the level of ASGI, because HTTP libraries cannot disconnect halfway."""

import asyncio
import json

from tests.support.fake_client import FakeServer

SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/v1/chat/completions",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}


class Connection:
    """A POST request to the application of a `FakeServer`, made in the running event loop.

    Attributes:
      sent: the messages from the server.
      gone: set it to disconnect.
    """

    def __init__(
        self, server: FakeServer, body: dict, send=None, path: str = SCOPE["path"]
    ) -> None:
        self.sent: list[dict] = []
        self.gone = asyncio.Event()
        self._body = [json.dumps(body).encode()]
        scope = {**SCOPE, "path": path}
        self.task = asyncio.create_task(server.app(scope, self._receive, send or self._send))

    @property
    def data(self) -> list[bytes]:
        """What the server has sent of the body, piece by piece."""
        return [message["body"] for message in self.sent if message.get("body")]

    async def _receive(self) -> dict:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        await asyncio.sleep(0)
        self.sent.append(message)


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0)
