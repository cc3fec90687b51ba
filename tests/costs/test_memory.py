"""The bytes by arithmetic are those of the arrays that the project allocates."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.checkpoint.load import choose_dtype
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import CPU, find_gpu
from llama_jax.costs.memory import (
    KINDS,
    checkpoint_bytes,
    kv_bytes_per_token,
    page_bytes,
    parameters,
    state_bytes,
    weight_bytes,
)
from llama_jax.model.kv_storage import choose_kv_dtype
from llama_jax.quantization import FORMATS
from llama_jax.ring import kv_cache
from llama_jax.ring.sizes import RingSizes
from llama_jax.ring.steps import state_shapes
from llama_jax.weights.device_layout import device_shapes
from llama_jax.weights.placement import placements, stored_shapes
from llama_jax.weights.split import ShardingError
from sharding.memory import shard_bytes
from sharding.mesh import make_mesh

H100 = find_gpu("h100-sxm")
MESHES = [(p, r) for p in range(1, 9) for r in range(1, 9) if p * r <= 8]
TINY = replace(
    LlamaConfig.llama3_70b(),
    vocab_size=1000,
    embed_dim=64,
    num_layers=3,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=128,
    eos_token_ids=(),
)


@st.composite
def deployments(draw):
    """A small model, stored in any way, on a mesh of up to 8 devices that can share it."""
    num_kv_heads = draw(st.sampled_from([1, 2, 4]))
    config = replace(
        TINY,
        vocab_size=draw(st.integers(8, 1000)),
        num_layers=draw(st.integers(1, 7)),
        num_heads=num_kv_heads * draw(st.sampled_from([2, 8])),
        num_kv_heads=num_kv_heads,
        mlp_dim=draw(st.sampled_from([64, 128, 512])),
        tie_embeddings=draw(st.booleans()),
        dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
    )
    if name := draw(st.sampled_from([None, *FORMATS])):
        modules = [f"model.layers.{n}.mlp.up_proj" for n in range(config.num_layers)]
        plain = draw(st.lists(st.sampled_from(modules), unique=True))
        group = draw(st.sampled_from([8, 16, -1]))
        config = replace(
            config, quantization=Quantization(format=name, group_size=group, plain=tuple(plain))
        )
    stages, ranks = draw(st.sampled_from([m for m in MESHES if m[0] <= config.num_layers]))
    kv = draw(st.sampled_from(["auto", "bf16", "fp8", "int8"]))
    return Deployment(config, draw(st.sampled_from([H100, CPU])), Layout(stages, ranks), kv)


def allocated_bytes(deployment: Deployment) -> int:
    """The bytes of weights that the project would put on each device."""
    mesh, dtype = make_mesh(deployment.layout.mesh), jnp.dtype(deployment.dtype)
    shapes = stored_shapes(deployment.config, mesh, dtype)
    platform = deployment.gpu.platform
    return sum(
        map(
            shard_bytes,
            jax.tree.leaves(device_shapes(shapes, platform, dtype, deployment.config.quantization)),
        )
    )


@settings(max_examples=40)
@given(deployments(), st.sampled_from([1, 16]))
def test_weights_and_pages_take_what_the_project_allocates(deployment, page_size):
    try:
        expected = allocated_bytes(deployment)
    except ShardingError:
        with pytest.raises(ShardingError):
            weight_bytes(deployment)
        return
    for stage in range(deployment.layout.num_stages):
        found = weight_bytes(deployment, stage)
        assert tuple(found) == KINDS and sum(found.values()) == expected
    mesh = make_mesh(deployment.layout.mesh)
    dtype = choose_kv_dtype(deployment.kv_cache_dtype, jnp.dtype(deployment.dtype))
    page = kv_cache.page_bytes(deployment.config, mesh, page_size, dtype)
    assert page_bytes(deployment, page_size) == page


@given(deployments())
def test_the_shards_of_a_layout_tile_the_model(deployment):
    """Each element of each tensor is on as many ranks as there are copies of it: none is missed."""
    config, (stages, ranks, _) = deployment.config, deployment.layout
    try:
        placed = placements(config, stages, ranks)
    except ShardingError:
        return
    for place in jax.tree.leaves(placed.layers):
        for source in place.sources:
            held = np.zeros(source.tensor.shape, int)
            split = [axis in ("heads", "kv_heads", "mlp") for axis in source.tensor.axes]
            for rank in range(ranks):
                held[
                    tuple(
                        source.stored(axis, rank if cut else 0, ranks if cut else 1)[0]
                        for axis, cut in enumerate(split)
                    )
                ] += 1
            copies = source.kv_replicas if "kv_heads" in source.tensor.axes else 1
            assert (held == (copies if any(split) else ranks)).all()
    stacked = [next(iter(jax.tree.leaves(position))) for position in placed.layers]
    held = [layer for place in stacked for layer in place.layers if layer is not None]
    assert sorted(held) == list(range(config.num_layers))


@given(deployments())
def test_all_devices_together_hold_the_checkpoint(deployment):
    """Where nothing is padded, copied or converted, they add up to the checkpoint."""
    config, (stages, ranks, _) = deployment.config, deployment.layout
    even = config.num_layers % stages == 0 and config.vocab_size % (stages * ranks) == 0
    if not even or config.num_kv_heads % ranks or config.quantization:
        return
    deployment = replace(deployment, gpu=H100)
    kinds = [weight_bytes(deployment, stage) for stage in range(stages)]
    split = sum(sum(kind.values()) - kind["norms"] for kind in kinds) * ranks
    final = config.embed_dim * jnp.dtype(config.dtype).itemsize
    norms = sum(kind["norms"] - final for kind in kinds) + final  # the same on all ranks
    assert split + norms == checkpoint_bytes(config)


def test_llama_3_70b():
    """Its well-known figures: 70.554 B parameters, and 327,680 bytes of KV a token."""
    config = LlamaConfig.llama3_70b()
    assert parameters(config) == 70_553_706_496
    assert checkpoint_bytes(config) == 2 * parameters(config)
    whole, ring = (Deployment(config, H100, layout) for layout in (Layout(1, 1), Layout(4, 2)))
    assert kv_bytes_per_token(whole) == 327_680 and kv_bytes_per_token(ring) == 40_960
    assert sum(weight_bytes(whole).values()) == checkpoint_bytes(config)
    layer = 80 * (10240 * 8192 + 8192 * 8192 + 3 * 8192 * 28672)
    scales = 80 * (10240 + 8192 + 2 * 28672 + 8192) * 4
    narrow = replace(config, quantization=Quantization(format="int8"))
    assert checkpoint_bytes(narrow) == checkpoint_bytes(config) - layer + scales
    assert parameters(LlamaConfig.llama3_2_1b()) == 1_235_814_400  # its head is its embedding


@given(deployments())
def test_the_cache_is_divided_by_stages_and_ranks(deployment):
    config, (stages, ranks, _) = deployment.config, deployment.layout
    if config.num_kv_heads % ranks and ranks % config.num_kv_heads:
        return
    alone = kv_bytes_per_token(replace(deployment, layout=Layout(1, 1)))
    layers = -(-config.num_layers // stages) / config.num_layers
    heads = max(1, config.num_kv_heads // ranks) / config.num_kv_heads
    assert kv_bytes_per_token(deployment) == pytest.approx(alone * layers * heads)


def test_padding_counts_on_the_stages_that_have_it():
    deployment = Deployment(replace(TINY, num_layers=5), H100, Layout(4, 2))
    stages = [weight_bytes(deployment, stage) for stage in range(4)]
    assert [stage["padding"] > 0 for stage in stages] == [False, True, True, True]
    assert len({sum(stage.values()) for stage in stages}) == 1


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_the_ring_itself_takes_what_the_project_allocates(mesh):
    deployment = Deployment(TINY, H100, Layout(*mesh))
    sizes = RingSizes(6, 10, 16, 4, (1, 3), (0, 64, 128), 64)
    state = state_shapes(TINY, make_mesh(deployment.layout.mesh), sizes, jnp.dtype(jnp.bfloat16))
    expected = sum(map(shard_bytes, jax.tree.leaves((state.ring, state.tokens))))
    assert state_bytes(deployment, sizes) == expected


@pytest.mark.parametrize("gpu", [CPU, H100], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_activations_have_the_dtype_of_the_engine(stored, gpu):
    config = replace(TINY, dtype=stored)
    planned, dtype = (
        Deployment(config, gpu, Layout(1, 1), "auto"),
        choose_dtype("auto", config, gpu.platform),
    )
    assert planned.dtype == planned.weights == str(dtype)
    assert planned.kv_dtype == {"float32": "fp32", "bfloat16": "bf16"}[str(dtype)]
