"""JAX's settings for this project's programs, whatever the session around them has set.

A session may set them for its own code, by environment variables such as JAX_ENABLE_X64, by
`jax.config.update` or by `jax.set_mesh`. Seeded answers would change with some of them, and others
would make a program fail or run without being compiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def default_promotion() -> Iterator[None]:
    """JAX's default rules of promotion, for code that may run inside a trace of the session.

    Shapes broadcast as in NumPy, and a dtype that is wider than another one wins.
    """
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@contextmanager
def default_settings() -> Iterator[None]:
    """JAX's default settings, for whole programs: they must be called and lowered inside.

    Entering costs 10 µs. Not for code inside a trace of the session, where values of 64 bits may
    already exist.
    """
    with (
        jax.set_mesh(None),  # every program names its own mesh, and fails under another one
        jax.transfer_guard_host_to_device("allow"),  # packets come from the host in every tick
        jax.debug_infs(False),  # tokens that may not be chosen have a logit of -inf
        default_promotion(),
        jax.enable_x64(False),
        jax.disable_jit(False),
        jax.threefry_partitionable(True),
        jax.default_prng_impl("threefry2x32"),
    ):
        yield
