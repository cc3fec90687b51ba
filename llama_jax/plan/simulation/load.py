"""What a simulated deployment is asked: requests, and when they come. Imports no JAX."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from llama_jax.plan.simulation.lengths import Lengths
from sharding.errors import UserError

ARRIVALS = ("poisson", "constant")
MAX_REQUESTS = 1_000_000


class LoadError(UserError):
    """The load that is asked for makes no sense."""


class Run(NamedTuple):
    """A piece of a prompt, as far as its content matters: whether others begin alike.

    Attributes:
      text: a number for its content. The same number is the same text.
      tokens: its length.
    """

    text: int
    tokens: int


class Request(NamedTuple):
    """A request to simulate.

    Attributes:
      at: seconds from the start to its arrival.
      prompt_tokens, output_tokens: its lengths.
      runs: the content with which the prompt begins, in order; no other has what follows.
      patience: seconds after which the client goes away.
      since: when its client sent it first, if this is not the first time.
    """

    at: float
    prompt_tokens: int
    output_tokens: int
    runs: tuple[Run, ...] = ()
    patience: float = float("inf")
    since: float | None = None


@dataclass(frozen=True)
class Load:
    """Requests, and when they come.

    Attributes:
      requests: in the order of their arrival.
      users: None if requests come at their times, whether or not others are answered (an open
        loop). Else so many users ask at once, and each sends the next request when it has its
        answer (a closed loop): the times do not count.
      think: seconds from an answer to the next request of its user, in a closed loop.
      until: when users stop, in a closed loop, in seconds from the start.
    """

    requests: Sequence[Request]
    users: int | None = None
    think: float = 0.0
    until: float = float("inf")

    def deal(self, hands: int) -> list["Load"]:
        """Splits the load over replicas, each of which gets every `hands`-th request or user."""
        users = [None if self.users is None else (self.users + hands - 1 - i) // hands
                 for i in range(hands)]  # fmt: skip
        return [replace(self, requests=self.requests[i::hands], users=users[i])
                for i in range(hands)]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Requests at random times with lengths of a distribution.

    Attributes:
      rate: requests per second; infinite if all arrive at once.
      arrivals: "poisson" (exponential gaps) or "constant".
      num_requests: how many; None if `duration` is given.
      duration: seconds in which requests arrive; None if `num_requests` is given.
      prompt, answer: the lengths; that of the prompt is without the shared prefix.
      prefix_tokens, prefixes: each prompt begins with one of `prefixes` shared ones of this length.
      seed: of all random numbers. The same seed gives the same lengths, and the same gaps relative
        to their mean, at every rate (common random numbers).
    """

    rate: float
    arrivals: str = "poisson"
    num_requests: int | None = None
    duration: float | None = None
    prompt: Lengths
    answer: Lengths
    prefix_tokens: int = 0
    prefixes: int = 1
    seed: int = 0

    def times(self, rng: np.random.Generator) -> np.ndarray:
        """The times of arrival, from 0 on, in seconds."""
        gap = 1 / self.rate
        if self.num_requests is not None:
            gaps = self._gaps(rng, gap, self.num_requests)
            gaps[0] = 0
            return np.cumsum(gaps)
        assert self.duration is not None
        if self.rate * self.duration > MAX_REQUESTS:
            raise LoadError(
                f"{self.rate:g} requests per second for {self.duration:g} seconds are more than "
                f"{MAX_REQUESTS}: ask for fewer."
            )
        at = np.zeros(1)
        while at[-1] < self.duration:
            more = self._gaps(rng, gap, 1 + int(self.rate * self.duration))
            at = np.concatenate([at, at[-1] + np.cumsum(more)])
        return at[at < self.duration]

    def requests(self) -> list[Request]:
        """Draws the requests, in the order of their arrival.

        Raises:
          LoadError: there would be too many.
        """
        streams = map(np.random.default_rng, np.random.SeedSequence(self.seed).spawn(4))
        times, prompts, answers, prefixes = streams
        at = self.times(times)
        lengths = self.prompt.draw(prompts, len(at))
        limits = self.answer.draw(answers, len(at))
        chosen = prefixes.integers(0, self.prefixes, len(at))
        drawn = zip(at.tolist(), lengths.tolist(), limits.tolist(), chosen.tolist(), strict=True)
        shared = self.prefix_tokens
        return [
            Request(time, shared + length, limit, (Run(prefix, shared),) if shared else ())
            for time, length, limit, prefix in drawn
        ]

    def _gaps(self, rng: np.random.Generator, gap: float, size: int) -> np.ndarray:
        if self.arrivals == "constant":
            return np.full(size, gap)
        return gap * rng.exponential(1.0, size)
