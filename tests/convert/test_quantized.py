"""Quantization and dequantization during conversion, against float64 arithmetic."""

import json
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from llama_jax.checkpoint import open_checkpoint
from llama_jax.quantization import FORMATS as KINDS
from tests.support.conversions import (
    FORMATS,
    convert_to,
    files,
    load_weights,
    refusal,
    small_pieces,
)
from tests.support.foreign_writer import change_config, compressed_tensors, fp8, write_foreign
from tests.support.tiny_checkpoint import bits, read, write_checkpoint

NAME = "model.layers.1.mlp.down_proj.weight"
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
MATRICES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "mlp.w_gate": "mlp.gate_proj",
    "mlp.w_up": "mlp.up_proj",
    "mlp.w_down": "mlp.down_proj",
}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def source(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    write_checkpoint(path, dtype=request.param)
    return path


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """Format → the quantized checkpoint and the report, converted in small pieces."""

    @cache
    def make(format: str):
        path = tmp_path_factory.mktemp(format) / "new"
        with small_pieces():
            return path, convert_to(path, source, quantize=format)

    return make


def quantized(path, name: str) -> list[np.ndarray]:
    reader = open_checkpoint(path)
    return [read(reader, name + s) for s in ("", "_scale", "_zero") if name + s in reader.tensors]


def dequantized(format: str, parts: list[np.ndarray]) -> np.ndarray:
    """The exact matrix in float64, from the description of the format alone."""
    values, scale = parts[0], parts[1].astype(np.float64)
    if format != "int4":
        return values.astype(np.float64) * scale[:, None]
    nibbles = np.stack([values & 15, values >> 4], -1).reshape(len(values), -1)
    columns = nibbles.shape[1] // scale.shape[1]
    zero = np.repeat(parts[2].astype(np.float64), columns, 1)
    return (nibbles - zero) * np.repeat(scale, columns, 1)


@pytest.mark.parametrize("format", FORMATS)
def test_every_number_is_the_nearest(source, converted, format):
    path, _ = converted(format)
    weights = load_weights(source)
    for layer in range(3):
        for hf_name in MATRICES.values():
            name = f"model.layers.{layer}.{hf_name}.weight"
            matrix = weights[name].double().numpy()
            parts = quantized(path, name)
            scale = parts[1].astype(np.float64)
            error = np.abs(dequantized(format, parts) - matrix)
            if format == "int8":
                np.testing.assert_allclose(scale, np.abs(matrix).max(1) / 127, rtol=2e-7)
                assert (error <= 0.50001 * scale[:, None]).all()
                assert parts[0].min() >= -127
            elif format == "fp8":
                np.testing.assert_allclose(scale, np.abs(matrix).max(1) / 448, rtol=2e-7)
                numbers = np.sort(E4M3[np.isfinite(E4M3)])
                distance = np.abs(matrix[..., None] / scale[:, None, None] - numbers).min(-1)
                assert (error <= distance * scale[:, None] + 1e-5 * np.abs(matrix)).all()
            else:
                groups = matrix.reshape(len(matrix), scale.shape[1], -1)
                low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
                np.testing.assert_allclose(scale, (high - low) / 15, rtol=1e-6)
                assert (np.abs(parts[2] + low / scale) <= 0.50001).all()
                # The ends of a group may lie half a step outside, as the zero point is rounded.
                assert (error <= 0.50001 * np.repeat(scale, groups.shape[-1], 1)).all()


@pytest.mark.parametrize("format", FORMATS)
def test_only_matrices_of_layers_are_quantized_and_the_error_is_reported(source, converted, format):
    path, report = converted(format)
    assert report.quantization_error.keys() == MATRICES.keys()
    manifest = json.loads((path / "llama_jax.json").read_text())
    assert manifest["quantization_error"] == report.quantization_error
    weights = load_weights(source)
    for kind, hf_name in MATRICES.items():
        changed = of = 0.0
        for layer in range(3):
            name = f"model.layers.{layer}.{hf_name}.weight"
            matrix = weights.pop(name).double().numpy()
            exact = dequantized(format, quantized(path, name))
            changed += ((exact - matrix) ** 2).sum()
            of += (matrix**2).sum()
        assert report.quantization_error[kind] == pytest.approx((changed / of) ** 0.5, rel=1e-5)
    reader = open_checkpoint(path)
    for name, tensor in weights.items():  # those that are left
        assert bits(read(reader, name)) == bits(tensor)
    config = json.loads((path / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "llama_jax", "format": format, "group_size": 128}  # fmt: skip
    assert config == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("format", FORMATS)
def test_all_ways_to_a_quantized_checkpoint_give_the_same_bits(source, converted, tmp_path, format):
    """In one step, in two steps, and in chunks of another size."""
    with small_pieces(chunk=1 << 26, block=1 << 22):
        convert_to(tmp_path / "orbax", source)
        convert_to(tmp_path / "two_steps", tmp_path / "orbax", quantize=format)
        convert_to(tmp_path / "one_step", source, quantize=format)
        convert_to(tmp_path / "again", tmp_path / "one_step")
        convert_to(tmp_path / "same", tmp_path / "one_step", quantize=format)
    expected = files(tmp_path / "one_step")
    for name in ("two_steps", "again", "same"):
        found = files(tmp_path / name)
        assert found.keys() == expected.keys()
        assert [n for n in found if found[n] != expected[n]] == ["llama_jax.json"]
    one, small = open_checkpoint(tmp_path / "one_step"), open_checkpoint(converted(format)[0])
    assert one.tensors == small.tensors
    for name in one.tensors:
        assert bits(read(one, name)) == bits(read(small, name)), name


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        *zip(FORMATS, (None, "float32", "float16"), strict=True),
        *(
            pytest.param(format, dtype, marks=pytest.mark.slow)
            for format, dtype in zip(FORMATS, ("float16", None, "float32"), strict=True)
        ),
    ],
)
def test_an_export_is_dequantized(source, converted, tmp_path, format, dtype):
    path, _ = converted(format)
    with small_pieces():
        convert_to(tmp_path / "back", path, layout="huggingface", quantize="plain", dtype=dtype)
    found, original = load_weights(tmp_path / "back"), load_weights(source)
    kept = dtype or str(original[NAME].dtype).removeprefix("torch.")
    assert found.keys() == original.keys()
    for name, tensor in found.items():
        assert tensor.dtype == getattr(torch, kept)
        parts = quantized(path, name)
        if len(parts) == 1:
            expected = original[name]
        else:
            expected = torch.from_numpy(KINDS[format](*parts).dequantize())
            np.testing.assert_allclose(expected, dequantized(format, parts), rtol=1e-6)
        assert bits(tensor) == bits(expected.to(tensor.dtype)), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == kept
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert bits(model.state_dict()[NAME]) == bits(found[NAME])


def test_nothing_says_that_dequantized_weights_of_a_tool_are_quantized(tmp_path):
    """Old versions of compressed-tensors have another key."""
    write_foreign(tmp_path / "fp8", None, fp8)
    change_config(tmp_path / "fp8", compression_config=compressed_tensors("float-quantized"))
    convert_to(tmp_path / "new", tmp_path / "fp8", quantize="plain", layout="huggingface")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert not {"compression_config", "quantization_config"} & config.keys()


def test_quantized_weights_are_not_quantized_again(source, tmp_path):
    convert_to(tmp_path / "new", source, quantize="int8")
    message = refusal(convert_to, tmp_path / "other", tmp_path / "new", quantize="int4")
    assert "int8" in message and "int4" in message
    message = refusal(convert_to, tmp_path / "other", tmp_path / "new", layout="huggingface")
    assert "Hugging Face" in message
    assert not (tmp_path / "other").exists()
