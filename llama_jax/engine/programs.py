"""The compiled programs of an engine, and the order in which a tick calls them.

`Programs` holds no arrays. `tick`, `score` and `set_history` name their programs and arguments once
for two uses: they run the programs on arrays, or compile them for shapes. So what is compiled is
what will run, and compiling needs no weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
from llama_jax.model.token_masks import capacities, encode_masks, masks_by_row
from llama_jax.ring.backend import AUTO, Backend
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
from llama_jax.ring.packet import packet_size
from llama_jax.ring.scoring import TileScores, score_inputs, score_step
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.steps import (
    MaskedStep,
    Step,
    decode_step,
    masked_decode_step,
    prefill_step,
    state_shapes,
)
from llama_jax.ring.tick import State
from llama_jax.weights.placement import Params, param_shapes


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


class Arrays(NamedTuple):
    """What an engine keeps on its devices, as arrays or as their shapes.

    Attributes:
      params: the weights.
      state: of the ring.
      history: the counts of the tokens of each slot, for penalties.
    """

    params: Params
    state: State
    history: Any


# (program, arguments) -> results: runs the program, or compiles it
Call = Callable[..., Any]


class Programs:
    """The programs of an engine, each compiled when it is first called or before that.

    Args (each is also an attribute):
      config: the model.
      mesh: the devices.
      sizes: the sizes of the ring.
      dtype: the dtype of the activations.
      model_class: the class whose layers run and whose sampler chooses tokens.
      cache_dtype: the dtype of the KV cache; None for that of the activations.
      attention_backend: of `EngineOptions`, or the backend that has been chosen and tried.

    Attributes:
      masked_steps: the programs of ticks that take masks as an input. For all other buckets,
        `mask_step` runs after the tick.
    """

    def __init__(
        self,
        config: LlamaConfig,
        mesh: Mesh,
        sizes: RingSizes,
        dtype: jnp.dtype,
        model_class: type[Llama] = Llama,
        cache_dtype: jnp.dtype | None = None,
        attention_backend: str | Backend = AUTO,
    ):
        self.config, self.mesh, self.sizes = config, mesh, sizes
        self.dtype, self.model_class = dtype, model_class
        self.cache_dtype, self.attention_backend = cache_dtype or dtype, attention_backend
        self._steps: dict[Bucket, Step] = {
            bucket: prefill_step(config, mesh, sizes, *bucket, model_class, attention_backend)
            if bucket.chunk
            else decode_step(config, mesh, sizes, bucket.rows, model_class, attention_backend)
            for bucket in sizes.buckets()
        }
        # To start one more program on all devices takes a CPU 1 to 3 ms, in which the tick waits.
        # A GPU starts it while the tick runs, and compiles each bucket once instead of twice.
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self.masked_steps: dict[Bucket, MaskedStep] = {
            bucket: masked_decode_step(
                config, mesh, sizes, bucket.rows, model_class, attention_backend
            )
            for bucket in sizes.buckets()
            if on_cpu and not bucket.chunk
        }
        self._sample = sample_step(mesh, model_class)
        self._filter = filter_step(mesh, model_class)
        self._adjust = adjust_step(mesh, model_class)
        self._count = count_step(mesh)
        self._mask = mask_step(mesh, model_class)
        self._extend_history = history_step(mesh)
        self._log_probabilities = logprobs_step(mesh)
        self._score = score_step(config, mesh, sizes)

    def shapes(self) -> Arrays:
        """The shapes of all arrays, with their shardings."""
        return Arrays(
            param_shapes(self.config, self.mesh, self.dtype),
            state_shapes(self.config, self.mesh, self.sizes, self.dtype, self.cache_dtype),
            history_shape(self.config, self.mesh, self.sizes),
        )

    def packet_shape(self, bucket: Bucket) -> jax.ShapeDtypeStruct:
        """The shape of a packed packet."""
        return jax.ShapeDtypeStruct((packet_size(self.sizes, bucket),), jnp.int32)

    def tick(
        self, call: Call, arrays: Arrays, bucket: Bucket, packed: Any, choice: Choice
    ) -> tuple[Arrays, TickResult]:
        """One tick: the step of a bucket, then the programs that the choice asks for.

        Args:
          call: runs or compiles a program.
          arrays: those on the devices; state and history are donated.
          bucket: the program.
          packed: the packet that enters.
          choice: how the tokens of the packet that leaves are chosen.
        """
        params, state, history = arrays
        vocab_size, ranks = self.config.vocab_size, self.mesh.size
        n = self.sizes.num_segments(bucket)
        if choice.masks is not None and bucket in self.masked_steps:
            masks = masks_by_row(n, choice.masks, vocab_size, ranks)
            state, output, raw = call(self.masked_steps[bucket], params, state, packed, masks)
            kept = state.tokens
        else:
            state, output = call(self._steps[bucket], params, state, packed)
            kept, raw = state.tokens, output.logits
            if choice.masks is not None:
                room = next(size for size in capacities(n) if size >= len(choice.masks))
                args = encode_masks(n, choice.masks, vocab_size, ranks, room)
                kept, output = call(self._mask, kept, output, *args)
        if choice.adjustments is not None:
            kept, output = call(self._adjust, kept, history, output, choice.adjustments)
        tokens = output.tokens
        if choice.controls is not None:
            if self._filter is not None and any_filter(choice.controls):
                output = call(self._filter, output, choice.controls)
            kept, tokens = call(self._sample, kept, output, choice.controls)
        if choice.adjustments is not None:
            history = call(self._count, history, output.slots, tokens)
        logprobs = call(self._log_probabilities, raw, tokens) if choice.logprobs else None
        arrays = Arrays(params, state._replace(tokens=kept), history)
        return arrays, TickResult(tokens, raw, bucket, logprobs)

    def score(self, call: Call, arrays: Arrays, tile: int, targets: list[int]) -> TileScores:
        """The log-probabilities of prompt tokens; `Executor.score` explains the arguments."""
        padded = np.zeros(self.sizes.tile, np.int32)
        padded[: len(targets)] = targets
        first = np.int32(tile * self.sizes.tile)
        inputs = score_inputs(arrays.params, arrays.state)
        scores: TileScores = call(self._score, *inputs, first, padded)
        return scores

    def set_history(
        self, call: Call, history: jax.Array, slot: int, prompt: list[int], answer: list[int]
    ) -> jax.Array:
        """The history with the tokens of a slot; `Executor.set_history` explains the arguments."""
        tokens = np.array([*prompt, *answer], np.int32)
        for first in range(0, len(tokens), HISTORY_CHUNK):
            chunk = np.full(HISTORY_CHUNK, -1, np.int32)
            part = tokens[first : first + HISTORY_CHUNK]
            chunk[: len(part)] = part
            num_prompt = np.int32(len(prompt) - first)
            history = call(
                self._extend_history,
                history, np.int32(slot), chunk, np.bool_(first == 0), num_prompt,
            )  # fmt: skip
        return history

    def plain_choices(self, bucket: Bucket) -> list[Choice]:
        """Choices that need every program which most requests need, in a tick of this bucket."""
        filtered = (0, 0, 0, SamplingParams(top_k=1))
        return [Choice(encode_controls(self.sizes.num_segments(bucket), [filtered]))]

    def other_choices(self, bucket: Bucket) -> Iterator[Choice]:
        """Choices that need all other programs: of penalties, log-probabilities and masks."""
        n = self.sizes.num_segments(bucket)
        yield Choice(encode_controls(n, []), encode_adjustments(n, []), logprobs=True)
        mask = make_mask(self.config.vocab_size, [0])
        for room in (1,) if bucket in self.masked_steps else capacities(n):
            yield Choice(masks=[(0, mask)] * room)

    def lowered(self, bucket: Bucket) -> jax.stages.Lowered:
        """Lowers the program of a bucket for inspection: `.compile().as_text()`.

        Nothing runs, and the compiled programs of the ticks are not touched.
        """
        params, state, _ = self.shapes()
        step: Any = self._steps[bucket]
        lowered: jax.stages.Lowered = step.lower(params, state, self.packet_shape(bucket))
        return lowered
