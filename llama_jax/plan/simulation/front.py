"""The front of a simulated server: its own admission, with the clock of the simulation."""

from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any

from llama_jax.plan.simulation.server import Server
from llama_jax.serve.errors import ApiError
from llama_jax.serve.generation.admission import Admission


class Front:
    """Admits requests as the server does (`serve.generation.admission`).

    It stands for the engine's client and for the metrics that admission asks.

    Args:
      server: what is simulated.
      clock: returns the time in seconds.

    Attributes:
      in_flight: requests that run or wait.
    """

    def __init__(self, server: Server, clock: Callable[[], float]) -> None:
        self.max_num_seqs = server.sizes.num_slots
        self.max_in_flight = self.max_num_seqs + server.max_queue
        self.in_flight = 0
        self.clock = clock
        stand_in: Any = self
        self._admission = Admission(stand_in, stand_in, server.max_queue_tokens)

    @property
    def info(self) -> "Front":
        """Facts about the engine."""
        return self

    def rejected(self, reason: str) -> None:
        """Counts a refusal; its sample does."""

    def admit(self, prompt_tokens: int) -> "Ticket | None":
        """Admits a request; None if there is no room for it."""
        stack = ExitStack()
        try:
            (place,) = stack.enter_context(self._admission.reserve([prompt_tokens]))
        except ApiError:
            return None
        _run(place.__aenter__())
        self.in_flight += 1
        return Ticket(self, place, stack)


class Ticket:
    """An admitted request."""

    __slots__ = ("_front", "_place", "_stack")

    def __init__(self, front: Front, place: Any, stack: ExitStack) -> None:
        self._front, self._place, self._stack = front, place, stack

    def begun(self) -> None:
        """Its first token has arrived."""
        self._place.begun()

    def end(self) -> None:
        """It has ended."""
        self._front.in_flight -= 1
        _run(self._place.__aexit__())
        self._stack.close()


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("a single prompt waits for no place")
