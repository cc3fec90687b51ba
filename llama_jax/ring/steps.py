"""The compiled programs: `prefill_step` and `decode_step`, each one tick of the ring.

`decode_step` is the tick in which no stage holds a chunk of a prompt; `prefill_step` is the tick
whose largest chunk in flight fits its bucket. Both advance all decode rows in flight.
`masked_decode_step` is the first of them for a packet with masks.
`RingSizes.buckets()` lists their buckets: after each has run once, nothing compiles again.

Arguments and results are tuples and dicts of arrays, not NNX objects: traversing an `nnx.State` on
every call takes more host time than the rest of the call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.ring import kv_cache
from llama_jax.ring.backend import AUTO, Backend, choose_backend
from llama_jax.ring.gpu_options import graph_options, product_options
from llama_jax.ring.packet import mark_empty, segment_width
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.static_args import StaticArgs, token_multiple
from llama_jax.ring.tick import State, StepOutput, masked_tick, tick
from llama_jax.weights.placement import Params, param_specs
from sharding.axes import AXES, STAGE
from sharding.memory import allocate
from sharding.mesh import mesh_shape
from sharding.program import MeshProgram
from sharding.ring import RingState

LOGITS_SPEC = P(None, AXES)  # [segments, V']
MASKS_SPEC = P(None, AXES)  # [segments, ranks * W]
OUTPUT_SPEC = StepOutput(LOGITS_SPEC, P(), P())

# (params, state, packed packet) -> (state, output)
Step = Callable[[Params, State, Any], tuple[State, StepOutput]]
# (params, state, packed packet, masks by row) -> (state, output, logits without the masks)
MaskedStep = Callable[[Params, State, Any, Any], tuple[State, StepOutput, jax.Array]]


def decode_step(
    config: LlamaConfig,
    mesh: Mesh,
    sizes: RingSizes,
    rows: int,
    model_class: type[Llama] = Llama,
    attention_backend: str | Backend = AUTO,
) -> Step:
    """The jitted tick with no chunk in flight. Donates the state."""
    static = _static_args(config, mesh, sizes, Bucket(rows, 0), model_class, attention_backend)
    return _jit_step(mesh, static, "decode_step")


def masked_decode_step(
    config: LlamaConfig,
    mesh: Mesh,
    sizes: RingSizes,
    rows: int,
    model_class: type[Llama] = Llama,
    attention_backend: str | Backend = AUTO,
) -> MaskedStep:
    """The jitted `ring.tick.masked_tick` with no chunk in flight. Donates the state."""
    static = _static_args(config, mesh, sizes, Bucket(rows, 0), model_class, attention_backend)
    masks, raw = (MASKS_SPEC,), (LOGITS_SPEC,)
    return _jit_step(mesh, static, "masked_decode_step", masked_tick, masks, raw)


def prefill_step(
    config: LlamaConfig,
    mesh: Mesh,
    sizes: RingSizes,
    rows: int,
    chunk: int,
    model_class: type[Llama] = Llama,
    attention_backend: str | Backend = AUTO,
) -> Step:
    """The jitted tick whose largest chunk in flight fits `chunk` tokens. Donates the state."""
    bucket = Bucket(rows, chunk)
    static = _static_args(config, mesh, sizes, bucket, model_class, attention_backend)
    return _jit_step(mesh, static, f"prefill_step_{chunk}")


def state_specs() -> State:
    """State of PartitionSpec, as a prefix: one of them stands for all arrays of the cache."""
    cache: Any = kv_cache.SPEC
    return State(RingState(P(), P(), (P(STAGE), P(STAGE))), P(), cache)


def state_shapes(
    config: LlamaConfig,
    mesh: Mesh,
    sizes: RingSizes,
    dtype: jnp.dtype,
    cache_dtype: jnp.dtype | None = None,
) -> State:
    """State of ShapeDtypeStruct with shardings, to allocate or to compile for.

    Args:
      config: the model.
      mesh: the devices.
      sizes: of the ring.
      dtype: of the activations.
      cache_dtype: of the KV cache; None for that of the activations.
    """
    num_stages, _ = mesh_shape(mesh)

    def array(shape: tuple[int, ...], kind: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))

    segments = (num_stages, sizes.max_segments, segment_width(sizes))
    # At least 1: XLA:CPU of jaxlib 0.11.2 crashes on arguments of `shard_map` with size 0.
    capacities = (max(1, sizes.max_rows), max(1, sizes.max_chunk))
    ring = RingState(
        tick=array((), jnp.int32, P()),
        metadata=array(segments, jnp.int32, P()),
        activations=tuple(
            array((num_stages, capacity, config.embed_dim), dtype, P(STAGE))
            for capacity in capacities
        ),
    )
    cache = kv_cache.cache_shapes(
        config, mesh, sizes.num_pages, sizes.page_size, cache_dtype or dtype
    )
    return State(ring, array((sizes.num_slots,), jnp.int32, P()), cache)


def init_state(shapes: State, sizes: RingSizes, fill: float = 0.0) -> State:
    """Allocates the state on its devices: an empty ring, and a cache filled with `fill`."""
    metadata = np.zeros(shapes.ring.metadata.shape, np.int32)
    mark_empty(sizes, metadata)
    ring = RingState(
        tick=allocate(shapes.ring.tick),
        metadata=jax.device_put(metadata, shapes.ring.metadata.sharding),
        activations=jax.tree.map(allocate, shapes.ring.activations),
    )
    tokens = allocate(shapes.tokens)
    return State(ring, tokens, kv_cache.init_cache(shapes.cache, fill))


def _static_args(
    config: LlamaConfig,
    mesh: Mesh,
    sizes: RingSizes,
    bucket: Bucket,
    model_class: type[Llama],
    attention_backend: str | Backend,
) -> StaticArgs:
    backend = choose_backend(attention_backend, mesh)
    multiple = token_multiple(mesh.devices.flat[0].platform, bucket)
    return StaticArgs(config, sizes, bucket, model_class, backend, multiple)


def _jit_step(
    mesh: Mesh,
    static: StaticArgs,
    name: str,
    function: Callable[..., Any] = tick,
    more_in: tuple[P, ...] = (),
    more_out: tuple[P, ...] = (),
) -> MeshProgram:
    """Jits `tick`, or one with more arguments and results, whose specs follow those of `tick`."""
    specs = state_specs()
    in_specs = (param_specs(static.config, *mesh_shape(mesh)), specs, P(), *more_in)
    out_specs = (specs, OUTPUT_SPEC, *more_out)
    function = partial(function, static)
    options = {**product_options(static.config, static.bucket), **graph_options(static)}
    return MeshProgram(function, mesh, in_specs, out_specs, name=name, donate=(1,), options=options)
