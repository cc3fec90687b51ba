"""Requests that wait for something to be compiled, before they join the scheduler's queue."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, NamedTuple

from llama_jax.engine.errors import RequestError
from llama_jax.engine.grammars import Matcher
from llama_jax.engine.interface import Output

WAIT_SECONDS = 0.02  # an idle engine looks for messages so often

NO_PROGRAM = "The programs for penalties, masks and log-probabilities could not be compiled."


class _Waiting(NamedTuple):
    grammar: Future[Matcher] | None
    queue: Callable[[Matcher | None], None]


class CompilingRequests:
    """Requests whose grammars or programs are being compiled, by request id.

    Nobody waits for them: a request joins the queue when it can run, behind those that came later
    and were ready before.
    """

    def __init__(self, programs: Future[None]) -> None:
        """The requests need `programs` (`WarmUp.every_request`)."""
        self._programs = programs
        self._waiting: dict[int, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_programs(self) -> bool:
        """Whether the programs are there, so that only a grammar may have to be waited for."""
        return self._programs.done() and self._programs.exception() is None

    def add(
        self,
        request_id: int,
        queue: Callable[[Matcher | None], None],
        grammar: Future[Matcher] | None = None,
    ) -> None:
        """Lets a request wait.

        Args:
          request_id: not in use.
          queue: adds the request to the scheduler; called with its matcher.
          grammar: its grammar, if it has one.
        """
        self._waiting[request_id] = _Waiting(grammar, queue)

    def abort(self, request_id: int) -> None:
        """Drops a request, if it is one of these."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None and waiting.grammar is not None:
            waiting.grammar.cancel()

    def wait(self) -> None:
        """Waits a moment for something that a request needs."""
        needed: list[Future[Any]] = [self._programs]
        needed += [each.grammar for each in self._waiting.values() if each.grammar is not None]
        wait([future for future in needed if not future.done()], WAIT_SECONDS, FIRST_COMPLETED)

    def queue_ready(self) -> list[Output]:
        """Queues the requests that can run now; returns the ends of those that never will."""
        outputs: list[Output] = []
        if not self._waiting or not self._programs.done():
            return outputs
        ready = [
            request_id
            for request_id, each in self._waiting.items()
            if each.grammar is None or each.grammar.done()
        ]
        for request_id in ready:
            grammar, queue = self._waiting.pop(request_id)
            if not self.has_programs:
                outputs.append(Output(request_id, None, "error", NO_PROGRAM))
                continue
            try:
                queue(None if grammar is None else grammar.result())
            except RequestError as error:
                outputs.append(Output.of_error(request_id, error))
        return outputs
