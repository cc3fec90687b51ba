"""One answer as it comes, for a loop or as the last expression of a cell. Imports no JAX."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import Self

from llama_jax.client.blocking import BlockingClient
from llama_jax.client.text import Piece
from llama_jax.engine.errors import EngineDead
from llama_jax.engine.interface import FinishReason
from llama_jax.llm.notebook.cells import cell_watch, in_notebook
from llama_jax.llm.notebook.display import LiveOutput, running_text


class TextStream(Iterator[str]):
    """Iterates over the pieces of one answer. Nothing is generated before the first is asked for.

    The request ends when the stream is closed, forgotten, interrupted or, in IPython, left open by
    a cell that opened it and failed. As the last expression of a cell it shows itself, and grows.

    Attributes:
      token_ids: of what has come so far.
      finish_reason: "stop" or "length" once the answer is whole, else None.
    """

    def __init__(self, engine: BlockingClient, pieces: AsyncGenerator[Piece, None]) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._engine = engine
        # If nobody reads on, this is forgotten, and asyncio then closes it on the engine's loop.
        self._pieces = pieces
        self._texts: list[str] = []
        self._open = True
        self._step: asyncio.Task[Piece | None] | None = None
        self._ending: asyncio.Task[None] | None = None
        cell_watch.opened(self)

    @property
    def text(self) -> str:
        """What has come so far."""
        return "".join(self._texts)

    def __next__(self) -> str:
        """The next piece, never empty.

        Raises:
          GenerationFailed: the request went wrong while it ran.
          EngineDead: the engine has ended, or ends before the answer does.
        """
        if not self._open:
            raise StopIteration
        cell_watch.used(self)
        try:
            while piece := self._engine.run(self._advance()):
                if piece.text:
                    return piece.text
        except BaseException:  # an interrupt, too, that came when the piece had been read
            self.begin_close()
            raise
        self._open = False
        raise StopIteration

    def close(self) -> None:
        """Ends the request, if it has not ended; nothing more comes. May be repeated."""
        self.begin_close()
        with contextlib.suppress(EngineDead):  # then nothing runs
            self._engine.run(self._end())

    def begin_close(self) -> None:
        """As `close`, without waiting: from any thread."""
        self._open = False
        self._engine.begin(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = self.finish_reason or ("open" if self._open else "closed")
        text = self.text
        return f"<TextStream: {state}, {text[:60] + '...' if len(text) > 60 else text!r}>"

    def _ipython_display_(self) -> None:
        """Reads the stream to its end, and shows it meanwhile."""
        if not in_notebook():  # a terminal cannot replace what it has shown
            print(self.text, end="")
            for piece in self:
                print(piece, end="", flush=True)
            print()
            return
        output = LiveOutput()
        output.show(lambda: running_text(self.text))
        try:
            for _ in self:
                output.show(lambda: running_text(self.text))
        finally:
            output.finish()

    async def _advance(self) -> Piece | None:
        self._step = asyncio.current_task()
        try:
            piece = await anext(self._pieces, None)
        finally:
            self._step = None
        if piece is not None:
            # Here, not where it is read: an interrupt in between must not lose a piece.
            self._texts.append(piece.text)
            self.token_ids.append(piece.token)
            self.finish_reason = piece.finish_reason
        return piece

    async def _end(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._close_pieces())
        await asyncio.shield(self._ending)

    async def _close_pieces(self) -> None:
        if self._step is not None:
            self._step.cancel()
            await asyncio.wait([self._step])
        await self._pieces.aclose()
