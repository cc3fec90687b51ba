"""Quantised checkpoints that cannot be read exactly are refused by name, in one sentence."""

import shutil
from functools import partial

import pytest
import torch

from llama_jax.checkpoint import CheckpointError, open_checkpoint
from llama_jax.config import ConfigError, LlamaConfig
from tests.support import foreign_writer as writer
from tests.support.foreign_writer import (
    AWQ,
    FBGEMM,
    GPTQ,
    MODELOPT,
    compressed_tensors,
    packed_config,
)
from tests.support.tiny_checkpoint import read, write_checkpoint

FP8 = compressed_tensors("float-quantized")
GATE = "model.layers.1.mlp.gate_proj"


def refusal(path) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        open_checkpoint(path)
    return one_sentence(caught)


def one_sentence(caught) -> str:
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    write_checkpoint(path)
    return path


def group_of(config, **changes):
    return config | {"config_groups": {"group_0": config["config_groups"]["group_0"] | changes}}


WITHOUT_METHOD = {key: value for key, value in GPTQ.items() if key != "quant_method"}
TWO_GROUPS = {name: FP8["config_groups"]["group_0"] for name in ("group_0", "group_1")}
KEYS_OF_TOOLS = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "mxfp4": {"modules_to_not_convert": ["lm_head"]},
}
MORE_TOOLS = "hqq aqlm eetq quanto torchao exl2 gguf bitnet higgs vptq auto-round".split()


@pytest.mark.parametrize("method", [*KEYS_OF_TOOLS, *MORE_TOOLS])
def test_other_tools(plain, tmp_path, method):
    config = {"quant_method": method, **KEYS_OF_TOOLS.get(method, {})}
    message = refuse_config(plain, tmp_path, config)
    assert f"with {method}" in message


@pytest.mark.parametrize(
    ("config", "what"),
    [
        # What is known, in a form that cannot be read.
        (GPTQ | {"bits": 8}, "with 8-bit GPTQ"),
        (GPTQ | {"bits": 3}, "with 3-bit GPTQ"),
        (GPTQ | {"bits": None}, "with None-bit GPTQ"),
        (GPTQ | {"group_size": -1}, "gptq and group_size -1"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format = True"),
        (GPTQ | {"dynamic": {"-:.*down_proj": {}}}, "dynamic = {'-:.*down_proj': {}}"),
        (GPTQ | {"lm_head": True}, "lm_head = True"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype = 'int16'"),
        (AWQ | {"version": "gemv"}, "with 4-bit AWQ, version gemv"),
        (AWQ | {"version": "gemv_fast"}, "version gemv_fast"),
        (AWQ | {"zero_point": False}, "zero_point False"),
        (AWQ | {"bits": 8}, "with 8-bit AWQ"),
        (AWQ | {"group_size": -1}, "awq and group_size -1"),
        (AWQ | {"desc_act": True}, "awq and desc_act = True"),
        (MODELOPT | {"quant_algo": "NVFP4"}, "with modelopt NVFP4"),
        (MODELOPT | {"quant_algo": "FP8_PB_WO"}, "with modelopt FP8_PB_WO"),
        (MODELOPT | {"quant_algo": None}, "with modelopt None"),
        (FP8 | {"format": "nvfp4-pack-quantized"}, "with compressed-tensors nvfp4-pack-quantized"),
        (FP8 | {"format": None}, "with compressed-tensors None"),
        (FP8 | {"config_groups": TWO_GROUPS}, "2 config_groups"),
        (FP8 | {"config_groups": None}, "0 config_groups"),
        (group_of(FP8, format="int-quantized"), "with compressed-tensors int-quantized: "),
        (FP8 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config = {"),
        (FP8 | {"transform_config": {"config_groups": {"v": {}}}}, "transform_config = {"),
        (compressed_tensors("float-quantized", strategy="block"), "strategy 'block'"),
        (compressed_tensors("float-quantized", block_structure=[8, 8]), "block_structure = [8, 8]"),
        (compressed_tensors("float-quantized", dynamic=True), "dynamic = True"),
        (compressed_tensors("int-quantized", type="int", symmetric=False), "symmetric False"),
        (compressed_tensors("int-quantized"), "type 'float'"),
        (packed_config(num_bits=8), "num_bits 8"),
        (packed_config(strategy="channel"), "strategy 'channel'"),
        (packed_config(actorder="group"), "actorder 'group'"),
        # Keys that nobody here has heard of.
        (FP8 | {"twist": 1}, "twist"),
        (group_of(FP8, twist=1), "twist"),
        (compressed_tensors("float-quantized", twist=1), "twist"),
        (FBGEMM | {"twist": 1, "turn": 2}, "turn, twist"),
        (MODELOPT | {"twist": 1}, "twist"),
        (GPTQ | {"twist": 1}, "twist"),
        (AWQ | {"twist": 1}, "twist"),
        # What is no description at all.
        (WITHOUT_METHOD, "with an unnamed method"),
        ("gptq", "quantization_config must be an object"),
        ({"quant_method": ["gptq"]}, "with ['gptq']"),
        (FP8 | {"config_groups": [1]}, "config_groups"),
        (FP8 | {"config_groups": {"group_0": 1}}, "quantization group"),
        (group_of(FP8, weights="int8"), "weights"),
        (GPTQ | {"group_size": "128"}, "group_size must be an integer"),
        (GPTQ | {"group_size": None}, "group_size must be an integer"),
        ({"quant_method": "llama_jax"}, "format"),
        ({"quant_method": "llama_jax", "format": "int8", "x": 1}, "format, x"),
        ({"quant_method": "llama_jax", "format": "int7"}, "'int7' is not supported"),
    ],
)
def test_other_forms(plain, tmp_path, config, what):
    assert what in refuse_config(plain, tmp_path, config)


def refuse_config(plain, path, config) -> str:
    shutil.copytree(plain, path, dirs_exist_ok=True)
    writer.change_config(path, quantization_config=config)
    message = refusal(path)
    assert str(path / "config.json") in message
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_pretrained(path)
    assert str(caught.value) == message
    return message


@pytest.mark.parametrize("content", ["{}", '{"quantization": 8}', "[]", "{"])
def test_a_side_file_that_says_nothing(plain, tmp_path, content):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "hf_quant_config.json").write_text(content)
    assert str(tmp_path / "hf_quant_config.json") in refusal(tmp_path)


# --- tensors -------------------------------------------------------------------------------------

CONFIGS = {
    "fp8": (FP8, partial(writer.fp8, extra=(".input_scale",))),
    "packed": (packed_config(symmetric=False), partial(writer.packed, symmetric=False)),
    "gptq": (GPTQ, writer.gptq),
    "gptq desc_act": (GPTQ | {"desc_act": True}, partial(writer.gptq, g_idx=False)),
    "awq": (AWQ, writer.awq),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    paths = {name: tmp_path_factory.mktemp("refused") for name in CONFIGS}
    for name, (config, matrix) in CONFIGS.items():
        writer.write_foreign(paths[name], config, matrix)
    return paths


def set_tensor(suffix, change):
    def apply(tensors):
        tensors[GATE + suffix] = change(tensors.get(GATE + suffix))

    return apply


def columns(count):
    return lambda tensor: tensor[:, :count].clone()


def first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


def to(dtype):
    return lambda tensor: tensor.to(dtype)


def give(tensor):
    return lambda _: tensor


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("fp8", set_tensor(".weight", columns(31)), ".weight has shape [48, 31] instead of"),
        ("fp8", set_tensor(".weight", to(torch.float8_e5m2)), ".weight is stored as F8_E5M2"),
        ("fp8", set_tensor(".weight_scale", give(torch.ones(2))), "has shape [2] instead of"),
        ("fp8", set_tensor(".weight_scale", to(torch.int8)), ".weight_scale is stored as int8"),
        ("fp8", lambda t: t.pop(f"{GATE}.weight_scale"), f"{GATE}.weight_scale is missing"),
        ("fp8", lambda t: t.pop(f"{GATE}.weight"), f"{GATE}.weight is missing"),
        ("fp8", set_tensor(".weight_zero_point", give(torch.zeros(1))), "belongs to no weight"),
        ("fp8", set_tensor(".bias", give(torch.zeros(48))), "belongs to no weight"),
        ("packed", set_tensor(".weight_packed", columns(3)), "has shape [48, 3] instead of"),
        ("packed", lambda t: t.pop(f"{GATE}.weight_zero_point"), "zero_point is missing"),
        ("packed", set_tensor(".weight_g_idx", give(torch.zeros(32))), "belongs to no weight"),
        ("gptq", set_tensor(".qweight", columns(40)), ".qweight has shape [4, 40] instead of"),
        ("gptq", set_tensor(".qzeros", to(torch.int16)), ".qzeros is stored as I16 instead of"),
        ("gptq", set_tensor(".scales", columns(40)), ".scales has shape [2, 40] instead of"),
        ("gptq", lambda t: t.pop(f"{GATE}.qzeros"), f"{GATE}.qzeros is missing"),
        ("gptq", set_tensor(".g_idx", first(1)), "has a g_idx other than that of desc_act false"),
        ("gptq", set_tensor(".bias", give(torch.ones(48))), f"{GATE} has a bias"),
        ("gptq", set_tensor(".perm", give(torch.ones(48))), "belongs to no weight"),
        ("gptq desc_act", lambda t: None, f"{GATE}.g_idx is missing"),
        ("awq", set_tensor(".qweight", columns(5)), ".qweight has shape [32, 5] instead of"),
        ("awq", lambda t: t.pop(f"{GATE}.scales"), f"{GATE}.scales is missing"),
        ("awq", set_tensor(".bias", give(torch.zeros(48))), "belongs to no weight"),
        # Another weight quantised, and not all of the matrices.
        ("fp8", lambda t: t.update({"lm_head.weight": t["lm_head.weight"].char()}), "as int8"),
        (
            "gptq",
            lambda t: t.update({"lm_head.qweight": t[f"{GATE}.qweight"] + 1}),
            "lm_head.qweight",
        ),
        ("gptq", lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    ],
)
def test_tensors_that_are_not_the_layouts(checkpoints, tmp_path, name, change, what):
    shutil.copytree(checkpoints[name], tmp_path, dirs_exist_ok=True)
    writer.change_tensors(tmp_path, change)
    assert what in refusal(tmp_path)


@pytest.mark.parametrize("name", ["fp8", "gptq", "awq", "packed"])
def test_a_checkpoint_that_is_quantised_in_part(checkpoints, tmp_path, name):
    """As Meta's own FP8 of 405B, whose attention is in bfloat16."""
    shutil.copytree(checkpoints[name], tmp_path, dirs_exist_ok=True)

    def restore_attention(tensors):
        for key in [key for key in tensors if "self_attn" in key]:
            del tensors[key]
        for layer in range(3):
            for matrix, shape in {
                "q": (64, 32),
                "k": (32, 32),
                "v": (32, 32),
                "o": (32, 64),
            }.items():
                key = f"model.layers.{layer}.self_attn.{matrix}_proj.weight"
                tensors[key] = torch.zeros(shape, dtype=torch.bfloat16)

    writer.change_tensors(tmp_path, restore_attention)
    message = refusal(tmp_path)
    assert "is quantised in part" in message
    assert "model.layers.0.self_attn.q_proj.weight and 11 more" in message


@pytest.mark.parametrize("name", ["fp8", "gptq", "awq", "packed"])
def test_a_config_that_keeps_silent(checkpoints, tmp_path, name):
    shutil.copytree(checkpoints[name], tmp_path, dirs_exist_ok=True)
    writer.change_config(tmp_path, quantization_config=None)
    assert "so it is quantised, but its config.json has no quantization_config" in refusal(tmp_path)


def test_a_config_of_another_layout(checkpoints, tmp_path):
    """The words of GPTQ and of AWQ have the same names, and other shapes."""
    shutil.copytree(checkpoints["gptq"], tmp_path, dirs_exist_ok=True)
    writer.change_config(tmp_path, quantization_config=AWQ)
    assert f"{GATE}.qweight has shape [4, 48] instead of [32, 6]" in refusal(tmp_path)


def test_a_zero_point_that_tools_read_differently(checkpoints, tmp_path):
    """A nibble of 15 in the first version of GPTQ; other slices of the tensor can be read."""
    shutil.copytree(checkpoints["gptq"], tmp_path, dirs_exist_ok=True)
    writer.change_tensors(tmp_path, set_tensor(".qzeros", first(0xF0)))
    reader = open_checkpoint(tmp_path)
    name = f"{GATE}.weight_zero"
    with pytest.raises(CheckpointError, match="which tools read as 0 or as 16") as caught:
        read(reader, name)
    message = one_sentence(caught)
    assert name in message and str(tmp_path) in message
    assert (read(reader, name, (slice(2, 8), slice(0, 1))) == 1).all()
