"""Selects the best of the choices that were generated (`best_of`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.serve.generation.logprobs import TokenWithLogprobs


@dataclass(frozen=True)
class BestChoices:
    """Keeps the choices of each prompt that are the likeliest per token.

    Attributes:
      count: how many of each prompt.
      logprobs: whether the response has the log-probabilities of their tokens.
    """

    count: int
    logprobs: bool

    def kept(
        self, logprobs: Sequence[Sequence[TokenWithLogprobs]], choices_per_prompt: int
    ) -> list[int]:
        """Returns the numbers of the kept choices: of each prompt in turn, the best first.

        Args:
          logprobs: of the tokens of each choice; those of one prompt are adjacent.
          choices_per_prompt: the number of choices that were generated for each prompt.
        """
        means = [
            math.fsum(found.logprob for _, found in tokens) / max(1, len(tokens))
            for tokens in logprobs
        ]
        kept = []
        for first in range(0, len(means), choices_per_prompt):
            numbers = range(first, first + choices_per_prompt)
            kept += sorted(numbers, key=lambda number: -means[number])[: self.count]
        return kept
