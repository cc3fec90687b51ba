"""Steps compiled for a mesh and a tiny config, to be read rather than run; and engines with few."""

import jax
import jax.numpy as jnp
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.engine.programs import Programs
from llama_jax.ring import steps
from llama_jax.ring.packet import packet_size
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.weights.placement import param_shapes
from sharding.mesh import make_mesh
from tests.support.xla_options import PRODUCTION

CONFIG = LlamaConfig(
    vocab_size=250,  # is padded
    embed_dim=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=96,
    rope_theta=10000.0,
    norm_eps=1e-5,
    max_position_embeddings=512,
)
# The pool is so large that one layer's keys outweigh every legitimate temporary.
SIZES = RingSizes(
    num_slots=16,
    num_pages=4096,
    page_size=16,
    pages_per_sequence=32,
    row_buckets=(1, 4),
    chunk_buckets=(0, 64, 128),
    tile=64,
)


def compile_largest(patch: pytest.MonkeyPatch) -> None:
    """Lets engines of this process compile the largest buckets alone, which hold every packet.

    For tests of something else than programs.
    """
    patch.setattr("llama_jax.engine.warm_up.order_of_need", lambda buckets: [])


def compile_few(patch: pytest.MonkeyPatch) -> None:
    """`compile_largest`, of which only what plain requests need is compiled before it is needed.

    For requests that have no penalties, masks and log-probabilities.
    """
    compile_largest(patch)
    patch.setattr(Programs, "other_choices", lambda self, bucket: ())


def compile_step(
    bucket: Bucket,
    mesh: str,
    config: LlamaConfig = CONFIG,
    dtype: jnp.dtype = jnp.float32,
    cache_dtype: jnp.dtype | None = None,
    options: dict[str, bool | int] = PRODUCTION,
) -> jax.stages.Compiled:
    """The tick of a bucket, compiled from shapes alone, by default to the HLO of production."""
    device_mesh = make_mesh(mesh)
    params = param_shapes(config, device_mesh, dtype)
    state = steps.state_shapes(config, device_mesh, SIZES, dtype, cache_dtype)
    packed = jax.ShapeDtypeStruct((packet_size(SIZES, bucket),), jnp.int32)
    if bucket.chunk:
        step = steps.prefill_step(config, device_mesh, SIZES, bucket.rows, bucket.chunk)
    else:
        step = steps.decode_step(config, device_mesh, SIZES, bucket.rows)
    return step.lower(params, state, packed).compile(options)
