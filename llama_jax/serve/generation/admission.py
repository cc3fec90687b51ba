"""Admits requests while the engine has room, by the number of answers and by prompt tokens.

An answer needs a place: the engine runs and queues only so many. A request gets places for all its
answers, or is refused. A list of prompts for which there are too few places waits instead, and its
prompts get places in order as others end (`_Line`).

Requests are admitted before they are tokenized, so that one that is refused costs nothing more, and
many that arrive together do not wait for the tokenizer only to be refused.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

from llama_jax.client.client import EngineClient
from llama_jax.engine.errors import RequestTimeout
from llama_jax.serve.errors import queue_full, queue_tokens_full
from llama_jax.serve.monitoring.metrics import Metrics

MAX_QUEUE_TOKENS = 2**19
MAX_RETRY_SECONDS = 60


class Admission:
    """Reserves places for the answers of a request, from its arrival to their start.

    It also measures how fast the engine works off its queue, to tell a client when to come back.
    """

    def __init__(self, engine: EngineClient, metrics: Metrics, max_queue_tokens: int) -> None:
        """Admits to this engine.

        Args:
          engine: the engine.
          metrics: counts what is refused.
          max_queue_tokens: maximum tokens of the prompts that have no first token yet. A longer
            request is admitted if there are no others.
        """
        self._engine = engine
        self._metrics = metrics
        self._max_queue_tokens = max_queue_tokens
        self._reserved = 0
        self._line = _Line(self)
        self.queue_tokens = 0
        self._answers = _Drain(metrics)
        self._tokens = _Drain(metrics)

    @contextmanager
    def reserve(
        self, prompts: Sequence[int], choices: int = 1, deadline: float | None = None
    ) -> Iterator[list["Place"]]:
        """Reserves a place for each answer, until it is entered or this context ends.

        Args:
          prompts: the number of tokens of each prompt; of a text, an estimate that `recount`
            corrects.
          choices: answers to each prompt.
          deadline: the event loop's time after which a place is not worth waiting for.

        Returns:
          A place for each answer, those of one prompt adjacent. The places of a list that is too
          large are not reserved: entering them waits.

        Raises:
          ApiError: 429, there is no room.
        """
        self._check_places(len(prompts), choices)
        self._check_tokens(sum(prompts))
        reserved = not self._must_wait(len(prompts), choices)
        # The other choices of a prompt find what the first has computed.
        places = [
            Place(self, 0 if choice else tokens, reserved, deadline)
            for tokens in prompts
            for choice in range(choices)
        ]
        try:
            yield places
        finally:
            for place in places:
                place.give_up()

    def recount(self, places: "Sequence[Place]", prompts: Sequence[int]) -> None:
        """Counts the tokens of prompts that have been tokenized, in place of the estimates.

        Args:
          places: those that `reserve` returned. None has been entered.
          prompts: the number of tokens of each prompt.

        Raises:
          ApiError: 429, there is no room for so many.
        """
        self._check_tokens(sum(prompts), estimated=sum(place.tokens for place in places))
        firsts = places[:: len(places) // len(prompts)]
        for place, tokens in zip(firsts, prompts, strict=True):
            place.recount(tokens)

    def _check_places(self, prompts: int, choices: int) -> None:
        answers = prompts * choices
        taken = self._engine.in_flight + self._reserved
        if taken < self._engine.info.max_num_seqs:
            self._answers.restart()
        if self._must_wait(prompts, choices):
            room = self._free > 0 and self._line.has_room(answers)
        else:
            room = answers <= self._free
        if not room:
            self._metrics.rejected("queue_full")
            waiting = taken - self._engine.info.max_num_seqs
            raise queue_full(taken, answers, self._answers.seconds_for(waiting))

    def _check_tokens(self, tokens: int, estimated: int = 0) -> None:
        others = self.queue_tokens - estimated
        if not others:
            self._tokens.restart()
            return
        excess = others + tokens - self._max_queue_tokens
        if excess > 0:
            self._metrics.rejected("queue_tokens")
            seconds = self._tokens.seconds_for(min(excess, others))
            raise queue_tokens_full(others, tokens, seconds)

    def _must_wait(self, prompts: int, choices: int) -> bool:
        """Whether a request gets its places one by one: a list for which there are too few now, or
        any request for which there are never enough."""
        room = self._free if prompts > 1 else self._engine.max_in_flight
        return prompts * choices > room

    @property
    def _free(self) -> int:
        return self._engine.max_in_flight - self._engine.in_flight - self._reserved


class Place:
    """The place of one answer: an async context manager around its generation.

    Attributes:
      tokens: of its prompt, if this is the first answer to it; else 0.
      deadline: the event loop's time by which the answer must have ended, or None.
    """

    def __init__(
        self, admission: Admission, tokens: int, reserved: bool, deadline: float | None
    ) -> None:
        self.tokens = tokens
        self.deadline = deadline
        self._admission = admission
        self._counts = False
        self._reserved = reserved
        self._entered = self._from_line = False
        self._hold(1)
        self._count(True)

    def give_up(self) -> None:
        """Ends the reservation of a place that has not been entered."""
        if not self._entered:
            self._count(False)
            self._hold(-1)
            self._admission._line.advance()

    def recount(self, tokens: int) -> None:
        """Corrects the number of tokens of its prompt."""
        self._count(False)
        self.tokens = tokens
        self._count(True)

    def begun(self) -> None:
        """Records that the first token has arrived, so that the prompt no longer waits."""
        if self._counts:
            self._admission._tokens.add(self.tokens)
            self._count(False)

    async def __aenter__(self) -> None:
        """Waits for the place, unless it is reserved.

        Raises:
          RequestTimeout: the deadline has passed.
        """
        self._entered = True
        self._count(True)
        # The engine or the line counts the answer from here on: nothing is awaited before.
        self._hold(-1)
        if self._reserved:
            return
        try:
            async with in_time(self.deadline):
                await self._admission._line.wait()
        except BaseException:
            self._count(False)
            raise
        self._from_line = True

    async def __aexit__(self, *error: object) -> None:
        self._count(False)
        self._admission._answers.add(1)
        if self._from_line:
            self._admission._line.leave()
        self._admission._line.advance()

    def _count(self, counts: bool) -> None:
        """Counts the tokens of the prompt as queued, or no longer."""
        self._admission.queue_tokens += self.tokens * (counts - self._counts)
        self._counts = counts

    def _hold(self, change: int) -> None:
        """Counts the answer as reserved, or as one that will wait in the line, or no longer."""
        if self._reserved:
            self._admission._reserved += change
        else:
            self._admission._line.expected += change


@asynccontextmanager
async def in_time(deadline: float | None) -> AsyncIterator[None]:
    """Ends its body with `RequestTimeout` at this time of the event loop; None is never."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise RequestTimeout from None


class _Line:
    """Answers of lists that wait for a place, first come, first served.

    They hold at most the places of running answers and half of the queue; the other half is left to
    other requests. A place that becomes free goes to the line first.

    Attributes:
      expected: answers that will wait, once their prompts are tokenized.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._turns: deque[asyncio.Future[None]] = deque()
        self._held = 0
        self.expected = 0

    def has_room(self, answers: int) -> bool:
        """Whether more answers may wait: any number if none do, else as many as have places."""
        places = self._admission._engine.max_in_flight
        waiting = self.expected + len(self._turns)
        return not waiting or waiting + answers <= places

    async def wait(self) -> None:
        """Waits for a place, which `leave` gives back."""
        turn = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        self.advance()
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._turns:
                self._turns.remove(turn)
            elif not turn.cancelled():  # it had its turn already
                self._admission._reserved -= 1
                self.leave()
            raise
        # The engine counts the answer from here on: nothing is awaited before it is sent.
        self._admission._reserved -= 1

    def advance(self) -> None:
        """Gives places that are free to those that wait longest."""
        engine = self._admission._engine
        most = max(1, (engine.info.max_num_seqs + engine.max_in_flight) // 2)
        while self._turns and self._held < most and self._admission._free > 0:
            turn = self._turns.popleft()
            if not turn.done():  # else it has just been cancelled
                turn.set_result(None)
                self._held += 1
                self._admission._reserved += 1

    def leave(self) -> None:
        """Gives back a place."""
        self._held -= 1
        self.advance()


class _Drain:
    """Measures how fast a queue is worked off."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.restart()

    def restart(self) -> None:
        """Starts again, because nothing waits now."""
        self._since, self._done = self._metrics.clock(), 0

    def add(self, count: int) -> None:
        """Records that so much has left the queue."""
        self._done += count

    def seconds_for(self, count: int) -> int:
        """Estimates how long it takes to work off so much."""
        busy = self._metrics.clock() - self._since
        # Before anything has left, all that is known is that it takes at least so long.
        seconds = count * busy / self._done if self._done else busy
        return min(max(1, math.ceil(seconds)), MAX_RETRY_SECONDS)
