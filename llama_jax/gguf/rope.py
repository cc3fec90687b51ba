"""RoPE scaling of a GGUF file, as `rope_scaling` of config.json.

llama.cpp stores the "llama3" scaling of Llama 3.1 and later as one factor per frequency, in a
tensor. Its parameters are recovered from these factors. They are determined up to a common factor
of `original_max_position_embeddings`, `low_freq_factor` and `high_freq_factor`, which does not
change the frequencies; `low_freq_factor` is taken to be 1, as in every release of Llama.
"""

from typing import Any

import numpy as np

from llama_jax.gguf.errors import GgufError
from llama_jax.gguf.header import GgufHeader, GgufTensor

_NAMES = {
    "type": "rope_type",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_RELEASED = (8192, 4.0)  # original context and high_freq_factor of every released Llama
_TOLERANCE = 1e-5  # relative; the factors are float32


def rope_scaling(
    header: GgufHeader, settings: dict[str, Any], theta: float, factors: GgufTensor | None
) -> dict[str, Any] | None:
    """The contents of `rope_scaling`; None if frequencies are not scaled.

    Args:
      header: for messages.
      settings: the keys under "llama.rope.scaling.", or the older one "llama.rope.scale_linear" as
        "factor".
      theta: the base of the wavelengths.
      factors: the tensor of factors, if there is one.

    Raises:
      GgufError: the factors are not those of a scaling of type "llama3".
    """
    # As in llama.cpp, a factor without a type is a linear one, and 0 stands for 1.
    kind = settings.get("type", "none" if settings.get("factor", 0) in (0, 1) else "linear")
    if kind == "none":
        multiplier = settings.get("attn_factor", 1)  # llama.cpp does not use the others
        settings = {} if multiplier == 1 else {"type": "default", "attn_factor": multiplier}
    else:
        settings = settings | {"type": kind}
    if factors is None:
        return {_NAMES.get(key, key): value for key, value in settings.items()} or None
    if settings or factors.type != "F32" or len(factors.shape) != 1:
        raise GgufError(f"{header.path} scales RoPE in a way that is not supported.")
    values = np.fromfile(factors.path, "<f4", factors.shape[0], offset=factors.offset)
    if (values == 1).all():
        return None
    scaling = _llama3(values.astype(np.float64), theta)
    if scaling is None:
        raise GgufError(
            f"The RoPE factors of {header.path} are not those of the scaling of Llama 3.1: use the "
            "original checkpoint, whose config.json describes its scaling."
        )
    return {"rope_type": "llama3", **scaling}


def _llama3(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The parameters of the scaling from the factors [h / 2] of the frequencies."""
    turns = theta ** (-np.arange(len(factors)) / len(factors)) / (2 * np.pi)  # per token
    largest = round(float(factors[-1]), 4)
    if largest <= 1:
        return None
    for context, high in (_RELEASED, *_fitted(factors, turns, largest)):
        smooth = np.clip((context * turns - 1) / (high - 1), 0, 1)
        expected = 1 / ((1 - smooth) / largest + smooth)
        if np.allclose(factors, expected, rtol=_TOLERANCE):
            return {
                "factor": largest,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    return None


def _fitted(factors: np.ndarray, turns: np.ndarray, largest: float) -> list[tuple[int, float]]:
    """Original context and high_freq_factor, from the factors between 1 and the largest.

    There, `smooth` is linear in the turns per token.
    """
    between = (factors > 1 + _TOLERANCE) & (factors < largest * (1 - _TOLERANCE))
    if between.sum() < 2:
        return []
    smooth = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
    slope, intercept = np.polyfit(turns[between], smooth, 1)
    if not (slope > 0 > intercept):
        return []
    high = round(float(1 - 1 / intercept), 3)
    return [(round(float(slope) * (high - 1)), high)]
