"""Masks of the vocabulary: which tokens a row may choose.

The host computes a mask as one bit per token and sends it with the tick in which the packet leaves.
Each rank gets the bits of its part of the vocabulary, so the masks are sent only once.

`apply_masks` runs inside `shard_map`, on one rank's part of the vocabulary, without collectives.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sharding.partition import round_up

_WORD = 32  # bits


def encode_masks(
    n: int, rows: Sequence[tuple[int, np.ndarray]], vocab_size: int, ranks: int
) -> np.ndarray:
    """Packs the masks of a packet into one array.

    Args:
      n: number of rows.
      rows: (row, mask `[V / 32]` int32, the lowest bit first) of each row that has one.
      vocab_size: V.
      ranks: the devices that the vocabulary is split over.

    Returns:
      `[n, ranks * W]` int32, where W words hold the bits of V' / ranks tokens. The second axis is
      split over the ranks. Rows without a mask allow every token.
    """
    size = round_up(vocab_size, ranks) // ranks
    width = -(-size // _WORD)
    packed = np.full((n, ranks * width), -1, np.int32)
    for row, mask in rows:
        if size % _WORD == 0:
            packed[row, : len(mask)] = mask
        else:  # a rank's part begins inside a word
            bits = np.zeros(ranks * size, np.uint8)
            bits[:vocab_size] = np.unpackbits(
                mask.view(np.uint8), count=vocab_size, bitorder="little"
            )
            parts = np.pad(bits.reshape(ranks, size), ((0, 0), (0, width * _WORD - size)))
            packed[row] = np.packbits(parts, bitorder="little").view(np.int32)
    return packed


def apply_masks(logits: jax.Array, packed: jax.Array) -> jax.Array:
    """Sets the logits of tokens that are not allowed to -inf. NaN stays, so that it is noticed.

    Args:
      logits: `[n, V' / ranks]` float32, this rank's share.
      packed: `[n, W]` int32, likewise, from `encode_masks`.

    Returns:
      `[n, V' / ranks]` float32.
    """
    with jax.named_scope("mask"):
        bits = (packed[:, :, None] >> jnp.arange(_WORD)) & 1  # [n, W, 32]
        allowed = bits.reshape(len(packed), -1)[:, : logits.shape[1]] == 1
        return jnp.where(allowed | jnp.isnan(logits), logits, -jnp.inf)
