"""Tries the kernels for Hopper GPUs on random inputs, before a model is served with them.

A kernel that a GPU, a driver or a version of JAX gets wrong raises no error: every answer is wrong,
and nobody sees it. So before an engine, a `ShardedLlama` or a calibration runs, each of its kernels
is compared with plain JAX, with the heads, pages and matrices that it will have.
"""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.model.attention import no_score_mod, paged_attention
from llama_jax.model.kv_storage import encode, has_scales, split_scale
from llama_jax.ring.backend import (
    AUTO,
    HOPPER,
    PLAIN,
    Backend,
    choose_backend,
    why_plain,
)
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.static_args import token_multiple
from llama_jax.weights.placement import param_shapes
from sharding.errors import UserError
from sharding.mesh import mesh_shape
from sharding.settings import default_settings
from sharding.stages import round_up

# Of the typical number of a row. Rounding to bfloat16 moves no number by more than 3 %.
MAX_ERROR = 0.1
RUNS = 3  # with other inputs each: threads that race for memory are not always wrong
SECONDS = 60.0  # after which a kernel hangs
NUM_PAGES = 32
MAX_KEYS = 1000

_log = logging.getLogger(__name__)

# seed -> the greatest error of any number, as a share of the typical number of its row
Check = Callable[[jax.Array], jax.Array]


def working_backend(
    name: str | Backend,
    config: LlamaConfig,
    mesh: Mesh,
    sizes: RingSizes,
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype,
    model_class: type[Llama] = Llama,
) -> Backend:
    """Chooses the backend for the devices of a mesh, without kernels that fail there.

    Args:
      name: as for `choose_backend`; a backend that was chosen here before stays.
      config, mesh, sizes, dtype, kv_dtype, model_class: as for `without_failing_kernels`.

    Raises:
      UserError: as `choose_backend` and `without_failing_kernels`.
    """
    if isinstance(name, Backend):
        return name
    chosen = choose_backend(name, mesh)
    return without_failing_kernels(chosen, config, mesh, sizes, dtype, kv_dtype, model_class)


def without_failing_kernels(
    backend: Backend,
    config: LlamaConfig,
    mesh: Mesh,
    sizes: RingSizes,
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype,
    model_class: type[Llama] = Llama,
) -> Backend:
    """Tries the kernels that a backend uses, and returns it without those that fail.

    A kernel fails if it does not compile or differs from plain JAX; a warning says so. Runs on the
    first device, needs memory for one int4 matrix in float32, and frees it again.

    Args:
      backend: from `choose_backend`.
      config: the model.
      mesh: the devices.
      sizes: of the ring.
      dtype, kv_dtype: of the activations and of the KV cache.
      model_class: whose layers run.

    Raises:
      UserError: a kernel crashed or hangs, so that this process cannot use the GPU any more; or the
        attention kernel fails, and it was demanded.
    """
    if backend.int4_kernel:
        for matrix, tokens in int4_products(config, mesh, sizes, dtype):
            what = "int4 products of {} x {}".format(*matrix.values.shape)
            check = partial(int4_error, matrix, tokens, dtype)
            if failure := try_kernel(what, check, mesh):
                _log.warning("The kernel for %s: XLA multiplies instead, more slowly.", failure)
                backend = backend._replace(int4_kernel=False)
                break
    kernel_runs = backend.attention != PLAIN and not why_plain(
        model_class, config.head_dim, sizes.page_size, dtype, kv_dtype
    )
    if kernel_runs:
        check = partial(attention_error, backend, config, mesh, sizes, dtype, kv_dtype)
        if failure := try_kernel("attention", check, mesh):
            if backend.attention == HOPPER:
                raise UserError(
                    f"attention_backend is {HOPPER}, but the kernel for {failure}: "
                    f"use {AUTO} or {PLAIN}."
                )
            _log.warning("The kernel for %s: plain attention runs instead, more slowly.", failure)
            backend = backend._replace(attention=PLAIN, num_cores=0)
    return backend


@default_settings()
def try_kernel(what: str, check: Check, mesh: Mesh) -> str | None:
    """Says how a kernel fails; None if it is right.

    Raises:
      UserError: it crashed or hangs.
    """
    with jax.default_device(mesh.devices.flat[0]):
        try:
            program = jax.jit(check).lower(jnp.uint32(0)).compile()
        except Exception as error:  # of any layer of the compiler
            return f"{what} does not compile ({_first_line(error)})"
        try:
            errors = [program(jnp.uint32(seed)) for seed in range(RUNS)]
            _wait(errors)
            worst = max(map(float, errors))
        except (jax.errors.JaxRuntimeError, TimeoutError) as error:
            raise UserError(
                f"The kernel for {what} does not run on this GPU ({_first_line(error)}): use "
                f"attention_backend {PLAIN}."
            ) from error
    if worst <= MAX_ERROR:
        return None
    return f"{what} is wrong on this GPU: numbers differ by up to {worst:.2g} times a typical one"


def _wait(arrays: list[Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not all(array.is_ready() for array in arrays):
        if time.monotonic() > deadline:
            raise TimeoutError(f"it has not ended after {SECONDS:.0f} s")
        time.sleep(0.001)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def attention_error(
    backend: Backend,
    config: LlamaConfig,
    mesh: Mesh,
    sizes: RingSizes,
    dtype: jnp.dtype,
    kv_dtype: jnp.dtype,
    seed: jax.Array,
) -> jax.Array:
    """The error of decode rows and of tiles of a rank's heads, over pages in 8 bits or not.

    Tables have garbage where a sequence has no page: a page full of NaN, and pages past the pool.
    """
    num_ranks = mesh_shape(mesh)[1]
    heads, kv_heads = config.num_heads // num_ranks, max(1, config.num_kv_heads // num_ranks)
    keys = jax.random.split(jax.random.key(seed), 5)
    shape = (2, kv_heads, NUM_PAGES, sizes.page_size, config.head_dim)
    pages = jax.random.normal(keys[0], shape).at[:, :, -1].set(jnp.nan)
    scales: Any = (None, None)
    if has_scales(kv_dtype):
        pages, scales = split_scale(pages, kv_dtype)
    pages = encode(pages, kv_dtype)
    capacity = sizes.pages_per_sequence * sizes.page_size
    most = min(capacity, MAX_KEYS)
    lengths = jnp.array([0, 1, min(capacity, sizes.page_size + 1), most])
    column = jnp.arange(sizes.pages_per_sequence)
    tables = jax.random.randint(keys[1], (len(lengths), len(column)), 0, NUM_PAGES - 1)
    garbage = NUM_PAGES - 1 + column % 2 * 1000
    tables = jnp.where(column * sizes.page_size < lengths[:, None], tables, garbage)
    errors = []
    for num_queries, key in ((1, keys[2]), (sizes.tile, keys[3])):
        q = jax.random.normal(key, (len(lengths), num_queries, heads, config.head_dim), dtype)
        positions = jnp.maximum(lengths - num_queries, 0)[:, None] + jnp.arange(num_queries)
        arrays = (q, *pages, tables, positions, lengths, no_score_mod, 0, *scales)
        bucket = Bucket(len(lengths), num_queries if num_queries > 1 else 0)
        out = backend.attend(paged_attention, bucket)(*arrays)
        errors.append(_error(out, paged_attention(*arrays)))
    return jnp.max(jnp.stack(errors))


def int4_error(
    matrix: Any, numbers_of_tokens: list[int], dtype: jnp.dtype, seed: jax.Array
) -> jax.Array:
    """The error of products with a random matrix, given the shapes of its arrays."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 4)  # threefry takes much longer
    nibbles = jax.random.bits(keys[0], matrix.values.shape, jnp.uint8) & 15
    scale = jax.random.uniform(keys[1], matrix.scale.shape, dtype, 0.5, 1)
    zero = jax.random.uniform(keys[2], matrix.zero.shape, dtype, -4, 4)
    matrix = type(matrix)((nibbles.astype(jnp.int8) - 8).astype(jnp.int4), scale, zero)
    exact = matrix.dequantize()
    errors = []
    for num_tokens in numbers_of_tokens:
        x = jax.random.normal(keys[3], (num_tokens, exact.shape[1]), dtype)
        expected = jnp.matmul(x.astype(jnp.float32), exact.T, precision="highest")
        errors.append(_error(matrix.linear(x), expected))
    return jnp.max(jnp.stack(errors))


def _error(out: jax.Array, expected: jax.Array) -> jax.Array:
    """The greatest difference of any number, as a share of the typical number of its row."""
    out, expected = out.astype(jnp.float32), expected.astype(jnp.float32)
    typical = jnp.sqrt(jnp.mean(expected**2, axis=-1, keepdims=True))
    share = jnp.abs(out - expected) / jnp.maximum(typical, jnp.finfo(jnp.float32).tiny)
    return jnp.max(jnp.where(jnp.isnan(share), jnp.inf, share))


def _numbers_of_tokens(mesh: Mesh, sizes: RingSizes) -> list[int]:
    """Of the smallest and the largest program without a chunk, and of the largest with one."""

    def padded(bucket: Bucket) -> int:
        multiple = token_multiple(mesh.devices.flat[0].platform, bucket)
        return round_up(bucket.rows + bucket.chunk, multiple)

    return sorted({padded(b) for b in (Bucket(sizes.row_buckets[0], 0), *sizes.largest())} - {0})


def int4_products(
    config: LlamaConfig, mesh: Mesh, sizes: RingSizes, dtype: jnp.dtype
) -> Iterator[tuple[Any, list[int]]]:
    """What the int4 kernel multiplies on a rank: matrices as shapes, and numbers of tokens.

    Of products whose kernels differ in nothing but the number of steps, the first stands for all.
    """
    if config.quantization is None:
        return
    from llama_jax.model import hopper_int4
    from llama_jax.quantization.act_order import is_sorted

    kinds = (hopper_int4.HopperInt4, hopper_int4.HopperInt4ActOrder)
    local = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(
            array.sharding.shard_shape(array.shape)[1:],  # without the axis over stages
            array.dtype,
        ),
        param_shapes(config, mesh, dtype).layers,
    )
    weights = hopper_int4.with_kernel(local)
    nodes = jax.tree.leaves(weights, is_leaf=lambda node: isinstance(node, kinds))
    numbers = _numbers_of_tokens(mesh, sizes)
    seen: set[Any] = set()
    for node in dict.fromkeys(node for node in nodes if isinstance(node, kinds)):
        matrix = hopper_int4.HopperInt4(*node[:3])
        outputs, inputs = matrix.values.shape
        x = jax.ShapeDtypeStruct((1, inputs), dtype)
        in_place = isinstance(node, hopper_int4.HopperInt4ActOrder) and not is_sorted(node)
        if in_place or hopper_int4.unsupported(x, matrix) is not None:
            continue
        group = inputs // matrix.scale.shape[1]
        kernels = {}
        for n in numbers:
            tiles = hopper_int4.choose_tiles(n, outputs, inputs)
            spec = hopper_int4.make_spec(tiles, inputs, group)
            kernels[n] = spec._replace(steps=spec.stages)
        if new := [n for n in numbers if kernels[n] not in seen]:
            seen.update(kernels.values())
            yield matrix, new
