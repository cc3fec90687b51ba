"""Masks of the vocabulary: bit t % 32 of word t // 32 is set if token t is allowed."""

from collections.abc import Iterable

import numpy as np

_WORD = 32  # bits


def make_mask(vocab_size: int, tokens: Iterable[int]) -> np.ndarray:
    """Returns the mask that allows these tokens: `[V / 32]` int32."""
    mask = np.zeros(-(-vocab_size // _WORD), np.int32)
    words, bits = _bits(tokens)
    np.bitwise_or.at(mask.view(np.uint32), words, bits)
    return mask


def forbid(mask: np.ndarray, tokens: Iterable[int]) -> None:
    """Takes tokens out of a mask."""
    words, bits = _bits(tokens)
    np.bitwise_and.at(mask.view(np.uint32), words, ~bits)


def _bits(tokens: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """The word of each token, and its bit there."""
    ids = np.fromiter(tokens, np.int64)
    return ids // _WORD, np.uint32(1) << (ids % _WORD).astype(np.uint32)
