"""The device side of the engine: it runs ticks, and knows nothing about requests.

Its contract: slots are a flat range `[0, num_slots)`. A tick takes one packed packet, and returns
one result, that of the packet that entered P - 1 ticks earlier. The host keeps the sampling
parameters of a packet, and passes them in the tick in which the packet leaves.
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
    """The result of a tick, which may still be on its way from the device.

    Attributes:
      tokens: `[segments]` int32, the sampled tokens.
      logits: `[segments, V']` float32, copied to the host only when read.
      bucket: the bucket of the program that ran.
    """

    tokens: jax.Array
    logits: jax.Array
    bucket: Bucket


class Executor:
    """Owns the weights, the state and the compiled programs of one mesh.

    Args (each is also an attribute, except `fill`):
      config: the model.
      mesh: the devices.
      sizes: the sizes of the ring.
      params: the weights on the mesh.
      dtype: the dtype of activations and cache.
      fill: the initial value of the cache; tests use NaN.
      model_class: the class whose layers run and whose sampler chooses tokens.

    Attributes:
      call_seconds: host time spent in calls of the compiled programs.
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
        self.call_seconds = 0.0
        # Several unfinished programs with collectives starve XLA:CPU's threads and hang it. If JAX
        # was initialized before `configure_jax`, a call may return before its program has ended.
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
        """The state on the devices."""
        return self._state

    def run(self, bucket: Bucket, packed: np.ndarray, controls: np.ndarray | None) -> TickResult:
        """Dispatches one tick.

        Args:
          bucket: a bucket large enough for every packet in flight, including this one.
          packed: the packet that enters, from `encode_packet`.
          controls: the sampling parameters of the packet that leaves, from `encode_controls` for
            the segments of this bucket; None if every segment is greedy.
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
        """Lowers the program of a bucket for inspection: `.compile().as_text()`.

        Nothing runs, and the compiled programs of the ticks are not touched.
        """
        packed = jax.ShapeDtypeStruct((packet_size(self.sizes, bucket),), jnp.int32)
        state = state_shapes(self.config, self.mesh, self.sizes, self.dtype)
        step: Any = self._steps[bucket]
        return step.lower(self.params, state, packed)

    def warm_up(self, progress: Callable[[int, int, str], None]) -> None:
        """Compiles every program by running it on an empty packet, which changes no state."""
        buckets = self.sizes.buckets()
        tables = np.zeros((self.sizes.num_slots, self.sizes.pages_per_sequence), np.int32)
        for done, bucket in enumerate(buckets):
            progress(done, len(buckets), f"{bucket.rows} rows, chunk of {bucket.chunk}")
            packed = encode_packet(self.sizes, bucket, tables, [], [], [])
            controls = encode_controls(self.sizes.num_segments(bucket), [])
            jax.block_until_ready(self.run(bucket, packed, controls).tokens)
        progress(len(buckets), len(buckets), "")


class CompileCounter:
    """Counts the compilations of the thread that creates it; other threads may be the user's."""

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
