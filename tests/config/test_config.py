"""The configuration: read from a checkpoint, given by a preset, or refused."""

import copy
import dataclasses
import json
import math
import re

import pytest
import torch
import transformers

from demo.tokenizer import EOT
from llama_jax.config import ConfigError, Llama3Scaling, LlamaConfig
from llama_jax.weights.table import checkpoint_tensors
from tests.support.tokenizer_kinds import write_tokenizer

# As published with the checkpoints, with the bookkeeping keys, which must be accepted.
LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_3_8B = LLAMA_3_70B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
EXTENDED = {
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
LLAMA_3_1_8B = LLAMA_3_8B | EXTENDED
LLAMA_3_1_70B = LLAMA_3_70B | EXTENDED
LLAMA_3_1_405B = LLAMA_3_1_70B | {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
}
LLAMA_3_2_1B = LLAMA_3_1_8B | {
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "rope_scaling": EXTENDED["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}
LLAMA_3_2_3B = LLAMA_3_2_1B | {
    "head_dim": 128,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "num_hidden_layers": 28,
}
STOPS = {"eos_token_id": [128001, 128009]}

# Each preset's published config.json and generation_config.json, and the number of parameters that
# its safetensors files declare.
PRESETS = {
    "llama3_8b": (LLAMA_3_8B, STOPS, 8_030_261_248),
    "llama3_70b": (LLAMA_3_70B, STOPS, 70_553_706_496),
    "llama3_1_8b": (LLAMA_3_1_8B, {}, 8_030_261_248),
    "llama3_1_70b": (LLAMA_3_1_70B, {}, 70_553_706_496),
    "llama3_1_405b": (LLAMA_3_1_405B, {}, 405_853_388_800),
    "llama3_2_1b": (LLAMA_3_2_1B, {}, 1_235_814_400),
    "llama3_2_3b": (LLAMA_3_2_3B, {}, 3_212_749_824),
    "llama3_3_70b": (LLAMA_3_1_70B, {}, 70_553_706_496),
}


def preset(name) -> LlamaConfig:
    return getattr(LlamaConfig, name)()


def by_transformers(published) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**copy.deepcopy(published))  # it writes to what it is given


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_published_config(name):
    published, generation_config, _ = PRESETS[name]
    assert preset(name) == LlamaConfig.from_dict(published, generation_config)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_number_of_parameters(name):
    tensors = checkpoint_tensors(preset(name)).values()
    assert sum(math.prod(tensor.shape) for tensor in tensors) == PRESETS[name][2]


@pytest.mark.parametrize("name", PRESETS)
def test_names_and_shapes_are_those_of_transformers(name):
    config = by_transformers(PRESETS[name][0])
    with torch.device("meta"):
        weights = transformers.LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    shapes = {name: tensor.shape for name, tensor in checkpoint_tensors(preset(name)).items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in weights.items()}


def test_every_preset_is_here():
    classmethods = {name for name in vars(LlamaConfig) if name.startswith("llama3")}
    assert classmethods == set(PRESETS)


SCALINGS = [
    {"rope_type": "default"},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "llama3",
        "factor": 3.5,
        "low_freq_factor": 1.5,
        "high_freq_factor": 9.0,
        "original_max_position_embeddings": 100,
    },
]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
ENDLESS = {"factor": 1e300, "mscale": 1e308, "mscale_all_dim": 1.0}  # larger than any float


@pytest.mark.parametrize("scaling", SCALINGS)
def test_both_spellings_of_rope_parameters_mean_the_same(scaling):
    old = LLAMA_3_8B | {"rope_theta": 12345.0, "rope_scaling": scaling}
    new = LLAMA_3_8B | {"rope_parameters": scaling | {"rope_theta": 12345.0}}
    del new["rope_theta"], new["rope_scaling"]
    older = old | {"rope_scaling": dict(scaling)}
    older["rope_scaling"]["type"] = older["rope_scaling"].pop("rope_type")
    config = LlamaConfig.from_dict(old)
    assert config == LlamaConfig.from_dict(new) == LlamaConfig.from_dict(older)
    assert config.rope_theta == 12345.0
    assert (config.rope_scaling is None) == (scaling["rope_type"] == "default")
    if config.rope_scaling:
        assert dataclasses.asdict(config.rope_scaling) | {"rope_type": "llama3"} == scaling


@pytest.mark.parametrize("published", [LLAMA_3_8B, LLAMA_3_2_1B], ids=["plain", "scaled"])
def test_reads_what_transformers_writes(tmp_path, published):
    by_transformers(published).save_pretrained(tmp_path)
    assert LlamaConfig.from_pretrained(tmp_path) == LlamaConfig.from_dict(published)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_its_json(name):
    config = preset(name)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_transformers_reads_what_we_write():
    config = dataclasses.replace(preset("llama3_2_1b"), rope_theta=12345.0, norm_eps=3e-6)
    theirs = by_transformers(config.to_dict())
    assert LlamaConfig.from_dict(theirs.to_dict()) == config


def test_defaults_are_those_of_transformers():
    published = {k: v for k, v in LLAMA_3_8B.items() if k != "num_key_value_heads"}
    del published["tie_word_embeddings"], published["torch_dtype"], published["attention_bias"]
    config = LlamaConfig.from_dict(published | {"head_dim": None})
    theirs = by_transformers(published)
    assert config.num_kv_heads == theirs.num_key_value_heads == 32
    assert config.head_dim == theirs.head_dim == 128
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.dtype == "float32"
    assert LlamaConfig.from_dict(published | {"torch_dtype": "auto"}).dtype == "float32"


def test_head_dim_may_be_given():
    config = LlamaConfig.from_dict(LLAMA_3_8B | {"hidden_size": 4100, "head_dim": 96})
    assert (config.embed_dim, config.num_heads, config.head_dim) == (4100, 32, 96)


@pytest.mark.parametrize(
    ("config", "generation_config", "ids"),
    [
        (7, None, (7,)),
        ([7, 8], {}, (7, 8)),
        (7, {"eos_token_id": None}, (7,)),
        (7, {"eos_token_id": 9}, (9, 7)),
        (7, {"eos_token_id": [0, 7, 128255]}, (0, 7, 128255)),
        (None, None, ()),
    ],
)
def test_every_eos_id_is_kept(config, generation_config, ids):
    published = LLAMA_3_8B | {"eos_token_id": config}
    assert LlamaConfig.from_dict(published, generation_config).eos_token_ids == ids


def test_eos_ids_come_from_the_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    assert LlamaConfig.from_pretrained(tmp_path).eos_token_ids == (128009,)
    (tmp_path / "generation_config.json").write_text(json.dumps(STOPS))
    assert LlamaConfig.from_pretrained(str(tmp_path)).eos_token_ids == (128001, 128009)


@pytest.mark.parametrize(
    ("vocab_size", "file", "ids"),
    [
        (400, "tokenizer_config.json", (7, 304)),
        (400, "special_tokens_map.json", (7, 304)),
        (304, "tokenizer_config.json", (7,)),  # the model cannot generate it
        (400, None, (7,)),
    ],
)
def test_the_tokenizer_may_name_one_more_eos_token(tmp_path, vocab_size, file, ids):
    """As in most chat models that were trained from a base model."""
    write_tokenizer(tmp_path, settings=None)
    if file:
        (tmp_path / file).write_text(json.dumps({"eos_token": EOT}))
    for known in (7, ids):
        config = LLAMA_3_8B | {"vocab_size": vocab_size, "eos_token_id": known}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert LlamaConfig.from_pretrained(tmp_path).eos_token_ids == ids


@pytest.mark.parametrize(
    ("change", "token"),
    [
        ({"model_type": "mistral"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "'longrope'"),
        ({"rope_scaling": {"type": ["linear"], "factor": 8.0}}, "'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0, "alpha": 1000}}, "alpha"),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, "beta_slow"),
        ({"rope_scaling": YARN | {"beta_slow": 1e-7}}, "beta_slow"),
        ({"rope_scaling": YARN | {"beta_fast": 1e7}}, "beta_fast"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor"),
        ({"rope_scaling": YARN | {"attention_factor": 0.0}}, "attention_factor"),
        ({"rope_scaling": YARN | ENDLESS}, "attention_factor"),
        ({"rope_scaling": YARN | {"attn_factor": 2.0}}, "attn_factor"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"factor": 8.0}}, "factor"),
        ({"rope_scaling": SCALINGS[1] | {"factor": 0.5}}, "factor"),
        ({"rope_scaling": SCALINGS[1] | {"high_freq_factor": 1}}, "high_freq_factor"),
        ({"rope_scaling": SCALINGS[1] | {"type": "linear"}}, "type"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta"),
        ({"rope_scaling": SCALINGS[1], "rope_parameters": SCALINGS[0]}, "rope_type"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"num_key_value_heads": 5}, "32 attention heads"),
        ({"num_attention_heads": 33}, "33"),
        ({"head_dim": 63}, "head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 1001}, "num_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"vocab_size": 128256.0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"intermediate_size": "14336"}, "intermediate_size"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "int8"}, "'int8'"),
        ({"torch_dtype": 16}, "torch_dtype"),
        ({"eos_token_id": 128256}, "128256"),
        ({"eos_token_id": [-1]}, "-1"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": list(range(65))}, "65 EOS"),
        ({"quantization_config": {"quant_method": "hqq"}}, "hqq"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"logit_scale": 2}, "logit_scale"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 1}, "layer_types"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"hidden_size": 10**400}, "hidden_size"),
    ],
)
def test_another_model_is_refused(change, token):
    with pytest.raises(ConfigError, match=token):
        LlamaConfig.from_dict(LLAMA_3_8B | change)


def test_numbers_at_the_limit_are_accepted():
    LlamaConfig.from_dict(LLAMA_3_8B | {"num_hidden_layers": 1000, "eos_token_id": [*range(64)]})


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(LlamaConfig) if field.type in (int, float)]
)
def test_sizes_are_positive_however_a_config_is_made(name):
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(preset("llama3_8b"), **{name: 0})


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 100_000, b"[]", b"{}", b"\xff\xfe\x00"],
    ids=["empty", "cut", "deep", "list", "no keys", "not UTF-8"],
)
def test_a_malformed_config_file_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        LlamaConfig.from_pretrained(tmp_path)


def test_a_config_file_that_the_user_may_not_read(tmp_path, monkeypatch):
    def refuse(file, **how):
        raise PermissionError(13, "Permission denied", str(file))

    path = tmp_path / "config.json"
    path.write_text("{}")
    monkeypatch.setattr(type(path), "read_text", refuse)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        LlamaConfig.from_pretrained(tmp_path)


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        LlamaConfig.from_pretrained(tmp_path)


def test_a_config_is_hashable():
    assert len({preset("llama3_1_8b"), preset("llama3_1_8b"), preset("llama3_8b")}) == 2
    assert isinstance(preset("llama3_1_8b").rope_scaling, Llama3Scaling)
