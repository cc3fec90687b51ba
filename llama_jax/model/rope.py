"""Rotary position embedding, with the frequency scaling of Llama 3.1 and later."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig


@cache
def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each rotated pair, `[h / 2]` float32.

    Scaling (type "llama3", https://arxiv.org/abs/2407.21783 and the reference code of Llama 3.1):
    wavelengths beyond `original_max_position_embeddings / low_freq_factor` are stretched by
    `factor`, those below `… / high_freq_factor` stay, and in between the two are blended.
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
    """Turns each pair (x[i], x[i + h/2]) by position × frequency, in float32; dtype of `x`."""
    with jax.named_scope("rope"):
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
