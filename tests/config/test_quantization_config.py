"""Settings of quantization: what tools write opens, and nothing breaks the parser."""

import copy
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config import ConfigError, Quantization
from llama_jax.config.huggingface import read_checkpoint_config
from llama_jax.config.huggingface_quantization import (
    PLAIN,
    StoredQuantization,
    parse_quantization,
)
from tests.support.foreign_writer import (
    AUTO_ROUND,
    AWQ,
    FBGEMM,
    GPTQ,
    GPTQ_V2,
    MODELOPT,
    compressed_tensors,
    packed_config,
)

DATA = Path(__file__).parents[1] / "data" / "quantized"
FP8 = compressed_tensors("float-quantized")
AUTO_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "ignored_layers": ["lm_head"],
    "kv_cache_scheme": "static",
}
FINEGRAINED = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "dequantize": False,
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
OWN = {
    "quant_method": "llama_jax",
    "format": "int4",
    "group_size": 32,
    "plain": ["model.layers.0.mlp.up_proj"],
}
CONFIGS = [AUTO_FP8, AUTO_ROUND, AWQ, FBGEMM, FINEGRAINED, FP8, GPTQ, GPTQ_V2, MODELOPT, OWN]
CONFIGS += [packed_config(), packed_config(num_bits=8, actorder="static")]
CONFIGS += [
    json.loads(file.read_text())["quantization_config"]
    for file in sorted(DATA.glob("*/config.json"))
]


def parse(config) -> StoredQuantization:
    stored = parse_quantization({"quantization_config": config})
    assert stored is not None
    return stored


@pytest.mark.parametrize("config", CONFIGS)
def test_what_tools_write_is_known(config):
    assert parse(config).unknown == ()


@pytest.mark.parametrize("config", [config for config in CONFIGS if config is not OWN])
def test_a_key_that_nobody_knows_is_named(config):
    stored = parse(config | {"twist": 1, "turn": None})
    assert stored.unknown == ("quantization_config.twist",)
    assert stored._replace(unknown=()) == parse(config)


def test_unknown_keys_are_reported_with_those_of_the_config(tmp_path):
    config = json.loads((DATA / "gptqmodel_awq" / "config.json").read_text())
    config["quantization_config"]["twist"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    declared = read_checkpoint_config(tmp_path)
    assert declared.unknown["config.json"] == ("quantization_config.twist",)
    with pytest.raises(ConfigError, match="twist"):
        declared.report_unknown(strict=True)


def test_the_name_of_old_versions_of_compressed_tensors():
    stored = parse_quantization({"compression_config": FP8 | {"twist": 1}})
    assert stored.unknown == ("compression_config.twist",)
    assert stored._replace(unknown=()) == parse(FP8)


def test_unknown_keys_inside_groups_are_named():
    config = copy.deepcopy(FP8)
    config["config_groups"]["group_0"]["twist"] = 1
    config["config_groups"]["group_0"]["weights"]["turn"] = 2
    assert parse(config).unknown == (
        "quantization_config.config_groups.group_0.twist",
        "quantization_config.config_groups.group_0.weights.turn",
    )


@pytest.mark.parametrize("plain", [["model.layers.0.mlp.up_proj"], "mlp", (1,)])
def test_plain_modules_are_a_tuple_of_names(plain):
    with pytest.raises(ConfigError, match="plain must be a tuple"):
        Quantization(format="fp8", plain=plain)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", ["int4"]),
        ("group_size", 3),
        ("group_size", 0),
        ("group_size", True),
        ("group_size", 16.0),
    ],
)
def test_what_no_matrix_can_have_is_refused(field, value):
    with pytest.raises(ConfigError, match=re.escape(str(value))):
        Quantization(**{"format": "int4", field: value})


@pytest.mark.parametrize("groups", [{}, None, {"g": {"weights": None, "input_activations": {}}}])
def test_a_quantization_of_no_weights_is_plain(groups):
    """As llm-compressor writes it if only the KV cache is quantized."""
    stored = parse(FP8 | {"config_groups": groups})
    assert (stored.layers.layout, stored.quantization) == (PLAIN, None)


def test_modelopt_of_the_kv_cache_only():
    stored = parse(MODELOPT | {"quant_algo": None, "kv_cache_quant_algo": "FP8"})
    assert (stored.layers.layout, stored.quantization) == (PLAIN, None)


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (GPTQ | {"lm_head": True, "dynamic": {"+:^lm_head$": {"bits": 8}}}, "int8_grouped"),
        (AUTO_ROUND | {"extra_config": {"lm_head": {"bits": 8, "group_size": 32}}}, "int8_grouped"),
        (
            FP8
            | {
                "config_groups": {
                    **FP8["config_groups"],
                    "group_1": {
                        **packed_config()["config_groups"]["group_0"],
                        "format": "pack-quantized",
                        "targets": ["re:.*lm_head"],
                    },
                }
            },
            "int4",
        ),
    ],
)
def test_a_head_of_another_format(config, head):
    stored = parse(config)
    assert stored.head is not None
    assert stored.head.quantization.format == head != stored.quantization.format


def test_modules_that_are_skipped():
    skipped = {"dynamic": {"-:.*down_proj": {}, "+:.*up_proj": {"bits": 4, "mse": 2.4}}}
    assert parse(GPTQ | skipped) == parse(GPTQ)
    plain = {"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 16, "data_type": "float"}}}
    assert parse(AUTO_ROUND | plain) == parse(AUTO_ROUND)


def test_the_names_of_old_versions():
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}
    assert parse(old).quantization == Quantization(format="int4", group_size=64)


@pytest.mark.parametrize("name", ["group", "dynamic", True])
def test_the_names_of_act_order(name):
    assert parse(packed_config(actorder=name)).layers.layout == "packed4_ordered"


@pytest.mark.parametrize(
    ("group_size", "strategy"), [(None, "tensor"), (-1, "channel"), (16, "group")]
)
def test_the_strategy_follows_from_the_size_of_groups(group_size, strategy):
    """As in quant_args.py of compressed-tensors."""
    given = {"type": "int", "group_size": group_size}
    expected = parse(compressed_tensors("int-quantized", strategy=strategy, **given))
    assert parse(compressed_tensors("int-quantized", strategy=None, **given)) == expected


@pytest.mark.parametrize("targets", [["Linear", "re:.*lm_head"], [], None])
def test_a_format_that_is_not_of_the_head_alone_is_that_of_the_layers(targets):
    config = copy.deepcopy(FP8)
    config["config_groups"]["group_0"]["targets"] = targets
    assert parse(config) == parse(FP8)


def test_what_compressed_tensors_leaves_out():
    """As in quant_args.py of compressed-tensors."""
    whole = compressed_tensors("int-quantized", type="int")
    assert parse(compressed_tensors("int-quantized", type=None, num_bits=None)) == parse(whole)
    assert parse(compressed_tensors("int-quantized", type="int", symmetric=None)) == parse(whole)


def test_packed_rows_of_8_bits_may_have_zero_points():
    rows = packed_config(num_bits=8, strategy="channel", group_size=None, symmetric=False)
    assert parse(rows).layers.layout == "packed8_asymmetric"


def test_blocks_as_old_versions_write_them():
    old, new = (
        compressed_tensors("float-quantized", strategy="block", block_structure=blocks)
        for blocks in ("128x64", [128, 64])
    )
    assert parse(old) == parse(new)


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({}, "gptq4"),
        ({"desc_act": None}, "gptq4"),
        ({"format": "gptq_v2"}, "gptq4_v2"),
        ({"format": "gptq", "checkpoint_format": "gptq_v2"}, "gptq4_v2"),
    ],
)
def test_versions_of_gptq(settings, layout):
    assert parse(GPTQ | settings).layers.layout == layout


@pytest.mark.parametrize(
    ("packing", "layout"),
    [
        (None, "gptq4"),
        ("auto_round:auto_gptq", "gptq4"),
        ("auto_round", "gptq4_v2"),
        ("auto_round:gptqmodel", "gptq4_v2"),
        ("auto_round:exllamav2", "gptq4_v2"),
        ("auto_round:auto_awq", "awq"),
    ],
)
def test_packing_formats_of_auto_round(packing, layout):
    assert parse(AUTO_ROUND | {"packing_format": packing}).layers.layout == layout


def test_settings_that_are_off_in_another_way():
    off = {"adapter": [], "is_marlin_format": None, "rotation": False, "rotation_config": ""}
    assert parse(GPTQ | off) == parse(GPTQ)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, path=()):
    """The paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_mutated_config_is_parsed_or_refused(data):
    """Whatever a value is replaced by, the outcome is a result or a ConfigError."""
    config = copy.deepcopy(data.draw(st.sampled_from(CONFIGS)))
    for _ in range(data.draw(st.integers(1, 3))):
        found = list(places(config))
        if not found:
            break
        *outer, key = data.draw(st.sampled_from(found))
        inside = config
        for step in outer:
            inside = inside[step]
        donor = data.draw(st.sampled_from(CONFIGS))
        inside[key] = copy.deepcopy(data.draw(JUNK | st.sampled_from(list(donor.values()))))
    try:
        stored = parse_quantization({"quantization_config": config})
    except ConfigError as error:
        assert len(str(error)) < 2000
    else:
        assert stored is None or isinstance(stored, StoredQuantization)
        hash(stored)
