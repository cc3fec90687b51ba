"""Quantized checkpoints that cannot be translated exactly are rejected with a reason."""

import shutil
from functools import partial

import pytest
import torch

from llama_jax.checkpoint import CheckpointError, open_checkpoint
from llama_jax.config import ConfigError, LlamaConfig
from tests.support import foreign_writer as writer
from tests.support.conversions import refusal
from tests.support.foreign_writer import (
    AUTO_ROUND,
    AWQ,
    GPTQ,
    MODELOPT,
    compressed_tensors,
    packed_config,
)
from tests.support.tiny_checkpoint import read, write_checkpoint

FP8 = compressed_tensors("float-quantized")
GATE = "model.layers.1.mlp.gate_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    write_checkpoint(path)
    return path


def group_of(config, **changes):
    return config | {"config_groups": {"group_0": config["config_groups"]["group_0"] | changes}}


WITHOUT_METHOD = {key: value for key, value in GPTQ.items() if key != "quant_method"}
TWO_GROUPS = FP8["config_groups"] | {
    "group_1": {"format": "pack-quantized", **packed_config()["config_groups"]["group_0"]}
}
KEYS_OF_TOOLS = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "mxfp4": {"modules_to_not_convert": ["lm_head"]},
}
MORE_TOOLS = "hqq aqlm eetq quanto torchao exl2 gguf bitnet higgs vptq quark".split()


@pytest.mark.parametrize("method", [*KEYS_OF_TOOLS, *MORE_TOOLS])
def test_other_tools(plain, tmp_path, method):
    config = {"quant_method": method, **KEYS_OF_TOOLS.get(method, {})}
    assert method in refuse_config(plain, tmp_path, config)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        # Known methods in a form that is not supported.
        (GPTQ | {"bits": 3}, "3-bit GPTQ"),
        (GPTQ | {"bits": None}, "GPTQ"),
        (GPTQ | {"bits": 4.0}, "4.0-bit GPTQ"),
        (GPTQ | {"group_size": -2}, "group_size"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format"),
        (GPTQ | {"dynamic": {"+:.*down_proj": {"bits": 8}}}, "bits"),
        (GPTQ | {"dynamic": {".*down_proj": {"group_size": 32}}}, "group_size"),
        (GPTQ | {"adapter": {"rank": 8}}, "adapter"),
        (GPTQ | {"rotation": "hadamard"}, "rotation"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype"),
        (AWQ | {"version": "gemv"}, "gemv"),
        (AWQ | {"version": "gemv_fast"}, "gemv_fast"),
        (AWQ | {"bits": 8}, "8-bit AWQ"),
        (AUTO_ROUND | {"packing_format": "auto_round:fp8"}, "auto_round:fp8"),
        (AUTO_ROUND | {"packing_format": "auto_round:fp8_static"}, "auto_round:fp8_static"),
        (AUTO_ROUND | {"data_type": "mx_fp"}, "mx_fp"),
        (AUTO_ROUND | {"data_type": "mx_fp", "packing_format": "auto_round:auto_awq"}, "mx_fp"),
        (AUTO_ROUND | {"extra_config": {"model.layers.0.mlp": {"bits": 8}}}, "layers.0.mlp"),
        (AUTO_ROUND | {"extra_config": {"lm_head": {"bits": 2}}}, "2 bits"),
        (AWQ | {"desc_act": True}, "desc_act"),
        (MODELOPT | {"quant_algo": "NVFP4"}, "NVFP4"),
        (MODELOPT | {"quant_algo": "FP8_PB_WO"}, "FP8_PB_WO"),
        (FP8 | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        (FP8 | {"format": None}, "compressed-tensors"),
        (FP8 | {"config_groups": TWO_GROUPS}, "compressed-tensors"),
        (group_of(FP8, format="int-quantized"), "int-quantized"),
        (FP8 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (FP8 | {"transform_config": {"config_groups": {"v": {}}}}, "transform_config"),
        (compressed_tensors("float-quantized", strategy="block"), "blocks"),
        (compressed_tensors("float-quantized", symmetric=False), "symmetric"),
        (compressed_tensors("float-quantized", symmetric="yes"), "symmetric"),
        (compressed_tensors("dense"), "dense"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "blocks"),
        ({"quant_method": "fp8", "weight_block_size": [128, True]}, "blocks"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128, 128]}, "blocks"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        (compressed_tensors("float-quantized", dynamic=True), "dynamic"),
        (
            compressed_tensors("int-quantized", type="int", symmetric=False, strategy="tensor"),
            "symmetric",
        ),
        (compressed_tensors("int-quantized"), "type"),
        (packed_config(num_bits=6), "num_bits"),
        (packed_config(strategy="tensor"), "strategy"),
        (
            compressed_tensors(
                "int-quantized", type="int", strategy="group", group_size=16, actorder="group"
            ),
            "actorder",
        ),
        # Malformed descriptions.
        (WITHOUT_METHOD, "config.json"),
        ("gptq", "quantization_config"),
        ({"quant_method": ["gptq"]}, "gptq"),
        (FP8 | {"config_groups": [1]}, "config_groups"),
        (FP8 | {"config_groups": {"group_0": 1}}, "config.json"),
        (group_of(FP8, weights="int8"), "weights"),
        (GPTQ | {"group_size": "128"}, "group_size"),
        (GPTQ | {"group_size": None}, "group_size"),
        ({"quant_method": "llama_jax"}, "format"),
        ({"quant_method": "llama_jax", "format": "int8", "x": 1}, "x"),
        ({"quant_method": "llama_jax", "format": "int7"}, "int7"),
        ({"quant_method": "llama_jax", "format": "int8", "plain": "mlp"}, "plain"),
    ],
)
def test_other_forms(plain, tmp_path, config, what):
    assert what in refuse_config(plain, tmp_path, config)


def refuse_config(plain, path, config) -> str:
    shutil.copytree(plain, path, dirs_exist_ok=True)
    writer.change_config(path, quantization_config=config)
    message = refusal(open_checkpoint, path)
    assert str(path / "config.json") in message
    with pytest.raises(ConfigError) as caught:
        LlamaConfig.from_pretrained(path)
    assert str(caught.value) == message
    return message


@pytest.mark.parametrize("content", ["{}", '{"quantization": 8}', "[]", "{"])
def test_a_malformed_hf_quant_config(plain, tmp_path, content):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "hf_quant_config.json").write_text(content)
    assert str(tmp_path / "hf_quant_config.json") in refusal(open_checkpoint, tmp_path)


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
        ("fp8", set_tensor(".weight", columns(31)), ".weight has shape [48, 31]"),
        ("fp8", set_tensor(".weight", to(torch.float8_e5m2)), ".weight is stored as F8_E5M2"),
        ("fp8", set_tensor(".weight_scale", give(torch.ones(2))), ".weight_scale has shape [2]"),
        ("fp8", set_tensor(".weight_scale", to(torch.int8)), ".weight_scale is stored as int8"),
        ("fp8", lambda t: t.pop(f"{GATE}.weight_scale"), f"{GATE}.weight_scale"),
        ("fp8", lambda t: t.pop(f"{GATE}.weight"), f"{GATE}.weight"),
        (
            "fp8",
            set_tensor(".weight_zero_point", give(torch.zeros(1))),
            f"{GATE}.weight_zero_point",
        ),
        ("fp8", set_tensor(".bias", give(torch.ones(48))), f"{GATE}.bias"),
        ("packed", set_tensor(".weight_packed", columns(3)), ".weight_packed has shape [48, 3]"),
        ("packed", lambda t: t.pop(f"{GATE}.weight_zero_point"), f"{GATE}.weight_zero_point"),
        ("packed", set_tensor(".weight_g_idx", give(torch.zeros(32))), f"{GATE}.weight_g_idx"),
        ("gptq", set_tensor(".qweight", columns(40)), ".qweight has shape [4, 40]"),
        ("gptq", set_tensor(".qzeros", to(torch.int16)), ".qzeros is stored as I16"),
        ("gptq", set_tensor(".scales", columns(40)), ".scales has shape [2, 40]"),
        ("gptq", lambda t: t.pop(f"{GATE}.qzeros"), f"{GATE}.qzeros"),
        ("gptq", set_tensor(".g_idx", first(2)), "g_idx"),
        ("gptq", set_tensor(".g_idx", first(-1)), "g_idx"),
        ("gptq", set_tensor(".g_idx", first(1)), "g_idx"),  # a group of 17 columns
        ("gptq", set_tensor(".bias", give(torch.ones(48))), " bias"),
        ("gptq", set_tensor(".perm", give(torch.ones(48))), f"{GATE}.perm"),
        ("gptq desc_act", lambda t: None, "q_proj.g_idx"),
        ("awq", set_tensor(".qweight", columns(5)), ".qweight has shape [32, 5]"),
        ("awq", lambda t: t.pop(f"{GATE}.scales"), f"{GATE}.scales"),
        ("awq", set_tensor(".bias", give(torch.ones(48))), f"{GATE}.bias"),
        # Other weights than the matrices of the layers are quantized.
        (
            "fp8",
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].char()}),
            "lm_head.weight",
        ),
        (
            "gptq",
            lambda t: t.update({"lm_head.qweight": t[f"{GATE}.qweight"] + 1}),
            "lm_head.qweight",
        ),
        ("gptq", lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
    ],
)
def test_tensors_that_do_not_match_the_layout(checkpoints, tmp_path, name, change, what):
    shutil.copytree(checkpoints[name], tmp_path, dirs_exist_ok=True)
    writer.change_tensors(tmp_path, change)
    assert what in refusal(open_checkpoint, tmp_path)


@pytest.mark.parametrize("name", ["fp8", "gptq", "awq", "packed"])
def test_a_config_without_quantization_config(checkpoints, tmp_path, name):
    shutil.copytree(checkpoints[name], tmp_path, dirs_exist_ok=True)
    writer.change_config(tmp_path, quantization_config=None)
    assert "quantization_config" in refusal(open_checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        (".weight._data", ".weight._scale"),  # of quanto, which writes no quantization_config
        (".weight", ".weight_scale_inv"),
        (".weight", ".weight.absmax"),
        (".weight", ".SCB"),
    ],
)
def test_a_quantized_model_with_the_config_of_the_original(plain, tmp_path, values, scale):
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)

    def change(tensors):
        tensors[GATE + values] = tensors.pop(f"{GATE}.weight").char()
        tensors[GATE + scale] = torch.ones(48, 1)

    writer.change_tensors(tmp_path, change)
    message = refusal(open_checkpoint, tmp_path)
    shown = values if values != ".weight" else scale
    assert GATE + shown in message and "so it is quantized" in message


def test_a_config_of_another_layout(checkpoints, tmp_path):
    """The tensors of GPTQ and AWQ have the same names but other shapes."""
    shutil.copytree(checkpoints["gptq"], tmp_path, dirs_exist_ok=True)
    writer.change_config(tmp_path, quantization_config=AWQ)
    assert "q_proj.qweight has shape [4, 64]" in refusal(open_checkpoint, tmp_path)


def test_a_zero_point_that_tools_read_differently(checkpoints, tmp_path):
    """A stored 15 in version 1 of GPTQ; other slices of the tensor can be read."""
    shutil.copytree(checkpoints["gptq"], tmp_path, dirs_exist_ok=True)
    writer.change_tensors(tmp_path, set_tensor(".qzeros", first(0xF0)))
    reader = open_checkpoint(tmp_path)
    name = f"{GATE}.weight_zero"
    with pytest.raises(CheckpointError, match="gptq_v2") as caught:
        read(reader, name)
    assert name in str(caught.value) and str(tmp_path) in str(caught.value)
    assert (read(reader, name, (slice(2, 8), slice(0, 1))) == 1).all()
