"""The sampling parameters of a packet's rows, packed by the host and read on the device."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.config.sampling_params import SamplingParams

# Columns of a row, int32 words: the seed takes the first two.
TOKEN_INDEX, TOP_K, TEMPERATURE, TOP_P, MIN_P, TYPICAL_P = range(2, 8)
CONTROL_WIDTH = 8
# The smallest that is not flushed to zero, for top_p and typical_p: 0 keeps every token.
_SMALLEST = float(np.finfo(np.float32).tiny)


class Controls(NamedTuple):
    """Sampling parameters of n rows, as in `SamplingParams`: each `[n]`, but key `[n, 2]`.

    A row that is greedy has a temperature of 0. A typical_p of 0 keeps every token.
    """

    key: jax.Array
    token_index: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    typical_p: jax.Array


def encode_controls(n: int, rows: Sequence[tuple[int, int, int, SamplingParams]]) -> np.ndarray:
    """Packs the sampling parameters of a packet into one array.

    Args:
      n: number of rows.
      rows: (row, seed, token index, parameters) of each row that is not greedy.

    Returns:
      `[n, CONTROL_WIDTH]` int32.
    """
    packed = np.zeros((n, CONTROL_WIDTH), np.int32)
    floats = packed.view(np.float32)
    floats[:, TOP_P] = 1
    for row, seed, index, params in rows:
        words = np.array([seed % 2**64], np.uint64).view(np.int32)
        packed[row, :TEMPERATURE] = (*words, index, params.top_k)
        typical_p = max(params.typical_p, _SMALLEST) if params.typical_p < 1 else 0
        floats[row, TEMPERATURE:] = (
            params.temperature,
            max(params.top_p, _SMALLEST),
            params.min_p,
            typical_p,
        )
    return packed


def decode_controls(packed: jax.Array) -> Controls:
    """Reads `[n, CONTROL_WIDTH]` int32 on the device."""
    floats = lax.bitcast_convert_type(packed[:, TEMPERATURE:], jnp.float32)
    key = lax.bitcast_convert_type(packed[:, :TOKEN_INDEX], jnp.uint32)
    temperature, top_p, min_p, typical_p = floats.T
    index, top_k = packed[:, TOKEN_INDEX], packed[:, TOP_K]
    return Controls(key, index, temperature, top_k, top_p, min_p, typical_p)


def any_filter(packed: np.ndarray) -> bool:
    """Whether a row asks for top-k, top-p or typical-p, given `[n, CONTROL_WIDTH]` on the host.

    These need a search over the vocabulary. Temperature and min-p do not.
    """
    floats = packed.view(np.float32)
    filtered = (packed[:, TOP_K] > 0) | (floats[:, TOP_P] < 1) | (floats[:, TYPICAL_P] > 0)
    return bool(filtered.any())
