"""The project's own tick on one device, with random weights: what `bench step` and `model` time.

One rank of a larger mesh is a smaller model on a 1 x 1 mesh: with the rank's share of the heads, of
the MLP and of the vocabulary. Its program is the rank's, without the collectives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.engine.sizing import GPU_PAGE
from llama_jax.plan.machine.random_weights import nbytes, random_array, random_params
from llama_jax.ring.kv_cache import KVCache
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.sizes import TILE, Bucket, RingSizes
from llama_jax.ring.steps import decode_step, init_state, prefill_step, state_shapes
from llama_jax.weights.placement import Params, param_shapes
from sharding.mesh import make_mesh

PAGE_SIZE = GPU_PAGE
DTYPE = jnp.dtype(jnp.bfloat16)


@dataclass(frozen=True)
class Work:
    """The packet of one tick: decode rows, or one chunk of a prompt.

    Attributes:
      rows: the decode rows.
      context: the keys that each row attends to, its own included.
      chunk: the tokens of the chunk, a multiple of the tile.
      prefix: the tokens before the chunk.
    """

    rows: int = 0
    context: int = 0
    chunk: int = 0
    prefix: int = 0

    @property
    def keys(self) -> int:
        """Keys that the tick must read, and values likewise."""
        return self.rows * self.context + self.prefix + self.chunk

    def flops(self, config: LlamaConfig) -> float:
        """Floating-point operations of the layers."""
        heads, kv_heads = config.num_heads, config.num_kv_heads
        matrices = config.embed_dim * (
            2 * (heads + kv_heads) * config.head_dim + 3 * config.mlp_dim
        )
        tokens = self.rows + self.chunk
        return config.num_layers * 2 * matrices * tokens + self.attention_flops(config)

    def attention_flops(self, config: LlamaConfig) -> float:
        """Floating-point operations of attention in all layers; masked scores do not count."""
        pairs = self.rows * self.context + self.chunk * (self.prefix + (self.chunk + 1) / 2)
        return config.num_layers * 4 * config.num_heads * config.head_dim * pairs


class OneDevice:
    """A model with random weights on a 1 x 1 mesh of the default device.

    Attributes:
      config: the model, or a rank's share of one.
      dtype: of weights, activations and KV cache.
      params: its weights.
      layer_bytes, head_bytes: of the layers and norms, and of the LM head; the embedding table is
        not counted, since a tick reads few of its rows.
    """

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype = DTYPE) -> None:
        self.config, self.mesh, self.dtype = config, make_mesh("1x1"), dtype
        self.params: Params = random_params(param_shapes(config, self.mesh, dtype))
        self.layer_bytes = nbytes((self.params.layers, self.params.final_norm))
        head = self.params.embedding if self.params.lm_head is None else self.params.lm_head
        self.head_bytes = nbytes(head)

    def kv_bytes(self, work: Work) -> int:
        """Bytes of the keys and values that a tick must read."""
        sizes = ring_sizes(work)
        cache = state_shapes(self.config, self.mesh, sizes, self.dtype).cache
        return nbytes(cache) * work.keys // (sizes.num_pages * PAGE_SIZE)

    def tick(self, work: Work) -> Callable[[], jax.Array]:
        """Makes a function that dispatches the same tick again and again, and returns its tokens.

        Every call sends the packet and advances the state, as a tick of the engine does. Each row
        writes the key of its last position again, so that the context stays as it is.
        """
        sizes, bucket = ring_sizes(work), Bucket(work.rows, work.chunk)
        if work.chunk:
            step = prefill_step(self.config, self.mesh, sizes, *bucket)
        else:
            step = decode_step(self.config, self.mesh, sizes, bucket.rows)
        packed = packet(work, sizes)
        shapes = state_shapes(self.config, self.mesh, sizes, self.dtype)
        state = init_state(shapes, sizes)._replace(cache=None)  # frees the zeros first
        state = state._replace(cache=random_cache(shapes.cache))

        def call() -> jax.Array:
            nonlocal state
            state, output = step(self.params, state, packed)
            return output.tokens

        return call


def random_cache(shapes: KVCache) -> KVCache:
    """A KV cache of random numbers, given its shapes."""
    seeds = count()
    return jax.tree.map(lambda shape: random_array(shape, next(seeds)), shapes)


def ring_sizes(work: Work) -> RingSizes:
    """The sizes of a ring with one program, that of this work, and no page too many."""
    sequences, longest = max(1, work.rows), max(work.context, work.prefix + work.chunk)
    pages = -(-longest // PAGE_SIZE)
    return RingSizes(
        num_slots=sequences,
        num_pages=sequences * pages,
        page_size=PAGE_SIZE,
        pages_per_sequence=pages,
        row_buckets=(work.rows,),
        chunk_buckets=(work.chunk,),
        tile=TILE,
    )


def packet(work: Work, sizes: RingSizes) -> np.ndarray:
    """The packet of this work. The pages of a sequence are scattered over the pool."""
    pages = np.random.default_rng(0).permutation(sizes.num_pages).astype(np.int32)
    tables = pages.reshape(sizes.num_slots, sizes.pages_per_sequence)
    tokens = [token % 1000 for token in range(work.chunk)]
    tiles = [
        (0, work.prefix + first, first + TILE == work.chunk, tokens[first : first + TILE])
        for first in range(0, work.chunk, TILE)
    ]
    bucket, positions = Bucket(work.rows, work.chunk), [work.context - 1] * work.rows
    return encode_packet(sizes, bucket, tables, range(work.rows), positions, tiles)
