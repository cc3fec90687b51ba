"""What a request may ask of the sampler and of the end of its generation. Imports no JAX."""

import math
from dataclasses import dataclass

from sharding.errors import UserError

MAX_TOP_K = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Attributes:
      max_tokens: most tokens to generate; None for as many as the context has room for.
      temperature: 0 is greedy (the most likely token); otherwise logits are divided by it.
      top_k: keep the k most likely tokens; 0 keeps all. Ties with the k-th are kept.
      top_p: of what is left, keep the smallest set of tokens that holds this share of the mass.
      min_p: of what is left, keep tokens at least this likely relative to the most likely one.
      seed: fixes the request's random stream, whatever else is in the batch; None draws one.
      stop: strings that end the generation; they are not part of the text that is returned.
      stop_token_ids: token ids that end the generation, beside the model's own EOS ids.
      ignore_eos: go on after the model's EOS ids.
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
        """Raises UserError, one sentence that names the field, where a value is out of range."""
        rules = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("temperature", _within(self.temperature, 0, 2), "in [0, 2]"),
            ("top_k", 0 <= self.top_k <= MAX_TOP_K, "in [0, 2**31)"),
            ("top_p", _within(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1]"),
            ("min_p", _within(self.min_p, 0, 1), "in [0, 1]"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a 64-bit integer"),
            ("stop", all(self.stop), "a list of strings none of which is empty"),
        )
        for name, holds, wanted in rules:
            if not holds:
                raise UserError(f"{name} must be {wanted}, got {getattr(self, name)!r}.")

    @property
    def greedy(self) -> bool:
        """Whether no token is drawn."""
        return self.temperature == 0


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high
