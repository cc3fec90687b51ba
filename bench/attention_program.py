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
from llama_jax.ring.attention_backend import AUTO, choose_backend
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
    mesh = make_mesh("1x1")
    program = Program(config, sizes, bucket, Llama, choose_backend(AUTO, mesh))
    # Bound as in the ring, since the choice of a kernel may depend on it.
    layer = nnx.eval_shape(lambda: DecoderLayer(config, rngs=nnx.Rngs(0)))
    score_mod = layer.attention.score_mod

    def run(
        cache: KVCache, packed: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[KVCache, jax.Array]:
        segments, _ = decode_packet(sizes, bucket, packed)
        updated, outs = [], []
        for position in range(config.num_layers):
            arrays = (array[position][0] for array in cache if array)
            attend = PagedAttend(program, segments, *arrays)
            new = q[position], k[position], v[position]
            outs.append(attend(*new, score_mod=score_mod, tap=no_tap))
            updated.append([array[None] for array in attend.arrays])
        return KVCache(*zip(*updated, strict=True)), jnp.stack(outs)

    in_specs, out_specs = (SPEC, P(), P(), P(), P()), (SPEC, P())
    return MeshProgram(run, mesh, in_specs, out_specs, name="attention", donate=(0,))
