"""Changes activations while a model runs. A patched model is a model like any other.

ablated = patched(model, {"layers.3.attention.heads": Scale(0.0, np.s_[..., 2, :])})
ablated(tokens)                                  # logits without head 2 of layer 3
capture(ablated, tokens, "layers.*.residual")    # and the effect on every later layer
"""

from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.interpret.activations import (
    activation_shapes,
    check_names,
    check_on_one_device,
    matching,
)
from llama_jax.model import Llama
from llama_jax.model.tap import PATCHES

AnyModel = TypeVar("AnyModel", bound=Llama)

# A NumPy index, such as `np.s_[:, -1]` or `np.s_[..., 2, :]`.
Index = int | slice | EllipsisType | None | list[int] | tuple[Any, ...]
PatchLike = Callable[[jax.Array], jax.Array]


class Patch(nnx.Module):
    """Base class of the patches here. A plain function of the activation is a patch, too.

    A patch is a module, so its arrays are part of the model's state: new values need no new
    compilation. (A function, with everything it closes over, is a constant of the program.)

    Subclasses override `change`.

    Args:
      at: a NumPy index of the part of the activation to change; all of it by default.

    Raises:
      ValueError: `at` is not an index of integers, slices and lists of integers.
    """

    def __init__(self, at: Index = ...):
        self.at = _hashable(at)

    def __call__(self, value: jax.Array) -> jax.Array:
        """The activation, with the part at `at` changed.

        Raises:
          ValueError: `at` does not fit the activation, or `change` returns another shape.
        """
        at = _index(self.at)
        try:
            # JAX silently drops or clamps an index that is out of range; NumPy raises. A broadcast
            # array has the whole shape without its memory.
            selected = np.broadcast_to(np.int8(0), value.shape)[at].shape
        except IndexError as error:
            raise ValueError(
                f"A patch's `at`, {at}, does not fit an activation of shape {list(value.shape)}: "
                f"{error}."
            ) from None
        new = self.change(value[at])
        if new is None or jnp.shape(new) != selected:
            got = "None" if new is None else f"shape {list(jnp.shape(new))}"
            raise ValueError(
                f"{type(self).__name__} returned {got} for a part of shape {list(selected)}: a "
                "patch must keep the shape."
            )
        return value.at[at].set(jnp.asarray(new, value.dtype))

    def change(self, selected: jax.Array) -> jax.Array:
        """The replacement for the selected part of the activation, in the same shape."""
        raise NotImplementedError


class _Combine(Patch):
    """Combines the selected part with a value, which is broadcast to the part's shape."""

    def __init__(self, value: Any, at: Index = ...):
        super().__init__(at)
        value = jnp.asarray(value)
        if value.dtype == jnp.float64:  # only under jax_enable_x64, where it would change rounding
            value = value.astype(jnp.float32)
        self.value = nnx.Variable(value)

    def change(self, selected: jax.Array) -> jax.Array:
        """The result of `combine`.

        Raises:
          ValueError: the value does not broadcast to the selected part.
        """
        try:
            value = jnp.broadcast_to(self.value[...], selected.shape)
        except ValueError:
            raise ValueError(
                f"The value of {type(self).__name__} has shape {list(self.value.shape)}, which "
                f"does not broadcast to the selected part of shape {list(selected.shape)}."
            ) from None
        return self.combine(selected, value)

    def combine(self, selected: jax.Array, value: jax.Array) -> jax.Array:
        """The replacement for `selected`; both arrays have its shape."""
        raise NotImplementedError


class Replace(_Combine):
    """Replaces an activation, or a part of it, with a value."""

    def combine(self, selected: jax.Array, value: jax.Array) -> jax.Array:
        """The value."""
        return value


class Scale(_Combine):
    """Multiplies an activation, or a part of it, by a value."""

    def combine(self, selected: jax.Array, value: jax.Array) -> jax.Array:
        """The product."""
        return selected * value


class Add(_Combine):
    """Adds a value, such as a steering vector, to an activation or a part of it."""

    def combine(self, selected: jax.Array, value: jax.Array) -> jax.Array:
        """The sum."""
        return selected + value


def ablate_heads(layer: int, *heads: int) -> dict[str, PatchLike]:
    """Patches that set the outputs of attention heads to zero (zero ablation)."""
    return {f"layers.{layer}.attention.heads": Scale(0.0, np.s_[..., list(heads), :])}


def ablate_layer(layer: int) -> dict[str, PatchLike]:
    """Patches by which a layer adds nothing to the residual stream."""
    blocks = ("attention", "mlp")
    return {f"layers.{layer}.{block}.output": Scale(0.0) for block in blocks}


def patched(model: AnyModel, patches: Mapping[str, PatchLike]) -> AnyModel:
    """Returns a patched copy of a model. It shares the weights; the model itself is unchanged.

    Args:
      model: a `Llama`. Patches that it already has are applied first.
      patches: a dict from a name of `activation_shapes`, or a pattern, to a `Patch` or a function
        of the activation.

    Raises:
      ValueError: `patches` is no dict from names, no activation matches a name, a patch is not
        callable, or the model is on a mesh. Shapes are checked when the model runs; a mismatch is
        a ValueError, too.
    """
    check_on_one_device(model, "patched")
    if not isinstance(patches, Mapping):
        raise ValueError(
            f"patches must be a dict from a name to a patch, not a {type(patches).__name__}."
        )
    check_names(patches, "keys of one dict")
    names = list(activation_shapes(model))
    chosen = [(name, p) for pattern, p in patches.items() for name in matching(names, [pattern])]
    copy = nnx.merge(*nnx.split(model))
    for name, patch in chosen:
        if not callable(patch):
            raise ValueError(
                f"The patch of {name!r} is of type {type(patch).__name__}: give Replace, Scale, "
                "Add, or a function of the activation."
            )
        *path, value_name = name.split(".")
        module: Any = copy
        for part in path:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        before = getattr(module, PATCHES + value_name, ())
        setattr(module, PATCHES + value_name, nnx.List([*before, patch]))
    return copy


def _hashable(at: Index) -> Any:
    """Encodes an index as a hashable static attribute: before Python 3.12 a slice is not one."""
    if isinstance(at, tuple):
        return ("tuple", *map(_hashable, at))
    if isinstance(at, slice):
        return ("slice", at.start, at.stop, at.step)
    if isinstance(at, int | np.integer) and not isinstance(at, bool):  # a bool is an int, too
        return int(at)
    if at is None or at is ...:
        return at
    numbers = np.asarray(at)
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            "A patch's `at` must be a NumPy index of integers, slices and lists of integers, such "
            f"as np.s_[:, -1], got {at!r}."
        )
    return ("list", numbers.shape, *numbers.ravel().tolist())


def _index(at: Any) -> Any:
    """The inverse of `_hashable`."""
    if not isinstance(at, tuple):
        return at
    kind, *rest = at
    if kind == "tuple":
        return tuple(map(_index, rest))
    if kind == "slice":
        return slice(*rest)
    return np.array(rest[1:], int).reshape(rest[0])
