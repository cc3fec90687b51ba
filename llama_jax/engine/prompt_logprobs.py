"""The log-probabilities of the tokens of a prompt, in a compact form. Imports no JAX.

Those of 131,072 tokens with 20 alternatives each take 22 MB. As Python objects they would take
hundreds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np


class ScoredToken(NamedTuple):
    """A token of a prompt, given those before it.

    Attributes:
      logprob: of the token.
      top: (token id, log-probability) of the most likely tokens, the likeliest first.
      rank: how many tokens are likelier, plus 1.
    """

    logprob: float
    top: list[tuple[int, float]]
    rank: int


@dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the T tokens of a prompt, before penalties, temperature and filters.

    It is read like a list of T items: None for the first token, which nothing precedes, and a
    `ScoredToken` for each of the others. Its fields are arrays as bytes, with k alternatives.

    Attributes:
      logprobs: `[T - 1]` float32.
      ranks: `[T - 1]` int32, how many tokens are likelier, plus 1.
      tokens: `[T - 1, k]` int32, the most likely tokens, the likeliest first.
      top: `[T - 1, k]` float32, theirs; -inf past the end of a small vocabulary.
    """

    logprobs: bytes
    ranks: bytes
    tokens: bytes
    top: bytes

    def __len__(self) -> int:
        return 1 + len(self.logprobs) // 4

    def __repr__(self) -> str:
        return f"<PromptLogprobs: {len(self)} tokens, top {self._alternatives} of each>"

    @overload
    def __getitem__(self, index: int) -> ScoredToken | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[ScoredToken | None]: ...
    def __getitem__(self, index: int | slice) -> ScoredToken | list[ScoredToken | None] | None:
        if isinstance(index, slice):
            wanted = range(len(self))[index]
            if not wanted:
                return []
            first, last = sorted((wanted[0], wanted[-1]))
            return self.read(first, last + 1 - first)[:: wanted.step]
        [item] = self.read(range(len(self))[index], 1)
        return item

    def __iter__(self) -> Iterator[ScoredToken | None]:
        step = 1024  # so that few of the items exist at a time
        for first in range(0, len(self), step):
            yield from self.read(first, step)

    def read(self, first: int, count: int) -> list[ScoredToken | None]:
        """Returns the items of up to `count` tokens from `first` on."""
        rows = slice(max(first - 1, 0), first - 1 + count)
        logprobs, ranks, tokens, top = (array[rows].tolist() for array in self._arrays())
        scored: list[ScoredToken | None] = [
            ScoredToken(
                logprob,
                [(i, x) for i, x in zip(ids, values, strict=True) if x > -np.inf],
                rank,
            )
            for logprob, rank, ids, values in zip(logprobs, ranks, tokens, top, strict=True)
        ]
        return [None, *scored] if first == 0 else scored

    @property
    def _alternatives(self) -> int:
        return len(self.tokens) // max(1, len(self.logprobs))

    def _arrays(self) -> tuple[np.ndarray, ...]:
        logprobs = np.frombuffer(self.logprobs, np.float32)
        k = self._alternatives
        return (
            logprobs,
            np.frombuffer(self.ranks, np.int32),
            np.frombuffer(self.tokens, np.int32).reshape(len(logprobs), k),
            np.frombuffer(self.top, np.float32).reshape(len(logprobs), k),
        )


class PromptScoring:
    """Collects the scores of one prompt, tile by tile, in the order of the prompt.

    Attributes:
      count: how many tokens at the beginning have been used to score the token after them.
    """

    def __init__(self, num_prompt: int, alternatives: int) -> None:
        """Expects the scores of a prompt of T tokens, with k alternatives each."""
        self.count = 0
        self._rows, self._k = num_prompt - 1, alternatives
        self._arrays: tuple[np.ndarray, ...] | None = None  # a waiting request needs no memory

    def put(
        self,
        first: int,
        logprobs: np.ndarray,
        ranks: np.ndarray,
        tokens: np.ndarray,
        top: np.ndarray,
    ) -> None:
        """Takes the scores of the n tokens that follow the positions from `first` on.

        Args:
          first: at most `self.count`.
          logprobs, ranks: `[n]`; what is past the end of the prompt is left out.
          tokens, top: `[n, MAX_LOGPROBS]`.
        """
        assert first <= self.count, "scores are missing"
        if self._arrays is None:
            n, k = self._rows, self._k
            shapes = (((n,), "f4"), ((n,), "i4"), ((n, k), "i4"), ((n, k), "f4"))
            self._arrays = tuple(np.empty(shape, kind) for shape, kind in shapes)
        found = (logprobs, ranks, tokens[:, : self._k], top[:, : self._k])
        for array, values in zip(self._arrays, found, strict=True):
            array[first : first + len(values)] = values[: self._rows - first]
        self.count = min(max(self.count, first + len(logprobs)), self._rows)

    def result(self) -> PromptLogprobs:
        """Returns the scores of the whole prompt."""
        assert self.count == self._rows, "scores are missing"
        if self._arrays is None:  # the prompt is one token
            return PromptLogprobs(b"", b"", b"", b"")
        return PromptLogprobs(*(array.tobytes() for array in self._arrays))
