"""params.json against the presets of `LlamaConfig`, which are checked against published configs."""

import json
from dataclasses import replace

import pytest

from convert.meta.params import parse_params, read_params
from llama_jax.checkpoint.reader import CheckpointError
from llama_jax.config import ConfigError, Llama3Scaling, LlamaConfig

# The fields of the files of Meta's releases.
COMMON = {"vocab_size": 128256, "n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 500000.0}
LLAMA_8B = COMMON | {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
}
LLAMA_70B = COMMON | {
    "dim": 8192,
    "n_layers": 80,
    "n_heads": 64,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 4096,
}
LLAMA_405B = COMMON | {
    "dim": 16384,
    "n_layers": 126,
    "n_heads": 128,
    "ffn_dim_multiplier": 1.2,
    "multiple_of": 4096,
}
LLAMA_1B = COMMON | {
    "dim": 2048,
    "n_layers": 16,
    "n_heads": 32,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 256,
}
LLAMA_3B = COMMON | {
    "dim": 3072,
    "n_layers": 28,
    "n_heads": 24,
    "ffn_dim_multiplier": 1.0,
    "multiple_of": 256,
}
SCALED = {"use_scaled_rope": True}


def parse(params, rows=128256, tied=False):
    return parse_params(params, rows=rows, tie_embeddings=tied)


@pytest.mark.parametrize(
    ("params", "tied", "preset"),
    [
        (LLAMA_8B, False, LlamaConfig.llama3_8b()),
        (LLAMA_8B | {"use_scaled_rope": False}, False, LlamaConfig.llama3_8b()),
        (LLAMA_70B, False, LlamaConfig.llama3_70b()),
        (LLAMA_8B | SCALED, False, LlamaConfig.llama3_1_8b()),
        (LLAMA_70B | SCALED, False, LlamaConfig.llama3_1_70b()),
        (LLAMA_405B | SCALED, False, LlamaConfig.llama3_1_405b()),
        (LLAMA_1B | SCALED, True, LlamaConfig.llama3_2_1b()),
        (LLAMA_3B | SCALED, True, LlamaConfig.llama3_2_3b()),
    ],
)
def test_the_releases_match_the_presets(params, tied, preset):
    # dtype and EOS ids are no business of params.json.
    assert parse(params, tied=tied) == replace(preset, dtype="float32", eos_token_ids=())


@pytest.mark.parametrize("vocab_size", [{"vocab_size": -1}, {}])
def test_an_unknown_vocabulary_is_that_of_the_embedding(vocab_size):
    params = {key: value for key, value in LLAMA_8B.items() if key != "vocab_size"}
    assert parse(params | vocab_size, rows=999).vocab_size == 999
    assert parse(LLAMA_8B, rows=999).vocab_size == 128256


def test_optional_fields():
    params = {key: value for key, value in LLAMA_8B.items() if "multipl" not in key}
    config = parse(params | {"n_kv_heads": 32})
    assert config.mlp_dim == 11008  # that of Llama 2 7B, which has neither field
    del params["n_kv_heads"]
    assert parse(params).num_kv_heads == 32
    assert parse(params | {"max_seq_len": 2048, "max_batch_size": 6}) == parse(params)


def test_the_mlp_width_is_truncated_at_every_step():
    # 8 × 4096 / 3 = 10,922.67, and 1.3 × 10,922 = 14,198.6
    assert parse(LLAMA_8B | {"multiple_of": 1}).mlp_dim == 14198
    assert parse(LLAMA_8B | {"multiple_of": 14198}).mlp_dim == 14198
    assert parse(LLAMA_8B | {"multiple_of": 14197}).mlp_dim == 2 * 14197


def test_rope_scaling_of_the_file():
    params = LLAMA_1B | SCALED | {"rope_scaling_factor": 16, "rope_high_freq_factor": 2.0}
    assert parse(params).rope_scaling == Llama3Scaling(
        factor=16.0,
        low_freq_factor=1.0,
        high_freq_factor=2.0,
        original_max_position_embeddings=8192,
    )


@pytest.mark.parametrize(
    ("change", "token"),
    [
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args"),
        ({"lora_args": {"rank": 16}}, "lora_args"),
        ({"moe_args": {"num_experts": 16}}, "moe_args"),
        ({"vision_chunk_size": 448}, "vision_chunk_size"),
        ({"vision_model": {}}, "vision_model"),
        ({"vision_num_cross_attention_layers": 8}, "vision_num_cross"),
        ({"use_qk_norm": False, "attn_temp": 1}, "attn_temp, use_qk_norm"),
        ({"use_scaled_rope": 1}, "use_scaled_rope"),
        ({"dim": 4095}, "dim is 4095"),
        ({"dim": "4096"}, "dim"),
        ({"n_layers": [32]}, "n_layers"),
        ({"n_layers": 10**12}, "n_layers"),
        ({"n_heads": True}, "n_heads"),
        ({"n_kv_heads": 7}, "heads"),
        ({"norm_eps": 0}, "norm_eps"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"ffn_dim_multiplier": 1e308}, "ffn_dim_multiplier"),
        ({"ffn_dim_multiplier": float("nan")}, "ffn_dim_multiplier"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"dim": 10**400}, "dim"),
        (SCALED | {"rope_scaling_factor": 0.5}, "factor"),
        (SCALED | {"rope_high_freq_factor": 1}, "freq_factor"),
    ],
)
def test_other_models_are_rejected(change, token):
    with pytest.raises(ConfigError, match=token):
        parse(LLAMA_8B | change)


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "norm_eps", "rope_theta"])
def test_missing_keys_are_named(key):
    with pytest.raises(ConfigError, match=key):
        parse({name: value for name, value in LLAMA_8B.items() if name != key})


def test_keys_without_a_value_are_absent(tmp_path):
    absent = {"quantization_args": None, "lora_args": None, "new_in_2030": None}
    (tmp_path / "params.json").write_text(json.dumps(LLAMA_8B | absent))
    text_model = {"vision_chunk_size": -1, "vision_num_cross_attention_layers": -1}
    assert parse(read_params(tmp_path) | text_model) == parse(LLAMA_8B)


def test_parameters_below_model(tmp_path):
    nested = {"model": LLAMA_8B | {"new": None}, "data": {"path": "x"}, "optim": {"lr": 1e-4}}
    (tmp_path / "params.json").write_text(json.dumps(nested))
    assert parse(read_params(tmp_path)) == parse(LLAMA_8B)
    (tmp_path / "params.json").write_text(json.dumps(nested | {"lora_args": {"rank": 16}}))
    with pytest.raises(ConfigError, match="lora_args"):
        parse(read_params(tmp_path))
    (tmp_path / "params.json").write_text(json.dumps({"model": LLAMA_8B | {"use_qk_norm": True}}))
    with pytest.raises(ConfigError, match="use_qk_norm"):
        parse(read_params(tmp_path))


def test_long_values_are_shortened():
    with pytest.raises(ConfigError, match="dim") as error:
        parse(LLAMA_8B | {"dim": "x" * 10_000})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("content", [None, b"[]", b"{", b"[" * 100_000, b"\xff"])
def test_a_file_that_is_not_an_object_is_rejected(tmp_path, content):
    if content is not None:
        (tmp_path / "params.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"params\.json"):
        read_params(tmp_path)
