"""The attention of the ring's layers alone, compiled as the ring compiles it."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.model import DecoderLayer, Llama
from llama_jax.model.attention import no_tap
from llama_jax.ring.backend import AUTO, choose_backend
from llama_jax.ring.kv_cache import SPEC, KVCache
from llama_jax.ring.packet import decode_packet
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.stage import PagedAttend, locate_tokens
from llama_jax.ring.static_args import StaticArgs
from sharding.mesh import make_mesh
from sharding.program import MeshProgram

# (cache, packet, q `[N, H, h]`, k, v `[L, N, K, h]`) -> (cache, `[N, H, h]`)
Attention = Callable[[KVCache, Any, Any, Any, Any], tuple[KVCache, jax.Array]]


def attention_program(
    config: LlamaConfig, sizes: RingSizes, bucket: Bucket, rounds: int = 1
) -> Attention:
    """The attention of all layers of a config on one device, compiled. Donates the cache.

    The result of each call is the queries of the next, so that none can be left out.

    Args:
      config: the model.
      sizes: of the ring.
      bucket: rows and chunk.
      rounds: how often the program attends to each layer.
    """
    mesh = make_mesh("1x1")
    static = StaticArgs(config, sizes, bucket, Llama, choose_backend(AUTO, mesh))
    # Bound as in the ring, since the choice of a kernel may depend on it.
    layer = nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(0)))
    score_mod = layer.attention.score_mod

    def run(
        cache: KVCache, packed: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[KVCache, jax.Array]:
        segments, _ = decode_packet(sizes, bucket, packed)
        locations = locate_tokens(static, segments)

        def attend_once(_: Any, carry: tuple[KVCache, jax.Array]) -> tuple[KVCache, jax.Array]:
            cache, q = carry
            updated = []
            for position in range(config.num_layers):
                attend = PagedAttend(
                    static, segments, locations, *(a[position][0] for a in cache if a)
                )
                q = attend(q, k[position], v[position], score_mod=score_mod, tap=no_tap)
                updated.append([array[None] for array in attend.arrays])
            return KVCache(*zip(*updated, strict=True)), q

        # A loop, since XLA takes minutes to compile hundreds of calls.
        return jax.lax.fori_loop(0, rounds, attend_once, (cache, q))

    in_specs, out_specs = (SPEC, P(), P(), P(), P()), (SPEC, P())
    return MeshProgram(run, mesh, in_specs, out_specs, name="attention", donate=(0,))
