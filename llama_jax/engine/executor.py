"""The device side of the engine: it runs ticks, and knows nothing about requests.

Its contract: slots are a flat range `[0, num_slots)`. A tick takes one packed packet, and returns
one result, that of the packet that entered P - 1 ticks earlier. The host keeps the sampling
parameters of a packet, and passes them in the tick in which the packet leaves.
"""

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.bit_mask import make_mask
from llama_jax.model import Llama
from llama_jax.model.adjustments import HISTORY_CHUNK, encode_adjustments
from llama_jax.model.controls import any_filter, encode_controls
from llama_jax.model.logprobs import Logprobs
from llama_jax.model.token_masks import capacities, encode_masks
from llama_jax.ring.attention_backend import AUTO
from llama_jax.ring.choosing import (
    adjust_step,
    count_step,
    filter_step,
    history_shape,
    history_step,
    logprobs_step,
    mask_step,
    sample_step,
)
from llama_jax.ring.kv_cache import allocate
from llama_jax.ring.packet import encode_packet, packet_size
from llama_jax.ring.scoring import TileScores, score_inputs, score_step
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.steps import (
    State,
    Step,
    decode_step,
    init_state,
    prefill_step,
    state_shapes,
)
from llama_jax.weights.placement import Params

T = TypeVar("T")

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class TickResult(NamedTuple):
    """The result of a tick, which may still be on its way from the device.

    Attributes:
      tokens: `[segments]` int32, the sampled tokens.
      logits: `[segments, V']` float32, copied to the host only when read.
      bucket: the bucket of the program that ran.
      logprobs: of the sampled tokens, if they were asked for.
      scores: of the prompt tokens that follow those of a tile, by the tile's index in the packet.
    """

    tokens: jax.Array
    logits: jax.Array
    bucket: Bucket
    logprobs: Logprobs | None = None
    scores: Mapping[int, TileScores] = {}


class Choice(NamedTuple):
    """How the tokens of the packet that leaves are chosen, if not all of them are the likeliest.

    Attributes:
      controls: from `encode_controls`; None if every segment is greedy.
      adjustments: from `encode_adjustments`; None if no logits are changed.
      masks: (segment, mask `[V / 32]` int32) of those that may not choose every token; None if all
        may.
      logprobs: whether log-probabilities are wanted.
    """

    controls: np.ndarray | None = None
    adjustments: np.ndarray | None = None
    masks: Sequence[tuple[int, np.ndarray]] | None = None
    logprobs: bool = False


GREEDY = Choice()


class Executor:
    """Owns the weights, the state and the compiled programs of one mesh.

    Args (each is also an attribute, except `fill`):
      config: the model.
      mesh: the devices.
      sizes: the sizes of the ring.
      params: the weights on the mesh.
      dtype: the dtype of the activations.
      fill: the initial value of the cache; tests use NaN.
      model_class: the class whose layers run and whose sampler chooses tokens.
      cache_dtype: the dtype of the KV cache; None for that of the activations.
      attention_backend: of `EngineOptions`.

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
        cache_dtype: jnp.dtype | None = None,
        attention_backend: str = AUTO,
    ):
        self.config, self.mesh, self.sizes = config, mesh, sizes
        self.dtype, self.model_class = dtype, model_class
        self.cache_dtype = cache_dtype or dtype
        self.attention_backend = attention_backend
        self.call_seconds = 0.0
        # Several unfinished programs with collectives starve XLA:CPU's threads and hang it. If JAX
        # was initialized before `configure_jax`, a call may return before its program has ended.
        self._one_at_a_time = mesh.devices.flat[0].platform == "cpu"
        self.params = params
        self._state: State = init_state(self.state_shapes(), sizes, fill)
        self._steps: dict[Bucket, Step] = {
            bucket: prefill_step(config, mesh, sizes, *bucket, model_class, attention_backend)
            if bucket.chunk
            else decode_step(config, mesh, sizes, bucket.rows, model_class, attention_backend)
            for bucket in sizes.buckets()
        }
        self._sample = sample_step(mesh, model_class)
        self._filter = filter_step(mesh, model_class)
        self._adjust = adjust_step(mesh, model_class)
        self._count = count_step(mesh)
        self._mask = mask_step(mesh, model_class)
        self._extend_history = history_step(mesh)
        self._log_probabilities = logprobs_step(mesh)
        self._score = score_step(config, mesh, sizes)
        self._history = allocate(history_shape(config, mesh, sizes))

    def state_shapes(self) -> State:
        """The shapes of the state."""
        return state_shapes(self.config, self.mesh, self.sizes, self.dtype, self.cache_dtype)

    @property
    def state(self) -> State:
        """The state on the devices."""
        return self._state

    def run(self, bucket: Bucket, packed: np.ndarray, choice: Choice = GREEDY) -> TickResult:
        """Dispatches one tick.

        Args:
          bucket: a bucket large enough for every packet in flight, including this one.
          packed: the packet that enters, from `encode_packet`.
          choice: how the tokens of the packet that leaves are chosen, for the segments of this
            bucket.
        """
        start = time.perf_counter()
        state, output = self._steps[bucket](self.params, self._state, packed)
        self._finish(output.tokens)
        kept, raw = state.tokens, output.logits
        if choice.masks is not None:
            n = self.sizes.num_segments(bucket)
            room = next(size for size in capacities(n) if size >= len(choice.masks))
            args = encode_masks(n, choice.masks, self.config.vocab_size, self.mesh.size, room)
            kept, output = self._finish(self._mask(kept, output, *args))
        if choice.adjustments is not None:
            kept, output = self._finish(
                self._adjust(kept, self._history, output, choice.adjustments)
            )
        tokens = output.tokens
        if choice.controls is not None:
            if self._filter is not None and any_filter(choice.controls):
                output = self._finish(self._filter(output, choice.controls))
            kept, tokens = self._finish(self._sample(kept, output, choice.controls))
        if choice.adjustments is not None:
            self._history = self._count(self._history, output.slots, tokens)
            self._finish(self._history)
        self._state = state._replace(tokens=kept)
        self._finish(tokens)
        logprobs = None
        if choice.logprobs:
            logprobs = self._finish(self._log_probabilities(raw, tokens))
            jax.tree.map(lambda array: array.copy_to_host_async(), logprobs)
        tokens.copy_to_host_async()
        self.call_seconds += time.perf_counter() - start
        return TickResult(tokens, raw, bucket, logprobs)

    def score(self, tile: int, targets: list[int]) -> TileScores:
        """Dispatches the log-probabilities of prompt tokens.

        Call it between the tick in which their packet leaves and the next.

        Args:
          tile: the index of a tile in the packet that left in the latest tick.
          targets: the token that follows each of its tokens; there may be fewer.
        """
        start = time.perf_counter()
        padded = np.zeros(self.sizes.tile, np.int32)
        padded[: len(targets)] = targets
        first = np.int32(tile * self.sizes.tile)
        inputs = score_inputs(self.params, self._state)
        scores = self._finish(self._score(*inputs, first, padded))
        jax.tree.map(lambda array: array.copy_to_host_async(), scores)
        self.call_seconds += time.perf_counter() - start
        return scores

    def set_history(self, slot: int, prompt: list[int], answer: list[int]) -> None:
        """Sets the tokens before those that a slot will choose, for its penalties.

        Call it between the last tick of the slot's previous owner and the first tick that chooses a
        token for the new one.
        """
        tokens = np.array([*prompt, *answer], np.int32)
        for first in range(0, len(tokens), HISTORY_CHUNK):
            chunk = np.full(HISTORY_CHUNK, -1, np.int32)
            part = tokens[first : first + HISTORY_CHUNK]
            chunk[: len(part)] = part
            num_prompt = np.int32(len(prompt) - first)
            self._history = self._finish(
                self._extend_history(
                    self._history, np.int32(slot), chunk, np.bool_(first == 0), num_prompt
                )
            )

    def _finish(self, arrays: T) -> T:
        """Waits for a program where only one may be unfinished at a time."""
        return jax.block_until_ready(arrays) if self._one_at_a_time else arrays

    def lowered(self, bucket: Bucket) -> jax.stages.Lowered:
        """Lowers the program of a bucket for inspection: `.compile().as_text()`.

        Nothing runs, and the compiled programs of the ticks are not touched.
        """
        packed = jax.ShapeDtypeStruct((packet_size(self.sizes, bucket),), jnp.int32)
        state = self.state_shapes()
        step: Any = self._steps[bucket]
        return step.lower(self.params, state, packed)

    def warm_up(self, progress: Callable[[int, int, str], None]) -> None:
        """Compiles every program by running it on an empty packet, which changes no state."""
        buckets = self.sizes.buckets()
        tables = np.zeros((self.sizes.num_slots, self.sizes.pages_per_sequence), np.int32)
        for done, bucket in enumerate(buckets):
            progress(done, len(buckets), f"{bucket.rows} rows, chunk of {bucket.chunk}")
            packed = encode_packet(self.sizes, bucket, tables, [], [], [])
            n = self.sizes.num_segments(bucket)
            controls = encode_controls(n, [(0, 0, 0, SamplingParams(top_k=1))])  # with a filter
            choices = [Choice(controls, encode_adjustments(n, []), logprobs=True)]
            mask = make_mask(self.config.vocab_size, [0])
            choices += [Choice(masks=[(0, mask)] * room) for room in capacities(n)]
            for choice in choices:
                jax.block_until_ready(self.run(bucket, packed, choice).tokens)
        self.set_history(0, [0], [])
        if self.sizes.max_chunk:
            jax.block_until_ready(self.score(0, [0]))
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
