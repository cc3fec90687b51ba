"""Requests that wait for their grammars to be compiled, before they join the scheduler's queue."""

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.constraint import Constraint
from llama_jax.engine.errors import RequestError
from llama_jax.engine.grammars import Grammars, Matcher
from llama_jax.engine.interface import Output

WAIT_SECONDS = 0.02  # an idle engine looks for messages so often


class CompilingRequests:
    """Requests whose grammars are being compiled, by request id.

    Nobody waits for them: a request joins the queue when it can run, behind those that came later
    and were ready before.
    """

    def __init__(self, grammars: Grammars) -> None:
        """Compiles with `grammars`."""
        self._grammars = grammars
        self._waiting: dict[int, tuple[Future[Matcher], Callable[[Matcher], None]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(
        self,
        request_id: int,
        params: SamplingParams,
        vocab_size: int,
        queue: Callable[..., None],
    ) -> None:
        """Begins to compile the grammar of a request.

        Args:
          request_id: not in use.
          params: with a grammar.
          vocab_size: V.
          queue: adds the request to the scheduler; called with its `constraint`.
        """

        def ready(matcher: Matcher) -> None:
            queue(constraint=Constraint(params, vocab_size, matcher))

        self._waiting[request_id] = (self._grammars.compile(params.grammar), ready)

    def abort(self, request_id: int) -> None:
        """Drops a request, if it is one of these."""
        if waiting := self._waiting.pop(request_id, None):
            waiting[0].cancel()

    def wait(self) -> None:
        """Waits a moment for a grammar."""
        wait([future for future, _ in self._waiting.values()], WAIT_SECONDS, FIRST_COMPLETED)

    def queue_ready(self) -> list[Output]:
        """Queues the requests that can run now; returns the ends of those that never will."""
        outputs = []
        for request_id in [i for i, (future, _) in self._waiting.items() if future.done()]:
            future, ready = self._waiting.pop(request_id)
            try:
                ready(future.result())
            except RequestError as error:
                outputs.append(Output.of_error(request_id, error))
        return outputs
