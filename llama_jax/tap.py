"""Named values inside the modules: what can be looked at and changed while a model runs.

A module hands each value worth a name through `tap`. Alone that is nothing: the program is the same
with and without it. Inside Flax's `nnx.capture` the value is kept as an intermediate; where a patch
of that name has been put into the module (`llama_jax.interpret.patched`), it is changed on the way.
"""

from typing import Any

import jax
from flax import nnx


class TappedModule(nnx.Module):
    """An NNX module with named values.

    A full name is the module's path and the value's own, such as "layers.3.attention.weights".
    Subclasses may tap further values; those can be captured and patched like the rest.
    """

    def tap(self, name: str, value: jax.Array) -> jax.Array:
        """Names a value. The caller goes on with what is returned, which may be patched."""
        patches: Any = getattr(self, "patches", None)
        if patches is not None and name in patches:
            for patch in patches[name]:
                value = patch(value)
        if hasattr(self, "__captures__"):  # inside `nnx.capture`; elsewhere `sow` would keep it
            self.sow(nnx.Intermediate, name, value)
        return value


def captured_by_name(captured: nnx.State) -> dict[str, Any]:
    """Name → value of what `nnx.capture` has collected; a name tapped twice has both in a tuple."""
    found = {}
    for path, variable in nnx.to_flat_state(captured):
        values = variable.get_value()
        found[".".join(map(str, path))] = values[0] if len(values) == 1 else values
    return found
