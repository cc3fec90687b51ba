"""Rotary position embedding (https://arxiv.org/abs/2104.09864), with its extensions.

Scaled frequencies and factors are those of transformers (modeling_rope_utils.py), in float32.
"""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LlamaConfig,
    YarnScaling,
)
from llama_jax.model.cpu_product import on_cpu


@cache
def inverse_frequencies(config: LlamaConfig) -> np.ndarray:
    """Angle per position of each rotated pair, in radians: `[h / 2]` float32."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = 1.0 / np.float32(config.rope_theta) ** exponents
    match config.rope_scaling:
        case None | DynamicScaling():  # unscaled at every supported length: see `DynamicScaling`
            return frequencies
        case LinearScaling(factor=factor):
            return frequencies / np.float32(factor)
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling)
        case YarnScaling() as scaling:
            return _yarn(frequencies, scaling, config)


def check_length(config: LlamaConfig, num_tokens: int) -> None:
    """Checks that the model's rotary embedding is defined for a sequence.

    Raises:
      ValueError: the scaling is dynamic and the sequence too long: see `DynamicScaling`.
    """
    longest = config.max_position_embeddings
    if isinstance(config.rope_scaling, DynamicScaling) and num_tokens > longest:
        raise ValueError(
            f"With dynamic rope scaling a sequence may have at most {longest} tokens, got "
            f"{num_tokens}: longer ones would need other frequencies at every length."
        )


def attention_factor(config: LlamaConfig) -> float:
    """The number that multiplies rotated queries and keys: 1 except with YaRN."""
    scaling = config.rope_scaling
    return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0


def rotate(
    x: jax.Array,  # [..., heads, h]
    positions: jax.Array,  # [...] int32
    frequencies: np.ndarray,  # [h / 2]
    factor: float = 1.0,
) -> jax.Array:
    """Rotates each pair (x[i], x[i + h/2]) by position × frequency, and multiplies it by a factor.

    Computes in float32. The halves of a head form the pairs, as in Hugging Face checkpoints; Meta's
    own checkpoints interleave them.

    Returns:
      The shape and dtype of `x`.
    """
    with jax.named_scope("rope"):
        angles = positions[..., None, None].astype(jnp.float32) * frequencies
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        if on_cpu():
            # As one array behind a barrier, all layers and heads share them. XLA:CPU would compute
            # them again for each, in its loops over the heads.
            cos, sin = jax.lax.optimization_barrier(jnp.stack([cos, sin]))
        if factor != 1:
            cos, sin = cos * factor, sin * factor
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Stretches wavelengths above `original_max_position_embeddings / low_freq_factor` by `factor`,
    keeps those below `original_max_position_embeddings / high_freq_factor`, and interpolates
    between the two."""
    rotations = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((rotations - low) / (high - low), 0, 1)
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


def _yarn(frequencies: np.ndarray, scaling: YarnScaling, config: LlamaConfig) -> np.ndarray:
    """Keeps the pairs that rotate more than `beta_fast` times in the original context, stretches
    those that rotate fewer than `beta_slow` times by `factor`, and interpolates between the two by
    the index of the pair."""

    def pair(rotations: float) -> float:
        """The index, as a real number, of the pair that rotates this many times."""
        wavelength = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return config.head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    # The upper bound is that of transformers, which counts single elements here, not pairs.
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001  # as transformers, which would divide by zero
    index = np.arange(len(frequencies), dtype=np.float32)
    stretched = np.clip((index - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = 1 - stretched
    return frequencies / np.float32(scaling.factor) * (1 - kept) + frequencies * kept
