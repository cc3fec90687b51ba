"""A server whose tokens take so long that comments come between them."""

from llama_jax.serve.generation.event_stream import KEEP_ALIVE
from tests.support.fake_client import FakeServer

SHORT = 0.001  # seconds between comments


class Pausing:
    """An application in front of a `FakeServer`: each token comes after two comments.

    For one stream at a time.

    Attributes:
      comments: the number of comments sent.
    """

    def __init__(self, server: FakeServer) -> None:
        """Puts itself in front of the server's application."""
        self._app, self._engine = server.app, server.engine
        self.comments = 0
        server.served.keep_alive_seconds = SHORT
        server.app = self

    async def __call__(self, scope, receive, send) -> None:
        async def watch(message):
            await send(message)
            if message.get("body") == KEEP_ALIVE:
                self.comments += 1
                if self.comments % 2 == 0:
                    self._engine.hold.set()
            elif message.get("body"):
                self._engine.hold.clear()

        self._engine.hold.clear()
        scope.pop("extensions", None)  # the shortcut past `send`
        await self._app(scope, receive, watch)
