"""Rotary position embedding (https://arxiv.org/abs/2104.09864), with the scaling of Llama 3.1."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig


@cache
def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angle per position of each rotated pair, in radians: `[h / 2]` float32.

    Scaling of type "llama3" (https://arxiv.org/abs/2407.21783 and Meta's code for Llama 3.1)
    stretches wavelengths above `original_max_position_embeddings / low_freq_factor` by `factor`,
    keeps those below `original_max_position_embeddings / high_freq_factor`, and interpolates
    between the two.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = 1.0 / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def rotate(
    x: jax.Array,  # [..., heads, h]
    positions: jax.Array,  # [...] int32
    frequencies: np.ndarray,  # [h / 2]
) -> jax.Array:
    """Rotates each pair (x[i], x[i + h/2]) by position × frequency; computes in float32.

    The halves of a head form the pairs, as in Hugging Face checkpoints; Meta's own checkpoints
    interleave them.

    Returns:
      The shape and dtype of `x`.
    """
    with jax.named_scope("rope"):
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
