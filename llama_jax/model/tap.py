"""Named values inside the modules, which can be captured and changed while a model runs.

Modules pass each value of interest through `tap`. By itself that does nothing: the compiled program
is the same with and without it. Inside Flax's `nnx.capture`, the value is kept as an intermediate;
if the module has a patch of that name (`llama_jax.interpret.patched`), the patch changes it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

PATCHES = "patches_"  # prefix of the attributes of a module that hold its patches


class TappedModule(nnx.Module):
    """An NNX module with named values.

    A full name is the path of the module followed by the name of the value, such as
    "layers.3.attention.weights". Subclasses may tap more values, which can be captured and patched
    like the rest; those of a name that is tapped several times in a run are captured as a tuple.

    On a mesh, each rank taps its part of a value (its heads, its neurons) or all of it, with the
    tokens first. Do not tap a partial sum, such as the result of `Attention` or `MLP`, before it is
    reduced.
    """

    def tap(self, name: str, value: jax.Array) -> jax.Array:
        """Names a value.

        Returns:
          The value to continue with: the same, unless a patch has changed it.

        Raises:
          ValueError: a patch returns None or another shape, a child module has this name, it
            contains a dot, or the value is no array.
        """
        if "." in name:  # full names are split at dots
            raise ValueError(
                f"{type(self).__name__} taps {name!r}: give the value a name without a dot."
            )
        if not hasattr(value, "shape"):  # a tuple would look like a name that is tapped twice
            raise ValueError(
                f"{type(self).__name__} taps {name!r}, a {type(value).__name__}: tap an array."
            )
        for patch in getattr(self, PATCHES + name, ()):
            new = patch(value)
            if new is None:
                raise ValueError(
                    f"A patch of {name!r} returns None: let it return the activation to go on with."
                )
            if jnp.shape(new) != value.shape:
                raise ValueError(
                    f"A patch of {name!r} gives shape {list(jnp.shape(new))} for an activation of "
                    f"shape {list(value.shape)}; a patch must keep the shape."
                )
            value = jnp.asarray(new, value.dtype)
        if hasattr(self, "__captures__"):  # inside `nnx.capture`; outside, `sow` would store it
            if isinstance(getattr(self, name, None), nnx.Module):
                raise ValueError(
                    f"{type(self).__name__} taps {name!r}, which is the name of a module inside "
                    "it: give the value another name."
                )
            self.sow(nnx.Intermediate, name, value)
        return value


def captured_by_name(captured: nnx.State) -> dict[str, Any]:
    """The values that `nnx.capture` collected, by name; a tuple for a name tapped several times."""
    found = {}
    for path, variable in nnx.to_flat_state(captured):
        values = variable.get_value()
        found[".".join(map(str, path))] = values[0] if len(values) == 1 else values
    return found


def each_by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with a name for each: "x#0", "x#1" for the tuple of a name "x"."""
    each: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, tuple):
            each |= {f"{name}#{number}": one for number, one in enumerate(value)}
        else:
            each[name] = value
    return each
