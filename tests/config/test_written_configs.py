"""Files as transformers and the tools around it write them open without a warning.

`written_by_transformers.json` holds what eight versions of transformers, 4.31 to 5.0, wrote for the
same model and sampling parameters: whole (`to_dict()`) and as files (`to_json_string()`).
"""

import copy
import json
import logging
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from llama_jax.config import (
    ConfigError,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LlamaConfig,
    YarnScaling,
)
from llama_jax.config.huggingface import parse_config, read_checkpoint_config
from llama_jax.config.huggingface_generation import parse_generation_config
from llama_jax.config.huggingface_keys import unknown_generation_keys
from llama_jax.model.rope import inverse_frequencies

WRITTEN = json.loads((Path(__file__).parent / "written_by_transformers.json").read_text())
FILES = [(version, kind) for version, contents in WRITTEN.items() for kind in contents]
MODEL = LlamaConfig(
    vocab_size=128256,
    embed_dim=2048,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    mlp_dim=8192,
    rope_theta=500000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
    max_position_embeddings=8192,
    dtype="bfloat16",
    eos_token_ids=(128009,),
)
SCALINGS = {
    "linear": LinearScaling(factor=4.0),
    "dynamic": DynamicScaling(factor=4.0),
    "llama3": Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=2048
    ),
    "yarn": YarnScaling(
        factor=4.0,
        original_max_position_embeddings=2048,
        beta_fast=16.0,
        attention_factor=1.138629436111989,  # 0.1 ln 4 + 1
    ),
}
FILE = WRITTEN["4.57.1"]["config file"]


@pytest.mark.parametrize(
    ("version", "kind"), [file for file in FILES if file[1].startswith("config")]
)
def test_every_version_writes_the_same_model(version, kind):
    config, quantization, unknown = parse_config(WRITTEN[version][kind], {})
    assert config.rope_scaling == SCALINGS.get(kind.partition(", ")[2])
    assert config.to_dict() | {"rope_scaling": None} == MODEL.to_dict()
    assert (quantization, unknown) == (None, ())


@pytest.mark.parametrize(
    ("version", "kind"), [file for file in FILES if file[1].startswith("generation")]
)
def test_every_version_writes_the_same_sampling(version, kind):
    content = WRITTEN[version][kind]
    params = parse_generation_config(content, Path("generation_config.json"))
    assert (params.temperature, params.top_p) == (0.6, 0.9)
    assert unknown_generation_keys(content) == []


SETTINGS = {
    "defaults": {},
    "tied": {"tie_word_embeddings": True, "eos_token_id": [1, 2], "pad_token_id": 0},
    "heads": {"head_dim": 96, "num_attention_heads": 32, "num_key_value_heads": 4},
    "dtype": {"dtype": "bfloat16"},
    "bookkeeping": {"name_or_path": "a/b", "output_attentions": True, "use_cache": False},
    "labels": {"num_labels": 5, "problem_type": "regression"},
    "old rope": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "new rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 5e5,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        }
    },
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("whole", [False, True], ids=["save_pretrained", "to_dict"])
def test_what_this_version_writes_opens(tmp_path, name, whole):
    theirs = transformers.LlamaConfig(**copy.deepcopy(SETTINGS[name]))
    if whole:
        (tmp_path / "config.json").write_text(json.dumps(theirs.to_dict(), default=str))
    else:
        theirs.save_pretrained(tmp_path)
    transformers.GenerationConfig(do_sample=True, top_k=40).save_pretrained(tmp_path)
    declared = read_checkpoint_config(tmp_path)
    ours = declared.config
    assert not any(declared.unknown.values())
    assert declared.generation_defaults().top_k == 40
    assert (ours.embed_dim, ours.head_dim) == (theirs.hidden_size, theirs.head_dim)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_every_field_of_transformers_classes_is_known():
    generation = transformers.GenerationConfig()
    assert unknown_generation_keys(dict.fromkeys(generation.to_dict(), "set")) == []
    known = {**WRITTEN["4.57.1"]["config whole"], **transformers.LlamaConfig().to_dict()}
    assert known.keys() >= FILE.keys()


@pytest.mark.parametrize(
    "keys",
    [
        dict.fromkeys(GGUF_CONFIG_MAPPING["general"].values(), "llama"),
        {"unk_token_id": 0, "_model_name_or_path": "Llama 3", "tokenizer_class": "LlamaTokenizer"},
        {"auto_map": {"AutoConfig": "configuration_llama.LlamaConfig"}},
        {"torch_dtype": "torch.bfloat16", "dtype": None},
        {"torch_dtype": "float32", "dtype": "bfloat16"},
        {"unsloth_version": "2025.1.1", "unsloth_fixed": True},
        {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}},
        {"sliding_window": None, "layer_types": ["full_attention"] * 16},
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
        {"architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048},
        {"architectures": [], "hidden_act": "silu", "_flash_attn_2_enabled": False},
        {"num_local_experts": 0, "logit_scale": 1, "qk_norm": False, "pruned_heads": {}},
        {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 500000}},
        {"rope_scaling": {}, "rope_parameters": None},
    ],
    ids=lambda keys: ",".join(keys),
)
def test_what_other_tools_write_opens(keys):
    parsed = parse_config(FILE | keys, {})
    assert parsed.config == MODEL
    assert parsed.unknown == ()


def test_a_config_that_went_through_gguf_opens():
    """As transformers 5.24.0 saves it after AutoConfig.from_pretrained(..., gguf_file=...)."""
    content = {
        "_model_name_or_path": "Llama 3 tiny",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 9.999999747378752e-06,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "transformers_version": "5.24.0",
        "unk_token_id": 0,
        "use_cache": True,
        "vocab_size": 4,
    }
    config, _, unknown = parse_config(content, {})
    assert (config.head_dim, config.rope_theta, config.norm_eps) == (8, 5e5, 9.999999747378752e-06)
    assert unknown == ()


def test_without_rope_theta_it_is_that_of_transformers():
    older = {key: value for key, value in FILE.items() if key != "rope_theta"}
    theirs = transformers.LlamaConfig(**copy.deepcopy(older))
    assert LlamaConfig.from_dict(older).rope_theta == theirs.rope_parameters["rope_theta"]


# Unknown keys: one warning or an error


@pytest.fixture
def unknown_at(tmp_path):
    def write(config: dict, generation: dict) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(FILE | config))
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tmp_path

    return write


def test_unknown_keys_are_one_warning(unknown_at, caplog):
    rope = {"type": "linear", "factor": 2.0, "spin": 1, "low_freq_factor": 4.0}
    path = unknown_at(
        {"zeta": 1, "eta": 0, "absent": None, "rope_scaling": rope}, {"theta": [], "nothing": None}
    )
    for _ in range(2):
        LlamaConfig.from_pretrained(path)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    names = ("zeta", "eta", "rope_scaling.spin", "rope_scaling.low_freq_factor", "theta")
    assert all(name in record.getMessage() for name in (*names, str(path)))
    assert "absent" not in record.getMessage() and "nothing" not in record.getMessage()


def test_unknown_rotary_parameters_are_named_where_they_stand():
    parsed = parse_config(FILE | {"rope_parameters": {"spin": 1}}, {})
    assert (parsed.config, parsed.unknown) == (MODEL, ("rope_parameters.spin",))
    known = {"original_max_position_embeddings": 2048, "finetuned": True}
    rope = {"type": "linear", "factor": 4.0, "spin": 1, **known}
    parsed = parse_config(FILE | {"rope_scaling": rope}, {})
    assert parsed.config.rope_scaling == SCALINGS["linear"]
    assert parsed.unknown == ("rope_scaling.spin",)


def test_unknown_keys_of_the_quantization_are_named(unknown_at):
    quantization = {"quant_method": "fbgemm_fp8", "surprise": 1}
    declared = read_checkpoint_config(unknown_at({"quantization_config": quantization}, {}))
    assert declared.unknown["config.json"] == ("quantization_config.surprise",)


def test_strictly_unknown_keys_are_an_error(unknown_at):
    declared = read_checkpoint_config(unknown_at({}, {"theta": 1}))
    with pytest.raises(ConfigError, match="theta"):
        declared.report_unknown(strict=True)
    read_checkpoint_config(unknown_at({}, {})).report_unknown(strict=True)


def test_many_unknown_keys_are_a_few_names_and_a_count(unknown_at, caplog):
    LlamaConfig.from_pretrained(unknown_at({f"{'k' * 200}{n:03}": n for n in range(500)}, {}))
    [record] = caplog.records
    assert "498" in record.getMessage()
    assert len(record.getMessage()) < 1500


@pytest.mark.parametrize("code", [{"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}, 1])
def test_code_of_a_model_is_warned_of(unknown_at, code):
    assert read_checkpoint_config(unknown_at({"auto_map": code}, {})).unknown["config.json"] == (
        "auto_map",
    )


# Mutated files: a config or a ConfigError, never another exception

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**400, max_value=10**401)
    | st.floats()
    | st.sampled_from(["", "llama3", "yarn", "linear", "dynamic", "default", "torch.float16", "é"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
ROPE_KEYS = (
    "rope_type type rope_theta factor original_max_position_embeddings attention_factor beta_fast "
    "beta_slow mscale mscale_all_dim truncate low_freq_factor high_freq_factor alpha finetuned"
).split()
NUMBERS = st.floats() | st.sampled_from([1, 2.0, 4, 32, 8192, 1e308, 5e-324])
ROPES = st.dictionaries(st.sampled_from(ROPE_KEYS), NUMBERS | JSON) | st.builds(
    lambda kind, rest: {"rope_type": kind, "factor": 8.0} | rest,
    st.sampled_from(["linear", "dynamic", "llama3", "yarn"]),
    st.dictionaries(st.sampled_from(ROPE_KEYS[2:]), NUMBERS),
)
CONFIGS = st.dictionaries(
    st.sampled_from([*FILE, "auto_map", "layer_types", "sliding_window", "new"]), JSON, max_size=2
)


@settings(deadline=None, max_examples=100)
@given(CONFIGS, st.none() | ROPES, st.none() | ROPES)
def test_a_mutated_config_is_read_or_refused(changes, scaling, parameters):
    content = FILE | changes | {"rope_scaling": scaling, "rope_parameters": parameters}
    try:
        config = LlamaConfig.from_dict(content)
    except ConfigError as error:
        assert 0 < len(str(error)) < 2000
        return
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.max_context >= 1
    if config.head_dim < 10**4:
        assert inverse_frequencies(config).shape == (config.head_dim // 2,)


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(sorted(WRITTEN["4.57.1"]["generation whole"])), JSON, max_size=8
    )
)
def test_a_mutated_generation_config_is_read_or_refused(changes):
    content = {"do_sample": True, **changes}
    try:
        parse_generation_config(content, Path("generation_config.json")).check()
    except ConfigError as error:
        assert 0 < len(str(error)) < 2000
    unknown_generation_keys(content)
