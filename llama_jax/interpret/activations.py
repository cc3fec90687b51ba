"""The names and shapes of a model's activations, and patterns that select them."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.model import Llama
from llama_jax.model.tap import PATCHES, captured_by_name
from llama_jax.ring.sharded_llama import ShardedLlama

AnyLlama = Llama | ShardedLlama


def activation_shapes(
    model: AnyLlama, batch: int = 1, num_tokens: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """Maps the name of every activation that can be captured or patched to its shape and dtype.

    Letters: B batch, T tokens, D embed, H heads, K KV heads, h head dim, F MLP width, V vocabulary.

    | name | shape | |
    |---|---|---|
    | `embedding` | `[B, T, D]` | input of the first layer |
    | `layers.N.attention_norm.output` | `[B, T, D]` | input of attention |
    | `layers.N.attention.query` | `[B, T, H, h]` | after RoPE |
    | `layers.N.attention.key`, `.value` | `[B, T, K, h]` | as in the KV cache: keys after RoPE |
    | `layers.N.attention.weights` | `[B, H, T, T]` | after the softmax; the last axis is the key |
    | `layers.N.attention.heads` | `[B, T, H, h]` | weighted values, before the output projection |
    | `layers.N.attention.output` | `[B, T, D]` | what attention adds to the residual stream |
    | `layers.N.middle` | `[B, T, D]` | residual stream between attention and MLP |
    | `layers.N.mlp_norm.output` | `[B, T, D]` | input of the MLP |
    | `layers.N.mlp.neurons` | `[B, T, F]` | input of the down projection |
    | `layers.N.mlp.output` | `[B, T, D]` | what the MLP adds to the residual stream |
    | `layers.N.residual` | `[B, T, D]` | residual stream after the layer |
    | `final_norm.output` | `[B, T, D]` | input of the LM head |
    | `logits` | `[B, T, V]` | |

    Values that subclasses of the modules tap are listed, too; the entry of one that is tapped
    several times in a run is a tuple.

    Args:
      model: only traced; nothing runs.
      batch: B.
      num_tokens: T.

    Raises:
      ValueError: B or T is no integer from 1 on, or `model` is no model.
    """
    check_model(model, "activation_shapes")
    if not all(isinstance(size, int | np.integer) and size >= 1 for size in (batch, num_tokens)):
        raise ValueError(
            "batch and num_tokens must be integers from 1 on, such as the two of tokens.shape."
        )
    if isinstance(model, ShardedLlama):
        # Names and shapes do not depend on the mesh: trace the plain modules.
        cls, config, dtype = model.model_class, model.config, model.dtype
        model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0), dtype=dtype))
    tokens = jax.ShapeDtypeStruct((batch, num_tokens), jnp.int32)
    shapes = _capture_all.eval_shape(*nnx.split(_without_patches(model)), tokens)
    return {name: shapes[name] for name in sorted_names(shapes)}


def sorted_names(names: Iterable[str]) -> list[str]:
    """Names in alphabetical order, but with layer 10 after layer 9."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

    return sorted(names, key=key)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any of the patterns, in the order of `names`.

    Args:
      names: names of activations.
      patterns: as in `fnmatch`: `*` matches any characters, dots included.

    Raises:
      ValueError: a pattern matches no name; the message suggests similar names.
    """
    names = list(names)
    chosen = set()
    for pattern in patterns:
        # A name may hold a bracket, which means something else in a pattern.
        found = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(_no_match(pattern, names))
        chosen.update(found)
    return [name for name in names if name in chosen]


def check_names(names: Iterable[Any], call: str) -> None:
    """Raises ValueError for a name that is not a string.

    Args:
      names: names of activations, or patterns.
      call: how to give several, for the message.
    """
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                f"A name of an activation must be a string, not a {type(name).__name__}: give "
                f"several as {call}."
            )


def check_tapped_once(name: str, value: Any, caller: str) -> None:
    """Raises ValueError for an activation, or its shape, that is a tuple.

    Args:
      name: of the activation.
      value: what `capture` or `activation_shapes` gives for it.
      caller: the public function, for the message.
    """
    if isinstance(value, tuple):
        raise ValueError(
            f"{caller} needs activations that are tapped once in a run, but {name} is tapped "
            f"{len(value)} times: give each of its values a name of its own."
        )


def _no_match(pattern: str, names: Sequence[str]) -> str:
    if not names:
        return f"No activation matches {pattern!r}, because there are no activations at all."
    similar = get_close_matches(pattern, names, n=3, cutoff=0)
    return f"No activation matches {pattern!r}; similar names: {', '.join(similar)}."


@partial(jax.jit, static_argnums=0)  # never executed: jit caches the trace for each model
def _capture_all(graph: Any, state: nnx.State, tokens: jax.Array) -> dict[str, jax.Array]:
    model = nnx.merge(graph, state)
    return captured_by_name(nnx.capture(model, nnx.Intermediate)(tokens)[1])


def check_model(model: Any, caller: str) -> None:
    """Raises ValueError for what is no model, such as an `LLM`.

    Args:
      model: anything.
      caller: the public function, for the message.
    """
    if not isinstance(model, AnyLlama):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ValueError(
            f"{caller} needs a Llama or a ShardedLlama, not {got}: load one with from_pretrained, "
            "or take LLM(..., in_process=True).model."
        )


def check_on_one_device(model: Any, caller: str) -> None:
    """Raises ValueError for a model on a mesh, and for what is no model.

    Args:
      model: anything.
      caller: the public function, for the message.
    """
    check_model(model, caller)
    if isinstance(model, ShardedLlama):
        raise ValueError(
            f"{caller} needs a model on one device, not a ShardedLlama: load it with "
            f"{model.model_class.__name__}.from_pretrained."
        )


def _without_patches(model: Llama) -> Llama:
    """A copy for tracing: a patch changes no name or shape, but may fit only one B and T."""
    copy = nnx.merge(*nnx.split(model))
    for _, module in list(nnx.iter_modules(copy)):
        for attribute in [name for name in vars(module) if name.startswith(PATCHES)]:
            delattr(module, attribute)
    return copy
