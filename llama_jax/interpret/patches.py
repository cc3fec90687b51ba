"""Changes activations while a model runs: a model with patches is a model like any other.

without = patched(model, {"layers.3.attention.heads": Scale(0.0, np.s_[..., 2, :])})
without(tokens)                                  # the answer without head 2 of layer 3
capture(without, tokens, "layers.*.residual")    # and what it does to everything after it
"""

from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.interpret.activations import activation_shapes, check_on_one_device, matching
from llama_jax.model import Llama
from llama_jax.model.tap import PATCHES

AnyModel = TypeVar("AnyModel", bound=Llama)

# A NumPy index, such as `np.s_[:, -1]` or `np.s_[..., 2, :]`; what it selects is changed.
Index = int | slice | EllipsisType | None | list[int] | tuple[Any, ...]
PatchLike = Callable[[jax.Array], jax.Array]


class Patch(nnx.Module):
    """Base of the patches here; any function of an activation will do, too.

    A patch is a module, so that the arrays it holds are part of the model: other values need no
    other compiled program. (A function is a constant of the program, with all it refers to.)

    Args:
      at: what is changed of the activation, as a NumPy index; everything by default.
    """

    def __init__(self, at: Index = ...):
        self.at = _hashable(at)

    def __call__(self, value: jax.Array) -> jax.Array:
        """The activation with what `at` selects changed."""
        at = _index(self.at)
        try:
            # JAX would drop or clamp an index that is out of range, in silence.
            selected = np.broadcast_to(np.int8(0), value.shape)[at].shape
        except IndexError as error:
            raise ValueError(
                f"A patch at {at} does not fit an activation of shape {list(value.shape)}: {error}."
            ) from None
        new = self.change(value[at])
        if new.shape != selected:
            raise ValueError(
                f"{type(self).__name__} gives shape {list(new.shape)} for the part of an "
                f"activation that it changes, which is {list(selected)}."
            )
        return value.at[at].set(new.astype(value.dtype))

    def change(self, selected: jax.Array) -> jax.Array:
        """What takes the place of the selected part; of the same shape."""
        raise NotImplementedError


class _WithValue(Patch):
    """Puts a value and the selected part together; the value broadcasts against the part."""

    def __init__(self, value: Any, at: Index = ...):
        super().__init__(at)
        self.value = nnx.Variable(jnp.asarray(value))

    def change(self, selected: jax.Array) -> jax.Array:
        """See `Patch.change`."""
        try:
            value = jnp.broadcast_to(self.value[...], selected.shape)
        except ValueError:
            raise ValueError(
                f"{type(self).__name__} has a value of shape {list(self.value.shape)}, which does "
                "not fit the part of an activation that it changes, of shape "
                f"{list(selected.shape)}."
            ) from None
        return self.combine(selected, value)

    def combine(self, selected: jax.Array, value: jax.Array) -> jax.Array:
        """Two arrays of the same shape -> what takes the place of the first."""
        raise NotImplementedError


class Replace(_WithValue):
    """Puts a value in the place of an activation, or of a part of it."""

    def combine(self, selected: jax.Array, value: jax.Array) -> jax.Array:
        """See `_WithValue`."""
        return value


class Scale(_WithValue):
    """Multiplies an activation, or a part of it, by a factor."""

    def combine(self, selected: jax.Array, value: jax.Array) -> jax.Array:
        """See `_WithValue`."""
        return selected * value


class Add(_WithValue):
    """Adds a value to an activation, or to a part of it: a steering vector, say."""

    def combine(self, selected: jax.Array, value: jax.Array) -> jax.Array:
        """See `_WithValue`."""
        return selected + value


def ablate_heads(layer: int, *heads: int) -> dict[str, PatchLike]:
    """For `patched`: sets what these heads have read to zero."""
    return {f"layers.{layer}.attention.heads": Scale(0.0, np.s_[..., list(heads), :])}


def ablate_layer(layer: int) -> dict[str, PatchLike]:
    """For `patched`: lets a layer add nothing to the residual stream."""
    parts = ("attention", "mlp")
    return {f"layers.{layer}.{part}.output": Scale(0.0) for part in parts}


def patched(model: AnyModel, patches: Mapping[str, PatchLike]) -> AnyModel:
    """The model with patches: a copy that shares its weights; the model itself stays as it is.

    Args:
      model: a `Llama`. If it has patches of the same names, they come first.
      patches: name, or pattern, of activations → what is done to each; `activation_shapes` has the
        names and shapes.

    Raises:
      ValueError: a name that does not exist, or what is not a function, or a model on a mesh.
        Shapes are checked when the model runs.
    """
    check_on_one_device(model, "Patches need")
    names = list(activation_shapes(model))
    chosen = [(name, patch) for pattern, patch in patches.items()
              for name in matching(names, [pattern])]  # fmt: skip
    copy = nnx.merge(*nnx.split(model))
    for name, patch in chosen:
        if not callable(patch):
            raise ValueError(
                f"The patch of {name!r} is of type {type(patch).__name__}: give a function of the "
                "activation, or one of Replace, Scale and Add."
            )
        *path, own = name.split(".")
        module: Any = copy
        for part in path:
            module = module[int(part)] if part.isdigit() else getattr(module, part)
        before = getattr(module, PATCHES + own, ())
        setattr(module, PATCHES + own, nnx.List([*before, patch]))
    return copy


def _hashable(at: Index) -> Any:
    """An index as a constant that can be compared; a slice cannot be hashed before Python 3.12."""
    if isinstance(at, tuple):
        return ("tuple", *map(_hashable, at))
    if isinstance(at, slice):
        return ("slice", at.start, at.stop, at.step)
    if isinstance(at, int | np.integer) and not isinstance(at, bool):
        return int(at)
    if at is None or at is ...:
        return at
    numbers = np.asarray(at)
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"A patch's `at` is an index of integers and slices, such as np.s_[:, -1], got {at!r}."
        )
    return ("list", numbers.shape, *numbers.ravel().tolist())


def _index(at: Any) -> Any:
    """What `_hashable` was given."""
    if not isinstance(at, tuple):
        return at
    kind, *rest = at
    if kind == "tuple":
        return tuple(map(_index, rest))
    if kind == "slice":
        return slice(*rest)
    return np.array(rest[1:], int).reshape(rest[0])
