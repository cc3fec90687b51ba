"""Checkpoints that other tools wrote, with the matrices that these tools compute with.

tests/support/quantize_with_tools.py wrote tests/data/quantized.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.reader import numpy_dtype
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.ring.sharded_llama import ShardedLlama
from llama_jax.weights.table import each_weight, module_name, stored_tensors, stored_tree
from sharding.errors import UserError
from tests.support.conversions import convert_to
from tests.support.tiny_checkpoint import read

DATA = Path(__file__).parents[1] / "data" / "quantized"
CASES = sorted(path.name for path in DATA.iterdir())
TOKENS = np.arange(24)[None] * 7 % 32
# Case → its format, and the number of matrices of the layers that are not quantized.
FORMATS = {
    "auto_round_w4a16_skipping_a_module": ("int4", 1),
    "auto_round_w8a16": ("int8_grouped", 0),
    "gptqmodel_4bit_act_order": ("int4_act_order", 0),
    "gptqmodel_4bit_with_8bit_head": ("int4", 2),
    "gptqmodel_8bit_v2": ("int8_grouped", 0),
    "gptqmodel_awq": ("int4", 0),
    "llm_compressor_fp8_block": ("fp8_grouped", 0),
    "llm_compressor_fp8_kv_cache": ("fp8", 0),
    "llm_compressor_fp8_skipping_down_proj": ("fp8", 2),
    "llm_compressor_w4a16_with_head": ("int4", 8),
    "llm_compressor_w8a16_asymmetric": ("int8_grouped", 0),
    "llm_compressor_w8a8": ("int8", 0),
}


def dequantized(path: Path) -> dict[str, np.ndarray]:
    """All weights of a checkpoint in float32, by name."""
    weights = {}
    with contextlib.closing(open_checkpoint(path)) as reader:
        for weight, layer in each_weight(reader.config):
            tree = stored_tree(weight, reader.config, layer)
            tensors = stored_tensors(weight, reader.config, layer)
            arrays = [read(reader, tensor.hf_name) for tensor in tensors]
            quantized = isinstance(tree, tuple)
            matrix = type(tree)(*arrays).dequantize() if quantized else arrays[0]
            weights[f"{module_name(weight, layer)}.weight"] = matrix.astype(np.float32)
    return weights


def expected_logits(path: Path) -> np.ndarray:
    """The logits of transformers with the dequantized weights, float32 [1, T, V]."""
    config = transformers.LlamaConfig.from_pretrained(path)
    del config.quantization_config
    model = transformers.LlamaForCausalLM(config).float().eval()
    weights = dequantized(path)
    model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def test_every_case_is_here():
    assert CASES == sorted(FORMATS)


@pytest.mark.parametrize("name", CASES)
def test_nothing_in_the_config_is_unknown(name):
    with contextlib.closing(open_checkpoint(DATA / name)) as reader:
        assert reader.declared.quantization.unknown == ()
        format, plain = FORMATS[name]
        assert reader.config.quantization.format == format
        assert len(reader.config.quantization.plain) == plain


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_those_of_the_tool(name):
    """Bit for bit, once they are rounded as the tool rounds them."""
    reference = json.loads((DATA / name / "reference.json").read_text())["matrices"]
    weights = dequantized(DATA / name)
    assert len(reference) == 15  # the LM head, and seven matrices in each of two layers
    for module, stored in reference.items():
        matrix = weights[f"{module}.weight"] + np.float32(0)  # which has no negative zeros
        rounded = matrix.astype(numpy_dtype(stored["dtype"]))
        assert hashlib.sha256(rounded.tobytes()).hexdigest() == stored["sha256"], module


@pytest.mark.parametrize("name", CASES)
def test_a_conversion_changes_nothing(name, tmp_path):
    convert_to(tmp_path / "orbax", DATA / name)
    converted, weights = dequantized(tmp_path / "orbax"), dequantized(DATA / name)
    assert LlamaConfig.from_pretrained(tmp_path / "orbax").quantization.format == FORMATS[name][0]
    assert converted.keys() == weights.keys()
    for module, weight in weights.items():
        np.testing.assert_array_equal(converted[module], weight, err_msg=module)


MUTATIONS = {
    "group_size": st.integers(-(10**30), 10**30) | st.sampled_from([-1, 0, 2, 16, 64, 128]),
    "bits": st.sampled_from([2, 3, 4, 8, 16]),
    "desc_act": st.booleans(),
    "checkpoint_format": st.sampled_from(["gptq", "gptq_v2", "gemm"]),
    "quant_method": st.sampled_from(["gptq", "awq", "fp8", "auto-round", "compressed-tensors"]),
    "weight_block_size": st.lists(st.integers(-1, 10**30), max_size=3),
    "config_groups": st.sampled_from([{}, None, {"group_0": {"weights": {"num_bits": 8}}}]),
    "format": st.sampled_from(["pack-quantized", "int-quantized", "float-quantized", "gptq_v2"]),
}


@settings(max_examples=100, deadline=None)
@example(
    name="llm_compressor_fp8_block",
    changes={"quant_method": "fp8", "weight_block_size": [1 << 63, 128]},
)
@given(
    name=st.sampled_from(CASES),
    changes=st.fixed_dictionaries({}, optional=MUTATIONS),
)
def test_a_mutated_config_opens_or_is_refused(tmp_path_factory, name, changes):
    path = tmp_path_factory.mktemp("mutated")
    config = json.loads((DATA / name / "config.json").read_text())
    config["quantization_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").symlink_to(DATA / name / "model.safetensors")
    with contextlib.suppress(UserError):
        for weight in dequantized(path).values():
            assert np.isfinite(weight).all()


QUICK = ("gptqmodel_4bit_act_order", "llm_compressor_fp8_block")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_logits_on_one_device(name):
    expected = expected_logits(DATA / name)
    found = np.asarray(jax.jit(Llama.__call__)(Llama.from_pretrained(DATA / name), TOKENS))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_on_a_mesh(name, tmp_path):
    """Every other case is converted first."""
    path = DATA / name
    if CASES.index(name) % 2:
        convert_to(tmp_path / "orbax", path)
        path = tmp_path / "orbax"
    expected = expected_logits(DATA / name)
    found = np.asarray(ShardedLlama.from_pretrained(path, "2x2")(TOKENS))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
