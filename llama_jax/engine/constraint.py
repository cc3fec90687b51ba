"""Which tokens a request may choose next. Imports no JAX."""

from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.bit_mask import forbid, make_mask
from llama_jax.engine.errors import RequestError
from llama_jax.engine.grammars import Matcher


class Constraint:
    """The masks of one request, token by token.

    Attributes:
      follows_answer: whether the mask of a token depends on the tokens before it.
    """

    def __init__(
        self, params: SamplingParams, vocab_size: int, matcher: Matcher | None = None
    ) -> None:
        """Combines a grammar, `allowed_token_ids` and `bad_words`.

        Args:
          params: asks for at least one of them.
          vocab_size: V.
          matcher: of the grammar, if there is one.
        """
        self._matcher = matcher
        # The grammar last: it was checked alone, and requests have several names for it.
        names = ("allowed_token_ids", "bad_words", "grammar")
        self._param = next(name for name in names if getattr(params, name))
        allowed = params.allowed_token_ids or range(vocab_size)
        self._fixed = make_mask(vocab_size, allowed)
        forbid(self._fixed, [word[0] for word in params.bad_words if len(word) == 1])
        # By the token before the last one: the tokens before the last one, and the last one.
        self._bad_words: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for *before, last in params.bad_words:
            if before:
                self._bad_words[before[-1]].append((before, last))
        self._reach = max(map(len, params.bad_words), default=1) - 1
        self.follows_answer = matcher is not None or self._reach > 0

    def take(self, token: int) -> None:
        """Goes on to the next token of the answer, whose mask is computed in the background."""
        if self._matcher is not None:
            self._matcher.take(token)

    def mask(self, tokens: Sequence[int], num_prompt: int, early: Collection[int]) -> np.ndarray:
        """Returns the mask of the next token, `[V / 32]` int32 (`bit_mask`).

        Args:
          tokens: the tokens so far.
          num_prompt: how many of them are the prompt.
          early: tokens that would end the answer too early. If the grammar allows nothing else, it
            is complete, and they are allowed all the same.

        Raises:
          RequestError: no token is allowed.
        """
        mask = self._fixed.copy()
        if self._matcher is not None:
            mask &= self._matcher.mask()
        answer = list(tokens[max(num_prompt, len(tokens) - self._reach) :])
        if answer:
            words = self._bad_words.get(answer[-1], ())
            forbid(mask, [last for before, last in words if answer[-len(before) :] == before])
        if early:
            without = mask.copy()
            forbid(without, early)
            if without.any() or self._matcher is None:
                mask = without
        if not mask.any():
            raise RequestError(
                "The grammar, the allowed tokens and the bad words of the request leave no token "
                "that the answer could go on with.",
                self._param,
            )
        return mask
