"""What the ring runs on its devices: kernels for Hopper GPUs, or plain JAX.

The attention kernel serves Hopper GPUs; plain attention serves every other device, every model that
changes its scores (`Attention.score_mod`), and every shape that the kernel does not know.
"""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.model import Attention, Llama
from llama_jax.model.attention import KEY_BLOCK, QUERY_BLOCK, ScoreMod, no_score_mod
from llama_jax.ring.sizes import Bucket
from sharding.errors import UserError

AUTO, PLAIN, HOPPER = "auto", "plain", "hopper"
# XLA:GPU waits for the host in every iteration of a loop whose length it does not know, so there
# should be few, at the price of keys that only the longest sequence has. Unmeasured.
GPU_BLOCKS = (1024, 512)  # keys, queries
# Shares of the keys that XLA merges in the kernel that follows. Of more it makes a kernel before.
FEW_SPLITS = 8

# (q, k_pages, v_pages, page_table, positions, lengths, score_mod, first_head,
#  k_scale, v_scale) -> output, as for `paged_attention`
AttendToPages = Callable[..., jax.Array]
_log = logging.getLogger(__name__)


class Backend(NamedTuple):
    """The attention over the KV cache and the products with int4 matrices of a program.

    Attributes:
      attention: PLAIN, AUTO (the kernel where it can run) or HOPPER (an error where it cannot).
      num_cores: multiprocessors of each GPU, for the attention kernel.
      key_block, query_block: of plain attention, per iteration.
      int4_kernel: whether int4 matrices multiply by their kernel; if not, XLA multiplies.
    """

    attention: str = PLAIN
    num_cores: int = 0
    key_block: int = KEY_BLOCK
    query_block: int = QUERY_BLOCK
    int4_kernel: bool = False

    def attend(self, plain: AttendToPages, bucket: Bucket) -> AttendToPages:
        """Returns the kernel where it can run, and elsewhere `plain`; both are called alike."""
        return partial(self._attend, plain, bucket)

    def _attend(
        self,
        plain: AttendToPages,
        bucket: Bucket,
        q: jax.Array,
        k_pages: jax.Array,
        v_pages: jax.Array,
        page_table: jax.Array,
        positions: jax.Array,
        lengths: jax.Array,
        score_mod: ScoreMod,
        first_head: jax.Array | int = 0,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
    ) -> jax.Array:
        arrays = (q, k_pages, v_pages, page_table, positions, lengths)
        if self.attention != PLAIN:
            # Imported here, since importing Pallas takes 2 s.
            from llama_jax.model.hopper_attention import hopper_attention, unsupported

            reason = _changes_scores(score_mod) or unsupported(q, k_pages, v_pages)
            if reason is None:
                # The time of a tick with a chunk is that of its products: it can spare the GPU's
                # full width for a few rows, but not a kernel more in every layer.
                few = {"max_filling_splits": FEW_SPLITS} if bucket.chunk else {}
                return hopper_attention(*arrays, k_scale, v_scale, num_cores=self.num_cores, **few)
            if self.attention == HOPPER:
                raise _cannot_run(reason)
            _say_once(reason)
        blocks = {"key_block": self.key_block, "query_block": self.query_block}
        return plain(*arrays, score_mod, first_head, k_scale, v_scale, **blocks)


def choose_backend(name: str | Backend, mesh: Mesh) -> Backend:
    """Chooses the backend for the devices of a mesh.

    Args:
      name: AUTO, PLAIN or HOPPER; or what was chosen before, and stays.
      mesh: the devices, which need not exist.

    Raises:
      UserError: `name` is none of them, or HOPPER, and these are not Hopper GPUs.
    """
    if isinstance(name, Backend):
        return name
    if name not in (AUTO, PLAIN, HOPPER):
        raise UserError(
            f"attention_backend must be one of {AUTO}, {PLAIN}, {HOPPER}, got {name!r}."
        )
    device = mesh.devices.flat[0]
    if device.platform != "gpu":
        if name == HOPPER:
            raise _cannot_run(f"a device of the platform {device.platform}")
        return Backend()
    if name == PLAIN:
        return Backend(PLAIN, 0, *GPU_BLOCKS)
    # The instructions of the kernels exist on this generation only.
    if getattr(device, "compute_capability", None) != "9.0":
        if name == HOPPER:
            raise _cannot_run(f"a GPU of the kind {device.device_kind}")
        _say_once(f"a GPU of the kind {device.device_kind}")
        return Backend(PLAIN, 0, *GPU_BLOCKS)
    return Backend(name, device.core_count, *GPU_BLOCKS, int4_kernel=True)


def check_backend(
    name: str,
    mesh: Mesh,
    model_class: type[Llama],
    head_dim: int,
    page_size: int,
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype,
) -> None:
    """Checks, before anything is loaded, that the kernel can run if the user demands it.

    Args:
      name: AUTO, PLAIN or HOPPER.
      mesh: the devices.
      model_class: whose layers run.
      head_dim, page_size: h, and the tokens of a page.
      dtype, kv_dtype: of the activations and of the KV cache.

    Raises:
      UserError: `name` is HOPPER, and the kernel cannot run.
    """
    if choose_backend(name, mesh).attention != HOPPER:
        return
    reason = why_plain(model_class, head_dim, page_size, dtype, kv_dtype)
    if reason is not None:
        raise _cannot_run(reason)


def why_plain(
    model_class: type[Llama],
    head_dim: int,
    page_size: int,
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype,
) -> str | None:
    """Says why the kernel cannot run on a Hopper GPU; None if it can. Arguments as before."""
    from llama_jax.model.hopper_attention import unsupported

    q = jax.ShapeDtypeStruct((1, 1, 1, head_dim), dtype)
    pages = jax.ShapeDtypeStruct((1, 1, page_size, head_dim), kv_dtype)
    score_mod = model_class.layer_class.attention_class.score_mod
    return _changes_scores(score_mod) or unsupported(q, pages, pages)


def _changes_scores(score_mod: Callable[..., jax.Array]) -> str | None:
    function = getattr(score_mod, "__func__", score_mod)
    known: tuple[object, ...] = (Attention.score_mod, no_score_mod)
    return None if function in known else "a model with its own score_mod"


def _cannot_run(reason: str) -> UserError:
    return UserError(
        f"attention_backend is {HOPPER}, but its kernel cannot run with {reason}: "
        f"use {AUTO} or {PLAIN}."
    )


@lru_cache(maxsize=64)  # once per reason, not in every layer of every program
def _say_once(reason: str) -> None:
    _log.warning("The attention kernel cannot run with %s: plain attention runs instead.", reason)
