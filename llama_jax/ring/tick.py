"""One tick as one device sees it: what runs inside `shard_map`, on this device's shares of arrays.

Here the modules of `llama_jax.model` meet the ring: each layer is built around this rank's share
of its weights, attends to the pages of the cache, and sums its partial results over `model`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.config import LlamaConfig
from llama_jax.model import DecoderLayer, Llama, RMSNorm
from llama_jax.model.attention import ScoreMod, Tap, paged_attention
from llama_jax.model.llama import head_logits, set_weights
from llama_jax.ring import kv_cache
from llama_jax.ring.kv_cache import KVCache
from llama_jax.ring.packet import LENGTH, PAGES, POSITION, SLOT, decode_packet, segments_of
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.weights.placement import Params
from sharding.axes import AXES, MODEL
from sharding.collectives import psum, rank
from sharding.ring import RingState, ring_tick


class Program(NamedTuple):
    """What distinguishes one compiled tick from another.

    Attributes:
      config, sizes, bucket: the architecture and the sizes.
      model_class: whose layers run and whose sampler chooses.
    """

    config: LlamaConfig
    sizes: RingSizes
    bucket: Bucket
    model_class: type[Llama]


class State(NamedTuple):
    """What the device carries from tick to tick, beside the weights. Donated to each step.

    Like the other tuples here it holds arrays, or what stands for them (a spec, a shape).

    Attributes:
      ring: packets in flight.
      tokens: `[num_slots]` int32, the last token of each slot; replicated.
      cache: the paged KV cache.
    """

    ring: RingState
    tokens: Any
    cache: KVCache


class StepOutput(NamedTuple):
    """What a tick says of the packet that left the last stage.

    Attributes:
      logits: `[segments, V']` float32, after the last token of each segment, split over all ranks;
        -inf beyond the vocabulary. Stays on the device unless somebody asks.
      tokens: `[segments]` int32, the greedy choices; `NO_TOKEN` where the logits are not numbers.
      slots: `[segments]` int32, where each token belongs; `num_slots` for nowhere.
    """

    logits: Any
    tokens: Any
    slots: Any


# (activations, metadata, cache) -> activations one stage further, and what becomes of the cache
RunStage = Callable[[jax.Array, jax.Array, KVCache], tuple[jax.Array, Any]]
# (activations, metadata) of the leaving packet -> the rows to return
Select = Callable[[jax.Array, jax.Array], jax.Array]


def tick(
    program: Program, params: Params, state: State, packed: jax.Array
) -> tuple[State, StepOutput]:
    """One tick: every packet moves on by one stage, and the one that leaves gets its tokens."""
    ring, cache, finished, leaving = advance_ring(
        program,
        params,
        state,
        packed,
        partial(run_layers, program, params.layers),
        partial(_last_activations, program),
    )
    scores = local_logits(program.config, params, finished)
    chosen = program.model_class.sampler.greedy(scores)
    slots = segments_of(program.sizes, program.bucket, leaving)[:, SLOT]
    tokens = state.tokens.at[slots].set(chosen, mode="drop")
    return State(ring, tokens, cache), StepOutput(scores, chosen, slots)


def advance_ring(
    program: Program,
    params: Params,
    state: State,
    packed: jax.Array,
    run_stage: RunStage,
    select: Select,
) -> tuple[RingState, Any, jax.Array, jax.Array]:
    """Lets a packet into the ring and moves all of them on; see `sharding.ring.ring_tick`."""
    sizes, bucket = program.sizes, program.bucket
    entering, chunk_tokens = decode_packet(sizes, bucket, packed)

    def enter(segments: jax.Array) -> jax.Array:
        slots = segments[: bucket.rows, SLOT]
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


def _last_activations(program: Program, x: jax.Array, metadata: jax.Array) -> jax.Array:
    """The activations of the last token of each segment."""
    num_rows, tile = program.bucket.rows, program.sizes.tile
    num_tiles = program.bucket.chunk // tile
    lengths = segments_of(program.sizes, program.bucket, metadata)[num_rows:, LENGTH]
    ends = num_rows + jnp.arange(num_tiles) * tile + jnp.maximum(lengths - 1, 0)
    return jnp.concatenate([x[:num_rows], x[ends]])


class PagedAttend:
    """`model.Attend` over one layer's pages of the cache, which it writes to first.

    Attributes:
      k_pages, v_pages: `[K, num_pages, page_size, h]`, this rank's; replaced when it is called.
    """

    def __init__(
        self, program: Program, segments: jax.Array, k_pages: jax.Array, v_pages: jax.Array
    ):
        self._program, self._segments = program, segments
        self._locations = locate_tokens(program, segments)
        self.k_pages, self.v_pages = k_pages, v_pages

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, score_mod: ScoreMod, tap: Tap
    ) -> jax.Array:
        """q `[N, H, h]`, k and v `[N, K, h]` -> `[N, H, h]`. Taps nothing: the weights of paged
        attention never exist all at once."""
        locations = self._locations
        self.k_pages = kv_cache.write(self.k_pages, k, locations.page, locations.offset)
        self.v_pages = kv_cache.write(self.v_pages, v, locations.page, locations.offset)
        return self._by_segment(
            q,
            lambda q, tables, positions, lengths: paged_attention(
                q, self.k_pages, self.v_pages, tables, positions, lengths,
                score_mod, rank(MODEL) * q.shape[2],
            ),
        )  # fmt: skip

    def _by_segment(self, q: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
        """Runs it over the rows (one query each) and over the tiles (`tile` queries each).

        `attend` takes queries `[B, T, H, h]`, page tables, positions and lengths; what it returns,
        `[B, T, ...]`, comes back as `[N, ...]`.
        """
        out = []
        num_rows, tile = self._program.bucket.rows, self._program.sizes.tile
        for part, width in ((slice(num_rows), 1), (slice(num_rows, None), tile)):
            lengths = self._segments[part, LENGTH]
            if lengths.size == 0:
                continue
            attended = attend(
                q[part].reshape(-1, width, *q.shape[1:]),
                self._segments[part, PAGES:],
                self._locations.position[part].reshape(-1, width),
                jnp.where(lengths > 0, self._segments[part, POSITION] + lengths, 0),
            )
            out.append(attended.reshape(-1, *attended.shape[2:]))
        return jnp.concatenate(out)


# How a layer is called: (its position in the stage, layer, activations, positions of the tokens).
CallLayer = Callable[[int, DecoderLayer, jax.Array, jax.Array, PagedAttend], jax.Array]


def call_layer(
    position: int, layer: DecoderLayer, x: jax.Array, positions: jax.Array, attend: PagedAttend
) -> jax.Array:
    """Calls a layer on a packet; its partial results are summed over `model`."""
    with jax.named_scope(f"layer_{position}"):
        return layer(x, positions, attend, partial(psum, axes=MODEL))


def run_layers(
    program: Program,
    layers: tuple[dict[str, Any], ...],
    x: jax.Array,
    metadata: jax.Array,
    cache: KVCache,
    attend_class: type[PagedAttend] = PagedAttend,
    call: CallLayer = call_layer,
) -> tuple[jax.Array, KVCache]:
    """Runs this stage's layers on the packet that is with it.

    Args:
      layers: the stage's weights, from `Params.layers`.
      x: `[N, D]`, decode rows first.
      metadata: the packet's segments.
      cache: this device's share.
      attend_class, call: how layers attend and are called.
    """
    segments = segments_of(program.sizes, program.bucket, metadata)
    positions = locate_tokens(program, segments).position
    keys, values = [], []
    for position, weights in enumerate(layers):
        attend = attend_class(program, segments, cache.keys[position][0], cache.values[position][0])
        layer = make_layer(program, jax.tree.map(lambda array: array[0], weights))
        x = call(position, layer, x, positions, attend)
        keys.append(attend.k_pages[None])
        values.append(attend.v_pages[None])
    return x, KVCache(tuple(keys), tuple(values))


def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Looks tokens up in a table that is split over all ranks: one all-reduce.

    Args:
      table: `[V' / ranks, D]`, this rank's share.
      tokens: `[N]` int32; zeros for an id that no rank has.

    Returns:
      `[N, D]`.
    """
    with jax.named_scope("embed"):
        local = tokens - rank(AXES) * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        return psum(jnp.where(mine[:, None], table.at[local].get(mode="clip"), 0), AXES)


def local_logits(config: LlamaConfig, params: Params, x: jax.Array) -> jax.Array:
    """Finished activations [n, D] -> this rank's logits [n, V' / ranks]; -inf for padding."""
    head = params.embedding if params.lm_head is None else params.lm_head
    scores = head_logits(final_norm(config, params, x), head)
    token = rank(AXES) * head.shape[0] + jnp.arange(head.shape[0])
    return jnp.where(token < config.vocab_size, scores, -jnp.inf)


def final_norm(config: LlamaConfig, params: Params, x: jax.Array) -> jax.Array:
    """Finished activations [..., D] -> what the head reads."""
    norm = nnx.eval_shape(lambda: RMSNorm(config.embed_dim, config.norm_eps))
    norm.scale.set_value(params.final_norm)
    return norm(x)


class TokenLocations(NamedTuple):
    """Each token of the packet, rows first: position in its sequence, page and offset there."""

    position: jax.Array
    page: jax.Array
    offset: jax.Array


def locate_tokens(program: Program, segments: jax.Array) -> TokenLocations:
    """The tokens of a packet, from its segments."""
    sizes, num_rows = program.sizes, program.bucket.rows

    def expand(segments: jax.Array, tile: int) -> tuple[jax.Array, ...]:
        step = jnp.arange(tile)
        position = segments[:, POSITION, None] + step  # [segments, tile]
        index = position // sizes.page_size
        pages = segments[:, PAGES:]
        page = jnp.take_along_axis(pages, index, axis=1, mode="clip")
        # Nowhere is past the pool: never 0 and never -1, which are pages of somebody.
        real = (step < segments[:, LENGTH, None]) & (index < pages.shape[1])
        page = jnp.where(real, page, sizes.num_pages)
        return position.ravel(), page.ravel(), (position % sizes.page_size).ravel()

    rows, tiles = expand(segments[:num_rows], 1), expand(segments[num_rows:], sizes.tile)
    return TokenLocations(*(jnp.concatenate(pair) for pair in zip(rows, tiles, strict=True)))


def make_layer(program: Program, weights: dict[str, Any]) -> DecoderLayer:
    """A decoder layer around this rank's share of the weights."""
    layer_class = program.model_class.layer_class
    layer = nnx.eval_shape(lambda: layer_class(program.config, rngs=nnx.Rngs(0)))
    set_weights(layer, weights)
    return layer
