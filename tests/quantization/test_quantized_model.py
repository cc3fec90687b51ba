"""The model with quantized weights, against transformers with the dequantized ones."""

import contextlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.load import load_params
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.engine.device_memory import bytes_by_device, weight_bytes
from llama_jax.model import Llama
from llama_jax.quantization import QUANTIZERS, Int4
from llama_jax.weights.placement import param_shapes, param_specs, placements
from llama_jax.weights.split import ShardingError
from sharding.mesh import make_mesh
from tests.support.quantized_checkpoint import save_quantized
from tests.support.reference import (
    MESHES,
    ROPE_LLAMA3,
    distance,
    drive,
    greedy_requests,
    make_loop,
    make_model,
    reference_logits,
)

# The name says how many query heads share a KV head. Four stages do not divide the layers of two of
# them, so that some layers are padding; int4 cannot cut the columns into groups of 128.
SHAPES = {
    "one": dict(num_heads=4, num_kv_heads=4, num_layers=5, vocab_size=250),
    "four-tied": dict(num_heads=8, num_kv_heads=2, num_layers=3, tied=True, rope=ROPE_LLAMA3),
    "eight": dict(num_heads=16, num_kv_heads=2, num_layers=4, embed_dim=48, mlp_dim=256),
}
TOKENS = np.random.default_rng(2).integers(0, 250, 60).tolist()
jitted = jax.jit(Llama.__call__)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(shape, format) -> transformers model with the dequantized weights, quantized checkpoint."""
    made = {}

    def make(shape: str, name: str):
        if (shape, name) not in made:
            model = make_model(**SHAPES[shape])
            path = tmp_path_factory.mktemp(f"{shape}-{name}")
            made[shape, name] = model, save_quantized(model, path, name)
        return made[shape, name]

    return make


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        pytest.param(shape, name, marks=[] if i == j else [pytest.mark.slow])
        for i, shape in enumerate(SHAPES)
        for j, name in enumerate(QUANTIZERS)
    ],
)
def test_on_one_device(checkpoint, shape, name):
    theirs, path = checkpoint(shape, name)
    ours = Llama.from_pretrained(path)
    for layer in ours.layers:
        assert isinstance(layer.attention.wqkv.get_value(), QUANTIZERS[name])
    expected = reference_logits(theirs, TOKENS)
    tokens = np.array([TOKENS])
    # Operation by operation takes seconds: one of the quick tests does that, too.
    for call in (jitted, Llama.__call__) if shape == "one" else (jitted,):
        assert np.abs(call(ours, tokens)[0] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_formats_differ(checkpoint):
    """So a test that ran the wrong one would fail."""
    found = [
        np.asarray(jitted(Llama.from_pretrained(checkpoint("one", f)[1]), np.array([TOKENS])))
        for f in QUANTIZERS
    ]
    plain = reference_logits(make_model(**SHAPES["one"]), TOKENS)
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        assert np.abs(found[one] - found[other]).max() > 1e-3 * np.abs(plain).max()
    # Each is an approximation, a rough one for int4 and matrices as small as these.
    for logits, least in zip(found, (0.999, 0.99, 0.9), strict=True):
        assert least < np.corrcoef(logits.ravel(), plain.ravel())[0, 1] < 1


@pytest.mark.parametrize("name", QUANTIZERS)
def test_in_bfloat16(checkpoint, name):
    theirs, path = checkpoint("one", name)
    ours = Llama.from_pretrained(path, dtype="bfloat16")
    weights = ours.layers[0].mlp.w_down.get_value()
    assert weights.scale.dtype == jnp.float32 and ours.embedding[...].dtype == jnp.bfloat16
    expected = reference_logits(theirs, TOKENS)
    logits = jitted(ours, np.array([TOKENS]))[0]
    assert np.abs(logits - expected).max() <= 0.05 * np.abs(expected).max()


# The quick set has each shape and each format once, on meshes that split matrices over ranks and in
# the largest buckets alone; the slow tests have everything, in all buckets.
RUNS = [
    pytest.param((shape, name, mesh, False), marks=pytest.mark.slow, id=f"{shape}-{name}-{mesh}")
    for shape in SHAPES
    for name in QUANTIZERS
    for mesh in MESHES
]
RUNS += [
    pytest.param((shape, name, mesh, True), id=f"{shape}-{name}-{mesh}-largest")
    for i, shape in enumerate(SHAPES)
    for j, name in enumerate(QUANTIZERS)
    for k, mesh in enumerate(MESHES)
    if mesh.endswith("x2") and (i, j) == (k % 3, (k + 1) % 3)
]


@pytest.fixture(params=RUNS)
def ring(request, checkpoint):
    """(dequantized model, ring that serves the quantized checkpoint)"""
    shape, name, mesh, largest_only = request.param
    theirs, path = checkpoint(shape, name)
    num_stages = int(mesh[0])
    loop = make_loop(
        path,
        mesh,
        results_late=MESHES.index(mesh) % 3,
        max_num_seqs=2 * num_stages,
        max_chunk=64,
        page_size=8,
        num_pages=24 * num_stages,
        largest_only=largest_only,
    )
    yield theirs, loop
    jax.clear_caches()  # no other run has the same programs


def test_in_the_ring(ring):
    theirs, loop = ring
    requests = greedy_requests((1, 90, 33, 64), vocab_size=250, max_tokens=8)
    run = drive(loop, requests)
    for request in requests:
        assert len(run.tokens[request.request_id]) == 8
        far = distance(theirs, request, run)
        assert far.logits <= 1e-4
        assert far.tokens <= 1e-3


# --- placement on the mesh -----------------------------------------------------------------------

LLAMA_70B = LlamaConfig.llama3_70b()


def quantized_config(name: str, config: LlamaConfig = LLAMA_70B, **changes) -> LlamaConfig:
    return replace(config, quantization=Quantization(format=name), **changes)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_specs_of_a_quantized_matrix(name):
    layer = param_specs(quantized_config(name), 4, 2).layers[0]
    rows, columns = P("stage", "model", None), P("stage", None, "model")
    by_rank, by_stage = P("stage", "model"), P("stage", None)
    for weight, of_values, of_rows in (
        ("attention.wqkv", rows, by_rank),
        ("mlp.w_gate_up", rows, by_rank),
        ("attention.wo", columns, by_stage),
        ("mlp.w_down", columns, by_stage),
    ):
        if name == "int4":  # scales and zero points go with their columns
            assert layer[weight] == Int4(of_values, of_values, of_values)
        else:
            assert layer[weight] == QUANTIZERS[name](of_values, of_rows)
    assert layer["mlp_norm.scale"] == by_stage


# Bytes per device for 70B on 4 x 2: half of each matrix of 20 layers, and an eighth of the
# embedding and of the LM head; int4 adds 5 bytes (scale and zero point) per 128 values.
MATRICES = 20 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192) // 2
ROWS_SPLIT, ROWS_WHOLE = 20 * (8192 + 2 * 1024 + 2 * 28672) // 2, 20 * 2 * 8192
PLAIN = 2 * (2 * 128256 * 8192 // 8 + (20 * 2 + 1) * 8192)
WEIGHTS_OF_70B = {
    None: PLAIN + 2 * MATRICES,
    "int8": PLAIN + MATRICES + 4 * (ROWS_SPLIT + ROWS_WHOLE),
    "fp8": PLAIN + MATRICES + 4 * (ROWS_SPLIT + ROWS_WHOLE),
    "int4": PLAIN + MATRICES // 2 + 5 * MATRICES // 128,
}


@pytest.mark.parametrize("name", WEIGHTS_OF_70B)
def test_bytes_of_70b_on_each_device(name):
    config = quantized_config(name) if name else LLAMA_70B
    assert weight_bytes(config, make_mesh("4x2"), jnp.bfloat16) == WEIGHTS_OF_70B[name]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_loaded_weights_have_the_predicted_sizes(checkpoint, name):
    mesh = make_mesh("4x2")
    with contextlib.closing(open_checkpoint(checkpoint("one", name)[1])) as reader:
        params = load_params(reader, mesh, np.dtype("float32"))
        expected = param_shapes(reader.config, mesh, np.dtype("float32"))
        weights = weight_bytes(reader.config, mesh, np.dtype("float32"))
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for array, shape in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (
            shape.shape,
            shape.dtype,
            shape.sharding,
        )
    assert set(bytes_by_device(params, mesh).values()) == {weights}
    # The padding layers of the last stages are zeros, scales included.
    for part in params.layers[1]["mlp.w_down"]:
        assert np.asarray(part)[0].any() and not np.asarray(part)[1:].astype(np.float32).any()


def test_a_mesh_that_would_cut_a_group_is_refused():
    """100 columns are 25 groups of 4, or 50 bytes."""
    config = quantized_config("int4", mlp_dim=100)
    assert placements(config, 4, 1).layers[0]["mlp.w_down"].scale.shape == (4, 8192, 25)
    for num_ranks, tensor in ((2, "down_proj.weight_scale"), (4, "down_proj.weight ")):
        with pytest.raises(ShardingError, match=tensor):
            placements(config, 4, num_ranks)
    plain = Quantization(format="int4", plain=("model.layers.0.mlp.down_proj",))
    with pytest.raises(ShardingError, match="down_proj"):
        placements(replace(config, quantization=plain), 1, 2)  # it cuts those of the other layers
    for name in ("int8", "fp8"):
        placements(quantized_config(name, mlp_dim=100), 4, 4)


def test_groups_shrink_where_kv_heads_need_it():
    config = quantized_config("int4", mlp_dim=8 * 96)
    scale = placements(config, 4, 8).layers[0]["mlp.w_down"].scale
    assert scale.shape == (4, 8192, 8 * 96 // 32)
    odd = quantized_config("int4", mlp_dim=8 * 9)  # a group of 9 columns would be odd
    scale = placements(odd, 4, 1).layers[0]["mlp.w_down"].scale
    assert scale.shape == (4, 8192, 8 * 9 // 8)
