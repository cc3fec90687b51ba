"""The names of a model's activations, and how a pattern chooses among them."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.model import Llama
from llama_jax.model.tap import PATCHES, captured_by_name
from llama_jax.ring.sharded_llama import ShardedLlama

AnyLlama = Llama | ShardedLlama


def activation_shapes(
    model: AnyLlama, batch: int = 1, num_tokens: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """Name → shape and dtype of everything that can be captured and patched.

    Letters: B batch, T tokens, D embed, H heads, K KV heads, h head dim, F MLP width, V vocabulary.

    | name | shape | |
    |---|---|---|
    | `embedding` | `[B, T, D]` | what enters the first layer |
    | `layers.N.attention_norm.output` | `[B, T, D]` | what attention reads |
    | `layers.N.attention.query` | `[B, T, H, h]` | after the rotation |
    | `layers.N.attention.key`, `.value` | `[B, T, K, h]` | as the KV cache holds them |
    | `layers.N.attention.weights` | `[B, H, T, T]` | after the softmax |
    | `layers.N.attention.heads` | `[B, T, H, h]` | what each head has read |
    | `layers.N.attention.output` | `[B, T, D]` | what attention adds |
    | `layers.N.middle` | `[B, T, D]` | residual stream between attention and MLP |
    | `layers.N.mlp_norm.output` | `[B, T, D]` | what the MLP reads |
    | `layers.N.mlp.neurons` | `[B, T, F]` | |
    | `layers.N.mlp.output` | `[B, T, D]` | what the MLP adds |
    | `layers.N.residual` | `[B, T, D]` | residual stream after the layer |
    | `final_norm.output` | `[B, T, D]` | what the head reads |
    | `logits` | `[B, T, V]` | |

    Subclasses of the modules may tap further values.

    Args:
      model: nothing of it is computed.
      batch, num_tokens: B and T of the shapes.
    """
    if isinstance(model, ShardedLlama):
        kind, config, dtype = model.model_class, model.config, model.dtype
        model = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), dtype=dtype))
    tokens = jax.ShapeDtypeStruct((batch, num_tokens), jnp.int32)
    shapes = _everything.eval_shape(*nnx.split(_without_patches(model)), tokens)
    return {name: shapes[name] for name in in_order(shapes)}


def in_order(names: Iterable[str]) -> list[str]:
    """Sorted, but layer 10 after layer 9."""

    def key(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]

    return sorted(names, key=key)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match any pattern, in their order; `*` stands for any run of characters.

    Raises:
      ValueError: a pattern matches nothing; the message names the nearest that exist.
    """
    names = list(names)
    chosen = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(unknown("activation", pattern, names))
        chosen.update(found)
    return [name for name in names if name in chosen]


def unknown(what: str, name: str, names: Sequence[str]) -> str:
    """One sentence for a name that does not exist, with the nearest that do."""
    if not names:
        return f"There is no {what} {name!r}; there is none at all."
    nearest = get_close_matches(name, names, n=3, cutoff=0)
    listed = ", ".join(nearest[:-1]) + " and " + nearest[-1] if len(nearest) > 1 else nearest[0]
    return f"There is no {what} {name!r}; the nearest are {listed}."


@partial(jax.jit, static_argnums=0)  # never run; jitted so that it is traced once for each model
def _everything(graph: Any, state: nnx.State, tokens: jax.Array) -> dict[str, jax.Array]:
    model = nnx.merge(graph, state)
    return captured_by_name(nnx.capture(model, nnx.Intermediate)(tokens)[1])


def check_on_one_device(model: Any, needs: str) -> None:
    """Raises ValueError for a model on a mesh; the sentence begins with what needs another."""
    if isinstance(model, ShardedLlama):
        raise ValueError(
            f"{needs} the model on one device: open it with "
            f"{model.model_class.__name__}.from_pretrained."
        )


def _without_patches(model: Llama) -> Llama:
    """A copy: a patch may fit only tokens of one shape, and changes no name and no shape."""
    copy = nnx.merge(*nnx.split(model))
    for _, module in list(nnx.iter_modules(copy)):
        for attribute in [name for name in vars(module) if name.startswith(PATCHES)]:
            delattr(module, attribute)
    return copy
