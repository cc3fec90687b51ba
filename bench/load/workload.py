"""What a load test sends: when each request arrives, its prompt, and how long its answer is.

Everything is drawn before the first request is sent, from a seed. So no answer, however late, can
delay a later request, and two servers can be given exactly the same load.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llama_jax.plan.simulation.load import Draw, LoadError

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
    """A load, as the planner simulates it (`llama_jax.plan.simulation.load.Draw`), with contents.

    Attributes:
      vocab_size: prompts are token ids below it; None for English words, about a token each.
    """

    vocab_size: int | None = None

    def to_send(self) -> list[LoadRequest]:
        """Draws the requests, in the order of their arrival.

        Raises:
          LoadError: there would be too many, or too long ones.
        """
        requests, (*_, tokens) = self.requests(), self.streams()
        total = sum(request.prompt_tokens for request in requests)
        if total + self.prefix_tokens * self.prefixes > MAX_PROMPT_TOKENS:
            raise LoadError(
                f"All prompts together would be longer than {MAX_PROMPT_TOKENS} tokens: ask for "
                "fewer or shorter ones."
            )
        shared = [self._tokens(tokens, self.prefix_tokens) for _ in range(self.prefixes)]
        return [
            LoadRequest(
                at,
                self._prompt(
                    (shared[runs[0].text] if runs else [])
                    + self._tokens(tokens, length - self.prefix_tokens)
                ),
                limit,
            )
            for at, length, limit, runs, *_ in requests
        ]

    def _tokens(self, rng: np.random.Generator, size: int) -> list[int]:
        limit = len(WORDS) if self.vocab_size is None else self.vocab_size
        return rng.integers(0, limit, size).tolist()

    def _prompt(self, tokens: list[int]) -> str | list[int]:
        if self.vocab_size is not None:
            return tokens
        return " ".join(WORDS[token] for token in tokens)
