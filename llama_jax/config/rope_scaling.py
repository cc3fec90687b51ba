"""How a model stretches its rotary embedding to longer contexts. Imports no JAX.

`llama_jax.model.rope` computes the frequencies.
"""

import math
from dataclasses import dataclass

from llama_jax.config.errors import ConfigError

_FEWEST_ROTATIONS, _MOST_ROTATIONS = 1e-6, 1e6  # beyond, the logarithms of YaRN's bounds overflow


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Divides all frequencies by `factor` (https://arxiv.org/abs/2306.15595).

    Attributes:
      factor: at least 1.

    Raises:
      ConfigError: `factor` is out of range.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """Frequencies that depend on the length of the sequence ("dynamic NTK").

    Up to `max_position_embeddings` tokens, the frequencies are unscaled. Beyond that, each length
    has its own frequencies, so every new token would make all cached keys wrong. With a cache,
    transformers keeps the old keys anyway, and vLLM uses the frequencies of the maximum length for
    all lengths; neither gives the logits of a run without a cache. This package supports the
    lengths without scaling, where its logits equal those of transformers, and refuses longer
    sequences.

    Attributes:
      factor: at least 1; without effect on the sequences that are supported.

    Raises:
      ConfigError: `factor` is out of range.
    """

    factor: float

    def __post_init__(self) -> None:
        _check_factor(self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """The scaling of Llama 3.1 (https://arxiv.org/abs/2407.21783, and Meta's code).

    Attributes:
      factor: stretches long wavelengths; at least 1.
      low_freq_factor: wavelengths above original / low_freq_factor are stretched in full.
      high_freq_factor: wavelengths below original / high_freq_factor are kept; greater than
        low_freq_factor.
      original_max_position_embeddings: context length before its extension, in tokens.

    Raises:
      ConfigError: a factor is out of range.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"The rope scaling high_freq_factor ({self.high_freq_factor}) must be greater than "
                f"low_freq_factor ({self.low_freq_factor})."
            )


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (https://arxiv.org/abs/2309.00071), with the formulas of transformers.

    Attributes:
      factor: stretches long wavelengths; at least 1.
      original_max_position_embeddings: context length before its extension, in tokens.
      attention_factor: multiplies rotated queries and keys, so scores by its square.
      beta_fast: pairs with more rotations in the original context than this are not stretched.
      beta_slow: pairs with fewer rotations are stretched in full; at most `beta_fast`.
      truncate: whether the bounds between the two are rounded to whole pairs.

    Raises:
      ConfigError: a value is out of range.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not 0 < self.attention_factor < math.inf:
            raise ConfigError(
                "The rope scaling attention_factor must be positive and finite, got "
                f"{self.attention_factor}."
            )
        if not _FEWEST_ROTATIONS <= self.beta_slow <= self.beta_fast <= _MOST_ROTATIONS:
            raise ConfigError(
                f"The rope scaling beta_slow ({self.beta_slow}) must be at most beta_fast "
                f"({self.beta_fast}), and both between {_FEWEST_ROTATIONS} and {_MOST_ROTATIONS}."
            )


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling

# The name of each scaling in config.json.
ROPE_TYPES: dict[str, type[RopeScaling]] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
}


def rope_type(scaling: RopeScaling) -> str:
    """The name of a scaling in config.json."""
    return next(name for name, kind in ROPE_TYPES.items() if isinstance(scaling, kind))


def _check_factor(factor: float) -> None:
    if factor < 1:
        raise ConfigError(f"The rope scaling factor must be at least 1, got {factor}.")
