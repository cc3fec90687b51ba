"""Checkpoints quantized by other tools are translated exactly, bit for bit.

The writers in `foreign_writer` pack integers one by one. The result is unpacked by the formats' own
`dequantize` and must be (q - zero) · scale in float32.
"""

import json
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.foreign import LAYOUTS, Translated, translation
from llama_jax.checkpoint.reader import TensorInfo
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.model import Llama
from llama_jax.quantization import ACT_ORDER, FORMATS, QUANTIZERS
from llama_jax.weights.table import checkpoint_tensors, each_weight, is_quantized, stored_tensors
from tests.support import foreign_writer as writer
from tests.support.foreign_writer import (
    AWQ,
    FBGEMM,
    GPTQ,
    GPTQ_V2,
    MODELOPT,
    compressed_tensors,
    packed_config,
)
from tests.support.tiny_checkpoint import bits, place_tensors, read

ACTIVATIONS = (".activation_scale", ".input_scale", ".k_scale", ".v_scale")

# Name → quantization_config, writer of a matrix, and the format that it is translated to.
CASES = {
    "compressed-tensors fp8": (
        compressed_tensors("float-quantized"),
        partial(writer.fp8, extra=ACTIVATIONS),
        "fp8",
    ),
    "compressed-tensors fp8, one scale": (
        compressed_tensors("float-quantized", strategy="tensor"),
        partial(writer.fp8, scale_shape="tensor", scale_dtype=torch.float16),
        "fp8",
    ),
    "autofp8": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        partial(writer.fp8, scale_shape="tensor", scale_dtype=torch.float32, extra=ACTIVATIONS),
        "fp8",
    ),
    "fbgemm": (FBGEMM, partial(writer.fp8, scale_dtype=torch.float32), "fp8"),
    "modelopt": (
        MODELOPT,
        partial(writer.fp8, scale_shape="scalar", scale_dtype=torch.float32, extra=ACTIVATIONS),
        "fp8",
    ),
    "compressed-tensors int8": (
        compressed_tensors("int-quantized", type="int") | {"sparsity_config": {"format": "dense"}},
        writer.int8,
        "int8",
    ),
    "compressed-tensors int4": (packed_config(), writer.packed, "int4"),
    "compressed-tensors int4, zero points": (
        packed_config(symmetric=False, actorder="weight"),
        partial(writer.packed, symmetric=False),
        "int4",
    ),
    "gptq": (GPTQ, writer.gptq, "int4"),
    "gptq symmetric, no g_idx, bias of zeros": (
        GPTQ | {"sym": True, "checkpoint_format": "gptq"},
        partial(writer.gptq, zeros=(8, 8), g_idx=False, bias=True),
        "int4",
    ),
    "gptq desc_act with groups in order": (GPTQ | {"desc_act": True}, writer.gptq, "int4"),
    "gptq_v2": (GPTQ_V2, partial(writer.gptq, v2=True), "int4"),
    "gptq of large groups": (
        GPTQ | {"group_size": 32},
        partial(writer.gptq, group=32),
        "int4",
    ),
    "gptq of one group per row": (
        GPTQ | {"group_size": -1},
        partial(writer.gptq, group=None),
        "int4",
    ),
    "gptq act-order": (
        GPTQ | {"desc_act": True},
        partial(writer.gptq, act_order=True),
        "int4_act_order",
    ),
    "gptq act-order, not announced": (
        GPTQ_V2,
        partial(writer.gptq, v2=True, act_order=True),
        "int4_act_order",
    ),
    "gptq of 8 bits": (GPTQ | {"bits": 8}, partial(writer.gptq, bits=8), "int8_grouped"),
    "gptq_v2 of 8 bits, act-order": (
        GPTQ_V2 | {"bits": 8, "desc_act": True},
        partial(writer.gptq, bits=8, v2=True, act_order=True),
        "int8_act_order",
    ),
    "awq": (AWQ, writer.awq, "int4"),
    "fp8 in blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [12, 20]},
        partial(writer.fp8_blocks, rows=12, columns=20),
        "fp8_grouped",
    ),
    "compressed-tensors fp8 in blocks": (
        compressed_tensors("float-quantized", strategy="block", block_structure=[16, 16]),
        partial(writer.fp8_blocks, rows=16, columns=16, suffix=".weight_scale"),
        "fp8_grouped",
    ),
    "compressed-tensors int8 in groups": (
        compressed_tensors("int-quantized", type="int", strategy="group", group_size=16),
        partial(writer.int8_groups, symmetric=True),
        "int8_grouped",
    ),
    "compressed-tensors int8 with zero points": (
        compressed_tensors("int-quantized", type="int", symmetric=False),
        partial(writer.int8_groups, symmetric=False, group=None),
        "int8_grouped",
    ),
    "compressed-tensors packed int8 rows": (
        packed_config(num_bits=8, strategy="channel", group_size=None),
        partial(writer.packed, bits=8, group=None),
        "int8",
    ),
    "compressed-tensors packed int8 groups": (
        packed_config(num_bits=8),
        partial(writer.packed, bits=8),
        "int8_grouped",
    ),
    "compressed-tensors packed int8 groups, zero points": (
        packed_config(num_bits=8, symmetric=False),
        partial(writer.packed, bits=8, symmetric=False),
        "int8_grouped",
    ),
    "compressed-tensors int4 rows": (
        packed_config(strategy="channel", group_size=None),
        partial(writer.packed, group=None),
        "int4",
    ),
    "compressed-tensors int4, act-order": (
        packed_config(actorder="group"),
        partial(writer.packed, act_order=True),
        "int4_act_order",
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A checkpoint's path, its exact matrices, and the format that they are translated to."""
    config, matrix, format = CASES[request.param]
    path = tmp_path_factory.mktemp("foreign")
    return path, writer.write_foreign(path, config, matrix), format


def dequantized(reader) -> dict[str, np.ndarray]:
    """All dequantized matrices of a reader, by name."""
    config = reader.config
    matrices = {}
    for weight, layer in each_weight(config):
        if is_quantized(weight, config, layer):
            arrays = [read(reader, part.hf_name) for part in stored_tensors(weight, config, layer)]
            matrix = FORMATS[config.quantization.format](*arrays).dequantize()
            matrices[weight.hf_name.format(layer=layer)] = matrix
    return matrices


def assert_exact(reader, exact):
    found = dequantized(reader)
    assert found.keys() == exact.keys()
    for name, matrix in found.items():
        assert matrix.dtype == np.float32
        np.testing.assert_array_equal(matrix, exact[name], err_msg=name)


def test_matrices_are_exact(case):
    path, exact, format = case
    reader = open_checkpoint(path)
    announced = LlamaConfig.from_pretrained(path)
    # Only the stored tensors show that columns are in act-order.
    assert reader.config == replace(announced, quantization=reader.config.quantization)
    assert reader.config.quantization.format == format
    assert ACT_ORDER.get(announced.quantization.format, format) == format or (
        announced.quantization == reader.config.quantization
    )
    assert reader.config.dtype == "float16"
    assert_exact(reader, exact)
    assert all(np.abs(matrix).max() > 0 for matrix in exact.values())


def test_tensors_are_exactly_those_of_the_config(case):
    reader = open_checkpoint(case[0])
    wanted = checkpoint_tensors(reader.config)
    assert reader.tensors.keys() == wanted.keys()
    for name, info in reader.tensors.items():
        assert info.shape == wanted[name].shape
        assert info.dtype == (wanted[name].dtype or "float16")


def test_any_slice_is_that_of_the_whole(case, monkeypatch):
    """Tiles are so small that a slice spans several along each axis and ends inside them."""
    reader = open_checkpoint(case[0])
    names = [name for name in reader.tensors if ".layers.1." in name]
    whole = {name: read(reader, name) for name in names}
    monkeypatch.setattr(translation, "TILE", 7)
    rng = np.random.default_rng(1)
    for name in names:
        assert bits(read(reader, name)) == bits(whole[name])
        for _ in range(20):
            ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in whole[name].shape]
            index = tuple(slice(int(first), int(last)) for first, last in ends)
            assert bits(read(reader, name, index)) == bits(whole[name][index])


def test_tensors_may_start_at_any_byte(case, tmp_path):
    path, exact, _ = case
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    place_tensors(tmp_path / "model.safetensors", 1)
    assert_exact(open_checkpoint(tmp_path), exact)


def test_modelopt_with_a_separate_quantization_config(tmp_path):
    exact = writer.write_foreign(tmp_path, None, CASES["modelopt"][1])
    writer.change_config(tmp_path, quantization_config=None)  # null, as if it were absent
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    content = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    assert LlamaConfig.from_pretrained(tmp_path).quantization.format == "fp8"
    assert_exact(open_checkpoint(tmp_path), exact)


def test_a_quantization_config_counts_before_a_separate_one(tmp_path):
    config, matrix, _ = CASES["modelopt"]
    exact = writer.write_foreign(tmp_path, config, matrix)
    content = {"quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    assert_exact(open_checkpoint(tmp_path), exact)


def test_a_g_idx_that_is_not_used(tmp_path):
    """compressed-tensors fills it with -1."""
    config, matrix, format = CASES["compressed-tensors int4"]
    exact = writer.write_foreign(tmp_path, config, matrix)

    def add(tensors):
        for name, whole in exact.items():
            unused = torch.full(whole.shape[1:], -1, dtype=torch.int32)
            tensors[name + "_g_idx"] = unused

    writer.change_tensors(tmp_path, add)
    reader = open_checkpoint(tmp_path)
    assert reader.config.quantization.format == format
    assert_exact(reader, exact)


def test_a_closed_reader_lets_go_of_its_files(tmp_path):
    writer.write_foreign(tmp_path, GPTQ, writer.gptq)
    reader = open_checkpoint(tmp_path)
    read(reader, "model.layers.1.self_attn.q_proj.weight")
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    reader.close()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("rows", [64, 96])  # those of the queries, or of the LM head
def test_some_matrices_in_act_order(tmp_path, rows):
    """The head has a format of its own; in the layers, one in act-order is enough for all."""

    def matrix(rng, num_out, num_in):
        return writer.gptq(rng, num_out, num_in, act_order=num_out == rows)

    exact = writer.write_foreign(tmp_path, GPTQ | {"lm_head": True}, matrix, head=True)
    reader = open_checkpoint(tmp_path)
    head = read(reader, "lm_head.weight")
    np.testing.assert_array_equal(head, exact.pop("lm_head.weight"))
    assert reader.config.quantization.format == ("int4_act_order" if rows == 64 else "int4")
    assert_exact(reader, exact)


@pytest.mark.parametrize("format", QUANTIZERS)
def test_our_own_layouts(tmp_path, format):
    """As `convert` writes them: all arrays of a format as they are."""
    quantization = Quantization(format=format, group_size=16)
    kind = QUANTIZERS[format]

    def matrix(rng, num_out, num_in):
        # This project's groups never cross from one KV head's columns into the next.
        group = int(np.gcd(quantization.group_size, num_in // 2))
        parts = kind.quantize(rng.normal(size=(num_out, num_in)).astype(np.float32), group)
        suffixes = (".weight", ".weight_scale", ".weight_zero")
        tensors = {s: as_torch(part) for s, part in zip(suffixes, parts, strict=False)}
        return tensors, parts.dequantize()

    exact = writer.write_foreign(tmp_path, None, matrix)
    config = replace(read_plain_config(tmp_path), quantization=quantization)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    reader = open_checkpoint(tmp_path)
    assert reader.config == config
    assert_exact(reader, exact)


def read_plain_config(path) -> LlamaConfig:
    return LlamaConfig.from_dict(json.loads((path / "config.json").read_text()))


def as_torch(array):
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("gptq4", {".qweight": (512, 4096)}),
        ("awq", {".qweight": (4096, 512)}),
    ],
)
def test_memory_is_bounded(name, shapes):
    """A matrix of 8 MiB; unpacked to one byte per value it would take 16 MiB or more."""
    arrays = {suffix: np.zeros(shape, np.int32) for suffix, shape in shapes.items()}
    part = partial(LAYOUTS[name].values, arrays)
    tensor = Translated(TensorInfo((4096, 2048), "uint8"), part)
    out = np.empty((4096, 2048), np.uint8)
    tracemalloc.start()
    tensor.read_into((slice(0, 4096), slice(0, 2048)), out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    "name",
    [
        "modelopt",
        "compressed-tensors int8",
        "gptq",
        "awq",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("gptq of 8 bits", "gptq_v2 of 8 bits, act-order", "fp8 in blocks")
        ),
    ],
)
def test_the_model_runs(tmp_path, name):
    """The logits are those of transformers with the exact matrices."""
    config, matrix, _ = CASES[name]
    exact = writer.write_foreign(tmp_path, config, matrix, dtype="float32")
    transformers_config = transformers.LlamaConfig.from_pretrained(tmp_path)
    del transformers_config.quantization_config
    model = transformers.LlamaForCausalLM(transformers_config)
    reader = open_checkpoint(tmp_path)
    plain = {n: read(reader, n) for n in reader.tensors if n not in exact and "_proj." not in n}
    weights = {n: torch.from_numpy(array) for n, array in (plain | exact).items()}
    model.load_state_dict(weights)
    tokens = np.arange(24)[None] * 7 % 96
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits = np.asarray(jax.jit(Llama.__call__)(Llama.from_pretrained(tmp_path), tokens))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()
