"""Masks of the vocabulary: which tokens a row may choose.

The host computes a mask as one bit per token and sends it with the tick in which the packet leaves.
Each rank gets the bits of its part of the vocabulary, so the masks are sent only once. They are an
input of the tick (`masks_by_row`), or of a program after it for just those rows (`encode_masks`).

`apply_masks` runs inside `shard_map`, on one rank's part of the vocabulary, without collectives.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sharding.stages import round_up

_WORD = 32  # bits


def capacities(n: int) -> tuple[int, ...]:
    """How many masks the programs for packets of n rows take: a quarter of the rows, or all."""
    return tuple(sorted({-(-n // 4), n}))


def encode_masks(
    n: int, masks: Sequence[tuple[int, np.ndarray]], vocab_size: int, ranks: int, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Packs the masks of a packet.

    Args:
      n: number of rows of the packet.
      masks: (row, mask `[V / 32]` int32, the lowest bit first) of each row that has one.
      vocab_size: V.
      ranks: the devices that the vocabulary is split over.
      capacity: k, the number of masks to make room for.

    Returns:
      The rows `[k]` int32, n where there is no mask, and the masks `[k, ranks * W]` int32, where W
      words hold the bits of V' / ranks tokens. The last axis is split over the ranks.
    """
    rows = np.full(capacity, n, np.int32)
    rows[: len(masks)] = [row for row, _ in masks]
    packed = masks_by_row(capacity, list(enumerate(mask for _, mask in masks)), vocab_size, ranks)
    return rows, packed


def masks_by_row(
    n: int, masks: Sequence[tuple[int, np.ndarray]], vocab_size: int, ranks: int
) -> np.ndarray:
    """Packs the masks of a packet, with one that allows every token for each row without.

    Args:
      n, masks, vocab_size, ranks: as for `encode_masks`.

    Returns:
      `[n, ranks * W]` int32, as there.
    """
    size = round_up(vocab_size, ranks) // ranks
    width = -(-size // _WORD)
    packed = np.full((n, ranks * width), -1, np.int32)
    for row, mask in masks:
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
      logits: `[k, V' / ranks]` float32, this rank's share.
      packed: `[k, W]` int32, likewise, from `encode_masks` or `masks_by_row`.

    Returns:
      `[k, V' / ranks]` float32.
    """
    with jax.named_scope("mask"):
        bits = (packed[:, :, None] >> jnp.arange(_WORD)) & 1  # [k, W, 32]
        allowed = bits.reshape(len(packed), -1)[:, : logits.shape[1]] == 1
        return jnp.where(allowed | jnp.isnan(logits), logits, -jnp.inf)
