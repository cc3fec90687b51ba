"""One tick on one device: the code inside `shard_map`, where each array is this device's share.

The entering tokens are embedded, every stage runs its layers (`ring.stage`), and the packet that
leaves the last stage gets its logits and next tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.config import LlamaConfig
from llama_jax.model import RMSNorm
from llama_jax.model.llama import head_logits
from llama_jax.model.sampling import chosen_by
from llama_jax.model.token_masks import apply_masks
from llama_jax.ring.kv_cache import KVCache
from llama_jax.ring.packet import LENGTH, SLOT, decode_packet, segments_of
from llama_jax.ring.stage import run_layers
from llama_jax.ring.static_args import StaticArgs
from llama_jax.weights.placement import Params
from sharding.axes import AXES
from sharding.collectives import psum, rank
from sharding.ring import RingState, ring_tick


class State(NamedTuple):
    """The device's state between ticks, except the weights. Donated to each step.

    Like the other tuples here, it holds arrays or, in their place, specs or shapes.

    Attributes:
      ring: the packets in flight.
      tokens: `[num_slots]` int32, the last token of each slot; replicated.
      cache: the paged KV cache.
    """

    ring: RingState
    tokens: Any
    cache: KVCache


class StepOutput(NamedTuple):
    """The results of a tick, for the packet that left the last stage.

    Attributes:
      logits: `[segments, V']` float32, at the last token of each segment, split over all ranks;
        -inf beyond the vocabulary. The host does not read them.
      tokens: `[segments]` int32, the greedy choices; `NO_TOKEN` where a logit is NaN;
        `NO_AGREEMENT` where the user's own sampler chose different ones on the ranks.
      slots: `[segments]` int32, the slot of each token; `num_slots` for none.
    """

    logits: Any
    tokens: Any
    slots: Any


# (activations, metadata, cache) -> (activations, cache and possibly more)
RunStage = Callable[[jax.Array, jax.Array, KVCache], tuple[jax.Array, Any]]
# (activations, metadata) of the leaving packet -> the rows to return
Select = Callable[[jax.Array, jax.Array], jax.Array]


def tick(
    static: StaticArgs, params: Params, state: State, packed: jax.Array
) -> tuple[State, StepOutput]:
    """Runs every stage once, and chooses the next tokens of the packet that leaves.

    Args:
      static: what the program is compiled for.
      params: this device's share of the weights.
      state: likewise.
      packed: the entering packet, from `encode_packet`.

    Returns:
      The state after the tick, and the results.
    """
    return masked_tick(static, params, state, packed, None)[:2]


def masked_tick(
    static: StaticArgs, params: Params, state: State, packed: jax.Array, masks: jax.Array | None
) -> tuple[State, StepOutput, jax.Array]:
    """A tick whose leaving packet has rows that may not choose every token.

    Args:
      static, params, state, packed: as for `tick`.
      masks: `[segments, W]` int32, this device's share, from `masks_by_row`; None for no masks.

    Returns:
      The state after the tick, the results with the masked logits, and the logits as they were.
    """
    ring, cache, finished, leaving = advance_ring(
        static,
        params,
        state,
        packed,
        partial(run_layers, static, params.layers),
        partial(_last_activations, static),
    )
    raw = local_logits(static.config, params, finished)
    logits = raw if masks is None else apply_masks(raw, masks)
    chosen = chosen_by(static.model_class.sampler, "greedy", logits)
    slots = segments_of(static.sizes, static.bucket, leaving)[:, SLOT]
    # Drops the tokens of empty rows and of chunks before the last of a prompt.
    tokens = state.tokens.at[slots].set(chosen, mode="drop")
    return State(ring, tokens, cache), StepOutput(logits, chosen, slots), raw


def advance_ring(
    static: StaticArgs,
    params: Params,
    state: State,
    packed: jax.Array,
    run_stage: RunStage,
    select: Select,
) -> tuple[RingState, Any, jax.Array, jax.Array]:
    """`sharding.ring.ring_tick` for packets of tokens, without the choice of the next ones.

    Args:
      static, params, state, packed: as for `tick`.
      run_stage, select: as for `ring_tick`.

    Returns:
      The ring, the result of `run_stage` besides the activations, the selected activations of the
      packet that left, and its segments `[max_segments, width]`.
    """
    sizes, bucket = static.sizes, static.bucket
    entering, chunk_tokens = decode_packet(sizes, bucket, packed)

    def enter(segments: jax.Array) -> jax.Array:
        slots = segments[: bucket.rows, SLOT]
        # The slot of an empty row is past the end: clipped, it reads some token, which is unused.
        row_tokens = state.tokens.at[slots].get(mode="clip")
        return embed(params.embedding, jnp.concatenate([row_tokens, chunk_tokens]))

    return ring_tick(
        state.ring,
        entering,
        (bucket.rows, bucket.chunk),
        state.cache,
        enter=enter,
        run_stage=run_stage,
        select=select,
    )


def _last_activations(static: StaticArgs, x: jax.Array, metadata: jax.Array) -> jax.Array:
    """Selects the activations of the last token of each segment: `[segments, D]`."""
    num_rows, tile = static.bucket.rows, static.sizes.tile
    num_tiles = static.bucket.chunk // tile
    lengths = segments_of(static.sizes, static.bucket, metadata)[num_rows:, LENGTH]
    # An empty tile has length 0; it reads its first position, and its token is dropped.
    ends = num_rows + jnp.arange(num_tiles) * tile + jnp.maximum(lengths - 1, 0)
    return jnp.concatenate([x[:num_rows], x[ends]])


def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Looks up tokens in a table that is split over all ranks: one all-reduce.

    Args:
      table: `[V' / ranks, D]`, this rank's share.
      tokens: `[N]` int32.

    Returns:
      `[N, D]`; zeros for an id outside the table, such as `NO_TOKEN`.
    """
    with jax.named_scope("embed"):
        local = tokens - rank(AXES) * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        return psum(jnp.where(mine[:, None], table.at[local].get(mode="clip"), 0), AXES)


def local_logits(config: LlamaConfig, params: Params, x: jax.Array) -> jax.Array:
    """Activations of the last layer [n, D] -> this rank's logits [n, V' / ranks] float32.

    Logits of padding are -inf.
    """
    head = params.embedding if params.lm_head is None else params.lm_head
    normed, count = final_norm(config, params, x), len(x)
    if count == 1 and x.dtype != jnp.float32:
        # Twice: for one row, cuBLAS has no product of bfloat16 with a float32 result. XLA converted
        # the head to float32 in every tick: 0.53 GB for Llama-3-70B on 8 GPUs.
        normed = jnp.concatenate([normed, normed])
    logits = head_logits(normed, head)[:count]
    if head.shape[0] * jax.lax.axis_size(AXES) == config.vocab_size:
        return logits
    token = rank(AXES) * head.shape[0] + jnp.arange(head.shape[0])
    return jnp.where(token < config.vocab_size, logits, -jnp.inf)


def final_norm(config: LlamaConfig, params: Params, x: jax.Array) -> jax.Array:
    """Applies the final norm to the activations of the last layer, [..., D]."""
    # eval_shape builds the module without allocating the parameters that are then replaced.
    norm = nnx.eval_shape(lambda: RMSNorm(config.embed_dim, config.norm_eps))
    norm.scale.set_value(params.final_norm)
    return norm(x)
