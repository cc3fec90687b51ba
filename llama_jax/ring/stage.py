"""One stage of the ring: its layers, run on the packet that it holds.

Each layer is built around this rank's share of the weights, attends to the pages of the KV cache,
and sums its partial results over `model`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.model import DecoderLayer
from llama_jax.model.attention import ScoreMod, Tap, paged_attention
from llama_jax.model.llama import set_weights
from llama_jax.quantization import Fp8, Fp8Activations
from llama_jax.ring import kv_cache
from llama_jax.ring.kv_cache import KVCache
from llama_jax.ring.packet import LENGTH, PAGES, POSITION, segments_of
from llama_jax.ring.static_args import StaticArgs
from sharding.axes import MODEL, STAGE
from sharding.collectives import psum, rank
from sharding.errors import UserError
from sharding.stages import split_layers


class TokenLocations(NamedTuple):
    """The location of each token of a packet, rows first, then padding; all `[N']` int32.

    Attributes:
      position: in its sequence.
      page: in the pool; `num_pages` for a token that is padding.
      offset: in the page.
    """

    position: jax.Array
    page: jax.Array
    offset: jax.Array


def locate_tokens(static: StaticArgs, segments: jax.Array) -> TokenLocations:
    """Locates the tokens of a packet, given its segments `[num_segments, width]`."""
    sizes, num_rows = static.sizes, static.bucket.rows

    def expand(segments: jax.Array, tile: int) -> tuple[jax.Array, ...]:
        step = jnp.arange(tile)
        position = segments[:, POSITION, None] + step  # [segments, tile]
        index = position // sizes.page_size
        pages = segments[:, PAGES:]
        page = jnp.take_along_axis(pages, index, axis=1, mode="clip")
        # No page is an index past the pool, which scatters drop: 0 and -1 are valid pages.
        real = (step < segments[:, LENGTH, None]) & (index < pages.shape[1])
        page = jnp.where(real, page, sizes.num_pages)
        return position.ravel(), page.ravel(), (position % sizes.page_size).ravel()

    parts = [expand(segments[:num_rows], 1), expand(segments[num_rows:], sizes.tile)]
    if static.num_padding:
        zeros = jnp.zeros(static.num_padding, jnp.int32)
        parts.append((zeros, zeros + sizes.num_pages, zeros))
    return TokenLocations(*(jnp.concatenate(part) for part in zip(*parts, strict=True)))


class PagedAttend:
    """An `Attend` that writes keys and values to one layer's pages, then attends to the pages.

    Attributes:
      k_pages, v_pages: `[K, num_pages, page_size, h]`, this rank's; each call replaces them.
      k_scale, v_scale: `[K, num_pages, page_size]`, likewise; None unless the pages are in 8 bits.
      calls: how often the layer has attended.
    """

    def __init__(
        self,
        static: StaticArgs,
        segments: jax.Array,
        locations: TokenLocations,
        k_pages: jax.Array,
        v_pages: jax.Array,
        k_scale: jax.Array | None = None,
        v_scale: jax.Array | None = None,
    ):
        self._static, self._segments, self._locations = static, segments, locations
        self.k_pages, self.v_pages = k_pages, v_pages
        self.k_scale, self.v_scale = k_scale, v_scale
        self.calls = 0

    @property
    def arrays(self) -> list[jax.Array]:
        """The layer's part of the cache, in the order of `KVCache`."""
        arrays = (self.k_pages, self.v_pages, self.k_scale, self.v_scale)
        return [array for array in arrays if array is not None]

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, score_mod: ScoreMod, tap: Tap
    ) -> jax.Array:
        """q `[N', H, h]`, k and v `[N', K, h]` -> `[N', H, h]`, where N' counts the padding.

        Does not tap the attention weights, since `paged_attention` never materializes them.
        """
        self.calls += 1
        where = (self._locations.page, self._locations.offset)
        self.k_pages, self.k_scale = kv_cache.write_scaled(self.k_pages, self.k_scale, k, *where)
        self.v_pages, self.v_scale = kv_cache.write_scaled(self.v_pages, self.v_scale, v, *where)
        attend = self._static.backend.attend(paged_attention, self._static.bucket)
        return self._by_segment(
            q,
            lambda q, tables, positions, lengths: attend(
                q, self.k_pages, self.v_pages, tables, positions, lengths,
                score_mod, rank(MODEL) * q.shape[2], self.k_scale, self.v_scale,
            ),
        )  # fmt: skip

    def _by_segment(self, q: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
        """Calls `attend` for the rows (one query each) and for the tiles (`tile` queries each).

        Args:
          q: `[N', H, h]`, padding included.
          attend: (queries `[B, T, H, h]`, page tables, positions, lengths) -> `[B, T, ...]`.

        Returns:
          `[N', ...]`, zeros for the padding.
        """
        out = []
        static = self._static
        num_rows, tile = static.bucket.rows, static.sizes.tile
        for first, end, width in ((0, num_rows, 1), (num_rows, static.num_tokens, tile)):
            if first == end:  # no rows, or no chunk, in this bucket
                continue
            segments = self._segments[:num_rows] if width == 1 else self._segments[num_rows:]
            attended = attend(
                q[first:end].reshape(-1, width, *q.shape[1:]),
                segments[:, PAGES:],
                self._locations.position[first:end].reshape(-1, width),
                segments[:, POSITION] + segments[:, LENGTH],
            )
            out.append(attended.reshape(-1, *attended.shape[2:]))
        if static.num_padding:
            out.append(jnp.zeros((static.num_padding, *out[0].shape[1:]), out[0].dtype))
        return jnp.concatenate(out)


class MeshReduce:
    """The `reduce` of a layer on a mesh: sums over `model`.

    Attributes:
      called: whether the layer has called it.
    """

    def __init__(self) -> None:
        self.called = False

    def __call__(self, partial: jax.Array) -> jax.Array:
        """Sums a partial result `[..., D]` over the ranks."""
        self.called = True
        return psum(partial, MODEL)


# (position in the stage, layer, x, positions of the tokens, attend, reduce) -> activations
CallLayer = Callable[[int, DecoderLayer, jax.Array, jax.Array, PagedAttend, MeshReduce], jax.Array]


def call_layer(
    position: int,
    layer: DecoderLayer,
    x: jax.Array,
    positions: jax.Array,
    attend: PagedAttend,
    reduce: MeshReduce,
) -> jax.Array:
    """Calls a layer on x `[N', D]`, where N' counts the padding."""
    with jax.named_scope(f"layer_{position}"):
        return layer(x, positions, attend, reduce)


def run_layers(
    static: StaticArgs,
    layers: tuple[dict[str, Any], ...],
    x: jax.Array,
    metadata: jax.Array,
    cache: KVCache,
    attend_class: type[PagedAttend] = PagedAttend,
    call: CallLayer = call_layer,
) -> tuple[jax.Array, KVCache]:
    """Runs the layers of this stage on its packet.

    Args:
      static: what the program is compiled for.
      layers: the weights of the stage, from `Params.layers`.
      x: `[N, D]`, decode rows first.
      metadata: the segments of the packet, `[max_segments, width]`.
      cache: this device's share.
      attend_class: makes the `attend` of each layer.
      call: calls each layer.

    Returns:
      Activations `[N, D]`, and the cache.

    Raises:
      UserError: a layer attended several times, or attended on one of several ranks, but never
        called `reduce`.
    """
    segments = segments_of(static.sizes, static.bucket, metadata)
    x = jnp.pad(x, ((0, static.num_padding), (0, 0)))
    locations = locate_tokens(static, segments)
    stages = split_layers(static.config.num_layers, jax.lax.axis_size(STAGE))
    updated = []
    for position, weights in enumerate(layers):
        attend = attend_class(static, segments, locations, *(a[position][0] for a in cache if a))
        layer = make_layer(static, jax.tree.map(lambda array: array[0], weights))
        reduce = MeshReduce()
        before, x = x, call(position, layer, x, locations.position, attend, reduce)
        held = [here[position] is not None for here in stages]
        if not all(held):  # a layer of the user's need not be the identity where its weights are 0
            x = jnp.where(jnp.array(held)[rank(STAGE)], x, before)
        if attend.calls > 1:  # later tokens would find only the keys of the last time
            raise UserError(
                f"{type(layer).__name__} attends {attend.calls} times, but on a mesh a layer has "
                "pages for one set of keys and values: use Llama on one device."
            )
        if attend.calls and not reduce.called and jax.lax.axis_size(MODEL) > 1:
            raise UserError(
                f"{type(layer).__name__} attends, but never calls the reduce that it is given, so "
                "each rank would go on with its own part of the sum: apply it to what attention "
                "and MLP return."
            )
        updated.append([array[None] for array in attend.arrays])
    return x[: static.num_tokens], KVCache(*zip(*updated, strict=True))


def make_layer(static: StaticArgs, weights: dict[str, Any]) -> DecoderLayer:
    """Builds a decoder layer around this rank's share of the weights."""
    layer_class = static.model_class.layer_class
    # With few tokens, a product takes as long as reading the matrix, in whatever dtype it is.
    if static.bucket.chunk and static.model_class.fp8_activations:
        weights = jax.tree.map(
            lambda node: Fp8Activations(*node) if isinstance(node, Fp8) else node,
            weights,
            is_leaf=lambda node: isinstance(node, Fp8),
        )
    if static.backend.int4_kernel:
        # Imported here, since importing Pallas takes 2 s.
        from llama_jax.model.hopper_int4 import with_kernel

        weights = with_kernel(weights)
    # eval_shape builds the module without allocating the parameters that are then replaced.
    layer = nnx.eval_shape(lambda: layer_class(static.config, rngs=nnx.Rngs(0)))
    set_weights(layer, weights)
    return layer
