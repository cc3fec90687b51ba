"""The attention of the ring's layers alone, compiled as the ring compiles it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.model import DecoderLayer, Llama
from llama_jax.model.attention import no_tap
from llama_jax.ring.kv_cache import SPEC, KVCache
from llama_jax.ring.packet import decode_packet
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.stage import PagedAttend, Program
from sharding.mesh import make_mesh
from sharding.program import MeshProgram

# (cache, packet, q `[L, N, H, h]`, k, v `[L, N, K, h]`) -> (cache, `[L, N, H, h]`)
Attention = Callable[[KVCache, Any, Any, Any, Any], tuple[KVCache, jax.Array]]


def attention_program(config: LlamaConfig, sizes: RingSizes, bucket: Bucket) -> Attention:
    """The attention of all layers of a config on one device, compiled. Donates the cache."""
    program = Program(config, sizes, bucket, Llama)
    # Bound as in the ring, since the choice of a kernel may depend on it.
    layer = nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(0)))
    score_mod = layer.attention.score_mod

    def run(
        cache: KVCache, packed: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[KVCache, jax.Array]:
        segments, _ = decode_packet(sizes, bucket, packed)
        keys, values, outs = [], [], []
        for position in range(config.num_layers):
            pages = cache.keys[position][0], cache.values[position][0]
            attend = PagedAttend(program, segments, *pages)
            new = q[position], k[position], v[position]
            outs.append(attend(*new, score_mod=score_mod, tap=no_tap))
            keys.append(attend.k_pages[None])
            values.append(attend.v_pages[None])
        return KVCache(tuple(keys), tuple(values)), jnp.stack(outs)

    specs = KVCache((SPEC,) * config.num_layers, (SPEC,) * config.num_layers)
    return MeshProgram(
        run, make_mesh("1x1"), (specs, P(), P(), P(), P()), (specs, P()),
        name="attention", donate=(0,),
    )  # fmt: skip
