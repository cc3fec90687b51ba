"""The device side of the engine: runs ticks, knows nothing of requests.

Its contract: slots are a flat range `[0, num_slots)`; a tick takes one packed packet in and brings
one result out, that of the packet that entered P - 1 ticks before. Everything the host keeps of a
packet, such as sampling parameters, it must give back here in the tick in which it leaves.
"""

import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.model.sampling import encode_controls
from llama_jax.ring.packet import encode_packet, packet_size
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.steps import (
    SampleStep,
    State,
    Step,
    decode_step,
    init_state,
    prefill_step,
    sample_step,
    state_shapes,
)
from llama_jax.weights.placement import Params

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class TickResult(NamedTuple):
    """What a tick brought, still on its way from the device.

    Attributes:
      tokens: `[segments]` int32.
      logits: `[segments, V']` float32; it is copied to the host only if somebody reads it.
      bucket: of the program that ran.
    """

    tokens: jax.Array
    logits: jax.Array
    bucket: Bucket


class Executor:
    """Owns the weights, the state and the compiled programs of one mesh.

    Everything it is made of is there to be read, under the names of its arguments.

    Args:
      config, mesh, sizes: what to build.
      params: the weights on the mesh.
      dtype: of activations and cache.
      fill: what the cache starts out with; tests use NaN.
      model_class: whose layers run and whose sampler chooses.
    """

    def __init__(
        self,
        config: LlamaConfig,
        mesh: Mesh,
        sizes: RingSizes,
        params: Params,
        dtype: jnp.dtype,
        fill: float = 0.0,
        model_class: type[Llama] = Llama,
    ):
        self.config, self.mesh, self.sizes = config, mesh, sizes
        self.dtype, self.model_class = dtype, model_class
        self.call_seconds = 0.0  # host time spent in the jit calls themselves
        # Several unfinished programs with collectives starve XLA:CPU's threads and hang it; where
        # JAX had started before the engine, a call may return before its program has ended.
        self._one_at_a_time = mesh.devices.flat[0].platform == "cpu"
        self.params = params
        self._state: State = init_state(state_shapes(config, mesh, sizes, dtype), sizes, fill)
        self._steps: dict[Bucket, Step] = {
            bucket: prefill_step(config, mesh, sizes, bucket.rows, bucket.chunk, model_class)
            if bucket.chunk
            else decode_step(config, mesh, sizes, bucket.rows, model_class)
            for bucket in sizes.buckets()
        }
        self._sample: SampleStep = sample_step(mesh, model_class)

    @property
    def state(self) -> State:
        """What is on the device now."""
        return self._state

    def run(self, bucket: Bucket, packed: np.ndarray, controls: np.ndarray | None) -> TickResult:
        """Dispatches one tick.

        Args:
          bucket: large enough for every packet in flight, this one included.
          packed: the packet that enters, from `encode_packet`.
          controls: sampling parameters of the packet that leaves, from `encode_controls` for the
            segments of this bucket; None where it is all greedy.
        """
        start = time.perf_counter()
        state, output = self._steps[bucket](self.params, self._state, packed)
        tokens = output.tokens
        if self._one_at_a_time:
            tokens.block_until_ready()
        if controls is not None:
            kept, tokens = self._sample(state.tokens, output, controls)
            state = state._replace(tokens=kept)
            if self._one_at_a_time:
                tokens.block_until_ready()
        self._state = state
        tokens.copy_to_host_async()
        self.call_seconds += time.perf_counter() - start
        return TickResult(tokens, output.logits, bucket)

    def lowered(self, bucket: Bucket) -> jax.stages.Lowered:
        """The program of a bucket before it is compiled, to be read: `.compile().as_text()`.

        Nothing runs, and the compiled programs of the ticks are not touched.
        """
        packed = jax.ShapeDtypeStruct((packet_size(self.sizes, bucket),), jnp.int32)
        state = state_shapes(self.config, self.mesh, self.sizes, self.dtype)
        step: Any = self._steps[bucket]
        return step.lower(self.params, state, packed)

    def warm_up(self, progress: Callable[[int, int, str], None]) -> None:
        """Compiles every program by running it on an empty packet, which changes nothing."""
        buckets = self.sizes.buckets()
        tables = np.zeros((self.sizes.num_slots, self.sizes.pages_per_sequence), np.int32)
        for done, bucket in enumerate(buckets):
            progress(done, len(buckets), f"{bucket.rows} rows, chunk of {bucket.chunk}")
            packed = encode_packet(self.sizes, bucket, tables, [], [], [])
            controls = encode_controls(self.sizes.num_segments(bucket), [])
            jax.block_until_ready(self.run(bucket, packed, controls).tokens)
        progress(len(buckets), len(buckets), "")


class CompileCounter:
    """Counts compilations of this thread from now on; other threads may not be the engine's."""

    def __init__(self) -> None:
        self.count = 0
        listener = partial(_count, weakref.ref(self), threading.get_ident())
        jax.monitoring.register_event_duration_secs_listener(listener)
        unregister = jax.monitoring.unregister_event_duration_listener
        weakref.finalize(self, unregister, listener).atexit = False


def _count(
    counter: weakref.ref[CompileCounter], thread: int, event: str, seconds: float, **_: object
) -> None:
    this = counter()
    if this is not None and event == COMPILE_EVENT and threading.get_ident() == thread:
        this.count += 1
