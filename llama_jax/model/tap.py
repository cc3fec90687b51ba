"""Named values inside the modules: what can be looked at and changed while a model runs.

A module hands each value worth a name through `tap`. Alone that is nothing: the program is the same
with and without it. Inside Flax's `nnx.capture` the value is kept as an intermediate; where a patch
of that name has been put into the module (`llama_jax.interpret.patched`), it is changed on the way.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

PATCHES = "patches_"  # begins the attributes of a module that hold the patches of its values


class TappedModule(nnx.Module):
    """An NNX module with named values.

    A full name is the module's path and the value's own, such as "layers.3.attention.weights".
    Subclasses may tap further values; those can be captured and patched like the rest. On a mesh
    each rank taps its own part of a value (its heads, its neurons) or the whole of it; a partial
    sum, such as what `Attention` and `MLP` return, has no meaning there until it is reduced.
    """

    def tap(self, name: str, value: jax.Array) -> jax.Array:
        """Names a value. The caller goes on with what is returned, which may be patched.

        Raises:
          ValueError: a patch gives another shape, or a module inside this one has the name.
        """
        for patch in getattr(self, PATCHES + name, ()):
            new = patch(value)
            if jnp.shape(new) != value.shape:
                raise ValueError(
                    f"A patch of {name!r} gives shape {list(jnp.shape(new))} for an activation of "
                    f"shape {list(value.shape)}; a patch must keep the shape."
                )
            value = jnp.asarray(new, value.dtype)
        if hasattr(self, "__captures__"):  # inside `nnx.capture`; elsewhere `sow` would keep it
            if isinstance(getattr(self, name, None), nnx.Module):
                raise ValueError(
                    f"{type(self).__name__} taps {name!r}, which is the name of a module inside "
                    "it: give the value another name."
                )
            self.sow(nnx.Intermediate, name, value)
        return value


def captured_by_name(captured: nnx.State) -> dict[str, Any]:
    """Name → value of what `nnx.capture` has collected; a name tapped twice has both in a tuple."""
    found = {}
    for path, variable in nnx.to_flat_state(captured):
        values = variable.get_value()
        found[".".join(map(str, path))] = values[0] if len(values) == 1 else values
    return found
