"""An engine on a logical clock: its scheduler, tick loop and admission."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.tick_loop import TickLoop
from llama_jax.plan.simulation.clock import Clock, pass_on
from llama_jax.plan.simulation.front import Front, Ticket
from llama_jax.plan.simulation.load import Request
from llama_jax.plan.simulation.server import Server

FIRST_TEXT = 1  # the token of the first text; `clock.ANSWER` is that of every answer


class Attempt(NamedTuple):
    """A request on its way: `number` among all, the time of this attempt, and of the first."""

    at: float
    number: int
    request: Request
    since: float
    attempts: int = 1


@dataclass(slots=True)
class Open:
    """An admitted request that has not ended."""

    attempt: Attempt
    ticket: Ticket
    queued: float | None = None
    first: float | None = None
    cached: int = 0


class Engine:
    """The scheduler, tick loop and admission of an engine, with a clock in place of its devices.

    Args:
      server: what is simulated.
      now: the time when it is ready.

    Attributes:
      clock, loop, front: of this engine.
      open: by request id, those that have not ended.
      begun: those of them that have had their first token.
    """

    def __init__(self, server: Server, now: float = 0.0) -> None:
        self.clock = Clock(server)
        self.clock.now = now
        executor: Any = self.clock
        scheduler = Scheduler(
            server.sizes,
            server.num_stages,
            prefix_caching=server.prefix_caching,
            chunks=server.chunks(),
        )
        self.loop = TickLoop(
            scheduler, executor, server.results_late, clock=self.time, encode=pass_on
        )
        self.front = Front(server, self.time)
        self.open: dict[int, Open] = {}
        self.begun: set[int] = set()
        self._pool = scheduler.pool
        self._params: dict[int, SamplingParams] = {}  # by the tokens of the answer
        self._longest = server.max_model_len

    def time(self) -> float:
        """The time in seconds."""
        return self.clock.now

    @property
    def pages_held(self) -> int:
        """The pages that requests hold."""
        return self._pool.num_pages - self._pool.num_free

    def add(self, attempt: Attempt) -> bool:
        """Queues a request; returns whether there was room."""
        request = attempt.request
        if request.prompt_tokens >= self._longest:
            return False  # the server refuses it, whatever else there is
        ticket = self.front.admit(request.prompt_tokens)
        if ticket is None:
            return False
        self.clock.arrived += 1
        self.open[attempt.number] = Open(attempt, ticket)
        self.loop.scheduler.add(
            attempt.number,
            prompt_of(attempt),
            self._params_of(request.output_tokens),
            max_model_len=self._longest,
            seed=0,
            stop_ids=frozenset(),
            arrived_at=attempt.at,
        )
        return True

    def num_answered(self, number: int) -> int:
        """The tokens that an open request has been answered with."""
        request = self.open[number].attempt.request
        known = self.loop.scheduler.num_answered(number)
        if known is not None:
            return known
        # It has just ended, which it does at its length only.
        return min(request.output_tokens, self._longest - request.prompt_tokens)

    def remove(self, number: int) -> None:
        """Removes a request, which may have ended."""
        self.loop.scheduler.abort(number)
        self.begun.discard(number)
        self.open.pop(number).ticket.end()

    def _params_of(self, output_tokens: int) -> SamplingParams:
        """Parameters are costly to make, and many requests have the same."""
        if output_tokens not in self._params:
            self._params[output_tokens] = SamplingParams(temperature=0, max_tokens=output_tokens)
        return self._params[output_tokens]


def prompt_of(attempt: Attempt) -> list[int]:
    """Token ids with which prompts begin alike if and only if their runs do."""
    tokens: list[int] = []
    for run in attempt.request.runs:
        tokens += [FIRST_TEXT + run.text] * run.tokens
    # Of nobody else: the runs of the others have numbers of 0 and more.
    return tokens + [-attempt.number - 1] * (attempt.request.prompt_tokens - len(tokens))
