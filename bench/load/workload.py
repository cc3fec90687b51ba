"""What a load test sends: when each request arrives, its prompt, and how long its answer is.

Requests are those that the planner simulates: drawn (`Workload`) or those of a trace (`Replay`).
Here they get contents. Everything is drawn before the first request is sent, from a seed. So no
answer, however late, can delay a later request, and two servers can be given exactly the same load.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from llama_jax.plan.simulation.load import Draw, LoadError, Request

MAX_PROMPT_TOKENS = 200_000_000  # of all requests together
# Short and common: with the space before it, each is one token of most vocabularies.
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law "
    "car city name team minute idea body back parent face others level office door health person "
    "art war history party result change morning reason research girl guy moment air teacher force"
).split()


class LoadRequest(NamedTuple):
    """A request to send.

    Attributes:
      at: seconds from the start of the test to its arrival.
      prompt: a text, or token ids.
      max_tokens: the length of the answer.
    """

    at: float
    prompt: str | list[int]
    max_tokens: int


@dataclass(frozen=True, kw_only=True)
class Workload(Draw):
    """Requests at random times with lengths of a distribution, with contents.

    Attributes:
      vocab_size: as in `with_contents`.
      test: the number of this test of a series. Tests have the lengths of their seed in common, but
        no prompt: else the server would find those of the last test in its prefix cache.
    """

    vocab_size: int | None = None
    test: int = 0

    def to_send(self) -> list[LoadRequest]:
        """Draws the requests, in the order of their arrival.

        Raises:
          LoadError: there would be too many, or too long ones.
        """
        return with_contents(self.requests(), self.vocab_size, self.seed, self.test)

    def warm_up(self, count: int) -> list[LoadRequest]:
        """Other requests like these, of which the server finds nothing in its cache later."""
        return replace(self, num_requests=count, duration=None, seed=self.seed + 1).to_send()


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The requests of a trace, with contents.

    Attributes:
      requests: from `llama_jax.plan.simulation.traces.read_trace`.
      vocab_size, seed: as in `with_contents`.
    """

    requests: Sequence[Request]
    vocab_size: int | None = None
    seed: int = 0

    def to_send(self) -> list[LoadRequest]:
        """The requests, in the order of their arrival.

        Raises:
          LoadError: they are too long.
        """
        return with_contents(self.requests, self.vocab_size, self.seed)

    def warm_up(self, count: int) -> list[LoadRequest]:
        """The first requests with other contents."""
        return with_contents(self.requests[:count], self.vocab_size, self.seed + 1)


def with_contents(
    requests: Sequence[Request], vocab_size: int | None, seed: int, test: int = 0
) -> list[LoadRequest]:
    """Gives requests prompts that begin alike if and only if their runs do.

    Args:
      requests: as the planner simulates them.
      vocab_size: prompts are token ids below it; None for English words, about a token each.
      seed, test: of the contents.

    Raises:
      LoadError: all prompts together are too long.
    """
    if sum(request.prompt_tokens for request in requests) > MAX_PROMPT_TOKENS:
        raise LoadError(
            f"All prompts together would be longer than {MAX_PROMPT_TOKENS} tokens: ask for fewer "
            "or shorter ones."
        )
    limit = len(WORDS) if vocab_size is None else vocab_size
    of_nobody_else = np.random.default_rng([seed, test, 0])

    def draw(rng: np.random.Generator, size: int) -> list[int]:
        return rng.integers(0, limit, size).tolist()

    def prompt(request: Request) -> str | list[int]:
        tokens: list[int] = []
        for run in request.runs:  # a shorter run of a text is its beginning
            tokens += draw(np.random.default_rng([seed, test, 1, run.text]), run.tokens)
        tokens += draw(of_nobody_else, request.prompt_tokens - len(tokens))
        return tokens if vocab_size is not None else " ".join([WORDS[token] for token in tokens])

    return [LoadRequest(each.at, prompt(each), each.output_tokens) for each in requests]
