"""Takes the parameters of a layer apart, into the weights of the table."""

from typing import Any

import jax
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.weights.table import LAYER_PARAMETERS
from llama_jax.weights.unfused import Unfused


def weights_of(layer: dict[str, Any], config: LlamaConfig, num_ranks: int) -> dict[str, Any]:
    """The weights of a layer by name, whole, from its parameters without the axis over stages."""
    found = {}
    for name, weights in LAYER_PARAMETERS.items():
        value = layer[name]
        if len(weights) == 1 or isinstance(value, Unfused):
            parts = value.weights if isinstance(value, Unfused) else (value,)
        else:
            ends = np.cumsum([weight.shape(config)[0] // num_ranks for weight in weights])

            def part(array: Any, number: int, ends: Any = ends) -> np.ndarray:
                shares = np.split(np.asarray(array), num_ranks)
                return np.concatenate([np.split(share, ends[:-1])[number] for share in shares])

            parts = tuple(
                jax.tree.map(lambda array, n=number, part=part: part(array, n), value)
                for number in range(len(weights))
            )
        found |= {weight.name: each for weight, each in zip(weights, parts, strict=True)}
    return found
