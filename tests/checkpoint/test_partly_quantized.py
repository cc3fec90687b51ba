"""Checkpoints of which some matrices are quantized and others are not, and quantized LM heads."""

import contextlib
from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest
import torch
import transformers

from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.dequantized import read_dequantized
from llama_jax.checkpoint.load import load_params
from llama_jax.engine.device_memory import bytes_by_device, weight_bytes
from llama_jax.quantization import Fp8
from llama_jax.ring.sharded_llama import ShardedLlama
from llama_jax.weights.table import (
    EMBEDDING,
    StoredTensor,
    each_weight,
    stored_tensors,
    stored_tree,
)
from sharding.mesh import make_mesh
from tests.support import foreign_writer as writer
from tests.support.conversions import convert_to, small_pieces
from tests.support.foreign_writer import AWQ, FBGEMM, GPTQ, packed_config
from tests.support.fused_weights import weights_of
from tests.support.tiny_checkpoint import read

# As Meta released Llama 3.1 405B in FP8: attention, and all of the first and last layer, are plain.
META_FP8 = FBGEMM | {
    "modules_to_not_convert": [
        "lm_head",
        *(f"model.layers.{layer}.self_attn" for layer in range(3)),
        *(f"model.layers.{layer}.mlp" for layer in (0, 2)),
    ]
}
ATTENTION = ("self_attn",)
CASES = {
    "fbgemm": (META_FP8, writer.fp8, (*ATTENTION, ".0.mlp", ".2.mlp"), False),
    "llm-compressor, skipped projection": (packed_config(), writer.packed, ("down_proj",), False),
    "gptq, some of a stage": (
        GPTQ | {"dynamic": {"-:.*layers.1.mlp.*": {}}, "lm_head": True},
        writer.gptq,
        ("layers.1.mlp",),
        True,
    ),
    "act-order": (
        GPTQ | {"desc_act": True},
        partial(writer.gptq, act_order=True),
        ("layers.0.self_attn.o_proj",),
        True,
    ),
    "awq": (AWQ, writer.awq, ("layers.2",), False),
    "fp8 in blocks": (
        {"quant_method": "fp8", "weight_block_size": [16, 8]},
        partial(writer.fp8_blocks, rows=16, columns=8),
        ("layers.2.mlp.up_proj",),
        True,
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Matrices are dequantized a few rows at a time."""
    monkeypatch.setattr("llama_jax.checkpoint.dequantized._BLOCK", 100)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A checkpoint's path, and all of its exact weights by name."""
    config, matrix, plain, head = CASES[request.param]
    path = tmp_path_factory.mktemp("partly")
    exact = writer.write_foreign(path, config, matrix, plain=plain, head=head, dtype="bfloat16")
    with contextlib.closing(open_checkpoint(path)) as reader:
        tensors = (
            tensor
            for weight, layer in each_weight(reader.config)
            for tensor in stored_tensors(weight, reader.config, layer)
            if tensor.dtype is None and tensor.hf_name not in exact
        )
        exact |= {t.hf_name: read(reader, t.hf_name).astype(np.float32) for t in tensors}
    return path, exact


def dequantized(reader) -> dict[str, np.ndarray]:
    """All weights of a reader in float32, by name."""
    weights = {}
    for weight, layer in each_weight(reader.config):
        arrays = [read(reader, t.hf_name) for t in stored_tensors(weight, reader.config, layer)]
        tree = stored_tree(weight, reader.config, layer)
        quantized = isinstance(tree, tuple)
        matrix = type(tree)(*arrays).dequantize() if quantized else arrays[0].astype(np.float32)
        weights[weight.hf_name.format(layer=layer)] = matrix
    return weights


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, matrix in found.items():
        np.testing.assert_array_equal(matrix, expected[name], err_msg=name)


def test_every_weight_is_exact(case):
    path, exact = case
    reader = open_checkpoint(path)
    assert reader.config.quantization.plain
    assert reader.config.dtype == "bfloat16"
    assert_equal(dequantized(reader), exact)


@pytest.mark.parametrize("columns", [48, 6])
def test_few_rows_are_dequantized_at_a_time(columns):
    """Also of a slice of the columns, since whole rows are read."""
    parts = Fp8(
        StoredTensor("values", ("embed", "mlp"), (9, 48), "float8_e4m3fn"),
        StoredTensor("scale", ("embed",), (9,), "float32"),
    )
    rows = Counter()

    def read_into(name, index, out):
        rows[name, index[0].stop - index[0].start] += 1
        out.fill(1)

    out = np.zeros((9, columns), np.float32)
    read_dequantized(read_into, parts, (slice(0, 9), slice(0, columns)), out)
    assert rows == {(name, size): count for name in ("values", "scale")
                    for size, count in ((2, 4), (1, 1))}  # fmt: skip
    assert (out == 1).all()


def test_a_tool_that_quantized_no_matrix(tmp_path):
    writer.write_foreign(tmp_path, FBGEMM, writer.fp8, plain=("layers",))
    assert open_checkpoint(tmp_path).config.quantization is None


def test_a_conversion_keeps_every_weight_as_it_is(case, tmp_path):
    path, exact = case
    with small_pieces():
        convert_to(tmp_path / "orbax", path)
    source, reader = open_checkpoint(path), open_checkpoint(tmp_path / "orbax")
    assert reader.config == source.config
    assert {n: i.dtype for n, i in reader.tensors.items()} == {
        n: i.dtype for n, i in source.tensors.items()
    }
    assert_equal(dequantized(reader), exact)


def test_a_conversion_to_plain_weights(case, tmp_path):
    path, exact = case
    with small_pieces():
        convert_to(
            tmp_path / "plain", path, quantize="plain", dtype="float32", layout="huggingface"
        )
    reader = open_checkpoint(tmp_path / "plain")
    assert reader.config.quantization is None
    assert_equal(dequantized(reader), exact)


@pytest.mark.parametrize("mesh", ["1x1", "2x2", "4x1"])
def test_weights_on_a_mesh(case, mesh):
    """A matrix is quantized on the mesh only where it is in the layers of all stages."""
    path, exact = case
    mesh = make_mesh(mesh)
    with contextlib.closing(open_checkpoint(path)) as reader:
        config = reader.config
        params = load_params(reader, mesh, np.dtype("float32"))
    num_stages = mesh.shape["stage"]
    per_stage = -(-config.num_layers // num_stages)
    plain_positions = set()
    for weight, layer in each_weight(config):
        if ".layers." not in weight.hf_name:
            continue
        stage, position = divmod(layer, per_stage) if num_stages > 1 else (0, layer)
        placed = jax.tree.map(lambda a, s=stage: np.asarray(a)[s], params.layers[position])
        found = weights_of(placed, config, mesh.shape["model"])[weight.name]
        if isinstance(found, tuple):
            found = found.dequantize()
        elif found.ndim == 2:
            plain_positions.add((weight.name, position))
        name = weight.hf_name.format(layer=layer)
        np.testing.assert_array_equal(found, exact[name], err_msg=name)
    assert {
        (weight.name, layer % per_stage if num_stages > 1 else layer)
        for weight, layer in each_weight(config)
        if len(weight.axes) == 2
        and ".layers." in weight.hf_name
        and weight.hf_name.format(layer=layer).removesuffix(".weight") in config.quantization.plain
    } == plain_positions
    rows = np.asarray(params.lm_head)[: config.vocab_size]
    np.testing.assert_array_equal(rows, exact["lm_head.weight"])
    assert params.embedding is not None and EMBEDDING.hf_name in exact
    expected = weight_bytes(config, mesh, np.dtype("float32"))
    assert set(bytes_by_device(params, mesh).values()) == {expected}


@pytest.mark.slow
def test_logits(case, request):
    """As those of transformers with the exact weights; each case on one of three meshes."""
    mesh = ("2x2", "3x1", "1x2")[list(CASES).index(request.node.callspec.params["case"]) % 3]
    path, exact = case
    config = transformers.LlamaConfig.from_pretrained(path)
    del config.quantization_config
    theirs = transformers.LlamaForCausalLM(config).float().eval()
    theirs.load_state_dict({name: torch.from_numpy(weight) for name, weight in exact.items()})
    tokens = np.arange(20)[None] * 7 % 96
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = np.asarray(ShardedLlama.from_pretrained(path, mesh)(tokens))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
