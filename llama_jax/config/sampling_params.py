"""The parameters of a request: how its tokens are chosen and when it ends. Imports no JAX."""

import math
from dataclasses import dataclass

from llama_jax.config.errors import SamplingError

MAX_TOP_K = 2**31 - 1  # an int32 on the device


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Attributes:
      max_tokens: maximum number of tokens to generate; None for as many as fit the context.
      temperature: 0 is greedy (always the most likely token); otherwise divides the logits.
      top_k: keep the k most likely tokens; 0 keeps all. Ties with the k-th are kept.
      top_p: of the remaining tokens, keep the smallest set with this share of the probability.
      min_p: of the remaining tokens, keep those at least this likely relative to the most likely.
      seed: fixes the request's random numbers, whatever else is in the batch; None picks one.
      stop: strings that end the generation; the returned text does not include them.
      stop_token_ids: token ids that end the generation, in addition to the model's EOS ids.
      ignore_eos: continue after the model's EOS ids.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def check(self) -> None:
        """Checks every range. Types are not checked, nor ids against a vocabulary.

        Raises:
          SamplingError: a value is out of range; `param` is the field.
        """
        rules = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", _within(self.temperature, 0, 2), "in [0, 2]"),
            ("top_k", 0 <= self.top_k <= MAX_TOP_K, "in [0, 2**31)"),
            ("top_p", _within(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1]"),
            ("min_p", _within(self.min_p, 0, 1), "in [0, 1]"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            ("stop", all(self.stop), "a list of non-empty strings"),
        )
        for name, holds, allowed in rules:
            if not holds:
                value = getattr(self, name)
                raise SamplingError(f"{name} must be {allowed}, got {value!r}.", name)

    @property
    def greedy(self) -> bool:
        """Whether every token is the most likely one, with no random choice."""
        return self.temperature == 0


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high
