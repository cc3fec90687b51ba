"""A function compiled for all devices of a mesh."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from sharding.compiler_options import compiler_options
from sharding.settings import default_settings


class MeshProgram:
    """A function that every device of a mesh runs on its shares of the arguments, jitted.

    It is the same program whatever JAX settings the session has (`sharding.settings`).

    Args:
      function: the code inside `shard_map`, manual over all axes of the mesh.
      mesh: the devices.
      in_specs, out_specs: as for `jax.shard_map`.
      name: of the compiled program.
      donate: numbers of the arguments whose memory the results take over.
      options: of the compiler for NVIDIA GPUs, beside those that all programs get.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: Mesh,
        in_specs: Any,
        out_specs: Any,
        *,
        name: str,
        donate: tuple[int, ...] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
    ):
        # check_vma would require a collective for each replicated result, even over an axis of
        # size 1, where the functions of `sharding.collectives` issue none.
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        mapped.__name__ = name
        self._jitted = jax.jit(
            mapped,
            donate_argnums=donate,
            compiler_options=compiler_options(mesh, options),
        )

    def __call__(self, *args: Any) -> Any:
        """Runs the program; compiles it first if the shapes of the arguments are new."""
        with default_settings():
            return self._jitted(*args)

    def compile(self, *args: Any) -> Any:
        """Compiles the program for arguments of these shapes; nothing runs.

        It may be called in any thread. A later call with such arguments compiles nothing.

        Args:
          args: arrays, or `jax.ShapeDtypeStruct`s with the shardings of those to come.

        Returns:
          The results as `jax.ShapeDtypeStruct`s with their shardings.
        """
        with default_settings():
            lowered = self._jitted.lower(*args)
            shardings = lowered.compile().output_shardings
        return jax.tree.map(
            lambda result, sharding: jax.ShapeDtypeStruct(
                result.shape, result.dtype, sharding=sharding
            ),
            lowered.out_info,
            shardings,
        )

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Lowers the program for arguments of these shapes; nothing runs."""
        with default_settings():
            return self._jitted.lower(*args)
