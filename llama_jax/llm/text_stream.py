"""Streams one answer to a loop or to the output of a notebook cell. Imports no JAX."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import Self

from llama_jax.client.blocking import BlockingClient
from llama_jax.client.text import TextDelta
from llama_jax.engine.errors import EngineDead
from llama_jax.engine.interface import FinishReason, TokenLogprobs
from llama_jax.engine.prompt_logprobs import PromptLogprobs
from llama_jax.llm.notebook.cells import cell_watch, in_notebook
from llama_jax.llm.notebook.display import LiveOutput, running_text


class TextStream(Iterator[str]):
    """Iterates over the text of one answer. Generation starts with the first `next`.

    The request ends when the stream is closed, garbage collected or interrupted, and in IPython
    when the cell that opened it fails. As the last expression of a cell it displays the growing
    text.

    Attributes:
      token_ids: the tokens generated so far.
      logprobs: the log-probabilities at each of them; empty unless `SamplingParams.logprobs` asks.
      prompt_logprobs: those of the prompt, once the first token is there, if
        `SamplingParams.prompt_logprobs` asks for them; else None.
      finish_reason: "stop" or "length" once the answer is complete, else None.
    """

    def __init__(self, engine: BlockingClient, deltas: AsyncGenerator[TextDelta, None]) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: PromptLogprobs | None = None
        self.finish_reason: FinishReason | None = None
        self._engine = engine
        # If the stream is dropped, asyncio closes this generator on the engine's event loop.
        self._deltas = deltas
        self._texts: list[str] = []
        self._open = True
        self._step: asyncio.Task[TextDelta | None] | None = None
        self._ending: asyncio.Task[None] | None = None
        cell_watch.opened(self)

    @property
    def text(self) -> str:
        """The text generated so far."""
        return "".join(self._texts)

    def __next__(self) -> str:
        """Returns the next part of the text, which is never empty.

        Raises:
          GenerationFailed: the engine could not finish the request.
          EngineDead: the engine has ended, or ends before the answer.
        """
        if not self._open:
            raise StopIteration
        cell_watch.used(self)
        try:
            while delta := self._engine.run(self._advance()):
                if delta.text:
                    return delta.text
        except BaseException:  # also an interrupt after the delta was read
            self.begin_close()
            raise
        self._open = False
        raise StopIteration

    def close(self) -> None:
        """Ends the request, if it still runs. May be repeated."""
        self.begin_close()
        with contextlib.suppress(EngineDead):  # then the request has ended, too
            self._engine.run(self._end())

    def begin_close(self) -> None:
        """Like `close`, but does not wait; may be called from any thread."""
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
        """Reads the stream to its end and shows the text meanwhile."""
        if not in_notebook():  # a terminal cannot update earlier output
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

    async def _advance(self) -> TextDelta | None:
        self._step = asyncio.current_task()
        try:
            delta = await anext(self._deltas, None)
        finally:
            self._step = None
        if delta is not None:
            # Here rather than in `__next__`: an interrupt in between must not lose a token.
            self._texts.append(delta.text)
            self.token_ids.append(delta.token)
            if delta.output.logprobs is not None:
                self.logprobs.append(delta.output.logprobs)
            self.prompt_logprobs = delta.output.prompt_logprobs or self.prompt_logprobs
            self.finish_reason = delta.finish_reason
        return delta

    async def _end(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._close_deltas())
        await asyncio.shield(self._ending)

    async def _close_deltas(self) -> None:
        if self._step is not None:
            self._step.cancel()
            await asyncio.wait([self._step])
        await self._deltas.aclose()
