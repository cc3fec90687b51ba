"""The translation of a GGUF header to the configuration of a model."""

from dataclasses import replace

import numpy as np
import pytest

from llama_jax.checkpoint import open_checkpoint
from llama_jax.config import LlamaConfig
from llama_jax.config.huggingface import read_checkpoint_config
from llama_jax.config.rope_scaling import LinearScaling, Llama3Scaling
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.gguf import GgufError
from llama_jax.gguf.config import config_json
from llama_jax.gguf.header import GgufHeader, GgufTensor
from sharding.errors import UserError
from tests.support.gguf_file import rope_factors, tiny_model, write_gguf

LLAMA_3_1 = Llama3Scaling(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
OTHER = Llama3Scaling(
    factor=5.5,
    low_freq_factor=1.0,
    high_freq_factor=3.0,
    original_max_position_embeddings=2048,
)


def header_of(tmp_path, factors=None, **metadata):
    """A header that needs no weights, with the keys of Llama 3.1 8B."""
    tensors = {"token_embd.weight": GgufTensor(tmp_path, 0, (128256, 4096), "Q4_K", 0)}
    if factors is not None:
        file = tmp_path / "factors"
        file.write_bytes(factors.astype("<f4").tobytes())
        tensors["rope_freqs.weight"] = GgufTensor(file, 0, factors.shape, "F32", factors.nbytes)
    keys = {
        "general.architecture": "llama",
        "llama.block_count": 32,
        "llama.context_length": 131072,
        "llama.embedding_length": 4096,
        "llama.feed_forward_length": 14336,
        "llama.attention.head_count": 32,
        "llama.attention.head_count_kv": 8,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.rope.dimension_count": 128,
        "llama.rope.freq_base": 500000.0,
        "tokenizer.ggml.eos_token_id": 128001,
    }
    return GgufHeader(tmp_path / "model.gguf", keys | metadata, tensors)


def config_of(header):
    return LlamaConfig.from_dict(config_json(header))


@pytest.mark.parametrize("preset", ["llama3_1_8b", "llama3_1_70b", "llama3_2_1b", "llama3_2_3b"])
def test_the_rope_factors_of_the_releases_are_recognized(tmp_path, preset):
    wanted = getattr(LlamaConfig, preset)()
    metadata = {
        "llama.attention.head_count": wanted.num_heads,
        "llama.embedding_length": wanted.embed_dim,
        "llama.attention.key_length": wanted.head_dim,
        "llama.rope.dimension_count": wanted.head_dim,
    }
    found = config_of(header_of(tmp_path, rope_factors(wanted), **metadata))
    assert found.rope_scaling == wanted.rope_scaling
    assert found.head_dim == wanted.head_dim and found.norm_eps == wanted.norm_eps


def test_other_factors_of_the_same_kind_are_fitted(tmp_path):
    wanted = replace(LlamaConfig.llama3_1_8b(), rope_scaling=OTHER)
    assert config_of(header_of(tmp_path, rope_factors(wanted))).rope_scaling == OTHER


def test_a_common_factor_of_the_lengths_does_not_matter(tmp_path):
    same = replace(
        OTHER, low_freq_factor=2.0, high_freq_factor=6.0, original_max_position_embeddings=4096
    )
    wanted = replace(LlamaConfig.llama3_1_8b(), rope_scaling=same)
    assert config_of(header_of(tmp_path, rope_factors(wanted))).rope_scaling == OTHER


def test_factors_of_one_scale_nothing(tmp_path):
    assert config_of(header_of(tmp_path, np.ones(64))).rope_scaling is None


@pytest.mark.parametrize("factors", [np.full(64, 4.0), np.linspace(1, 8, 64), np.full(64, np.nan)])
def test_factors_of_another_kind_are_refused(tmp_path, factors):
    with pytest.raises(GgufError, match="RoPE"):
        config_json(header_of(tmp_path, factors))


def test_one_other_factor_is_refused(tmp_path):
    factors = rope_factors(LlamaConfig.llama3_1_8b())
    factors[40] *= 1.001
    with pytest.raises(GgufError, match="RoPE"):
        config_json(header_of(tmp_path, factors))


def test_factors_of_another_type_are_refused(tmp_path):
    header = header_of(tmp_path, rope_factors(LlamaConfig.llama3_1_8b()))
    tensor = header.tensors["rope_freqs.weight"]
    for changed in (replace(tensor, type="F16"), replace(tensor, shape=(8, 8))):
        header.tensors["rope_freqs.weight"] = changed
        with pytest.raises(GgufError, match="RoPE"):
            config_json(header)


def test_wrong_factors_in_a_file_are_refused(tmp_path):
    changes = {"rope_freqs.weight": np.linspace(1, 8, 8, dtype=np.float32)}
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), changes=changes)
    with pytest.raises(GgufError, match="RoPE"):
        open_checkpoint(path)


def test_linear_and_yarn_scaling_keep_their_parameters(tmp_path):
    scaling = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 8192,
        "llama.rope.scaling.finetuned": True,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
        "llama.rope.scaling.yarn_beta_slow": 2.0,
    }
    assert config_json(header_of(tmp_path, **scaling))["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    }
    assert (
        config_json(header_of(tmp_path, **{"llama.rope.scaling.type": "none"}))["rope_scaling"]
        is None
    )


@pytest.mark.parametrize(
    "scaling",
    [
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
        {"llama.rope.scale_linear": 2.0, "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    ],
)
def test_a_factor_is_linear_unless_a_type_says_otherwise(tmp_path, scaling):
    """`LLM_KV_ROPE_SCALING_TYPE` in llama.cpp."""
    found = config_of(header_of(tmp_path, **scaling))
    assert found.rope_scaling == LinearScaling(factor=4.0)
    with pytest.raises(GgufError, match="RoPE"):
        config_of(header_of(tmp_path, rope_factors(LlamaConfig.llama3_1_8b()), **scaling))


@pytest.mark.parametrize(
    "scaling",
    [
        {"llama.rope.scaling.factor": 1.0},
        {"llama.rope.scale_linear": 0.0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.attn_factor": 1.0, "llama.rope.scaling.original_context_length": 8192},
    ],
)
def test_what_scales_nothing(tmp_path, scaling):
    wanted = LlamaConfig.llama3_1_8b()
    for factors, found in ((None, None), (rope_factors(wanted), wanted.rope_scaling)):
        assert config_of(header_of(tmp_path, factors, **scaling)).rope_scaling == found


def test_without_a_base_of_wavelengths_it_is_that_of_llama_cpp(tmp_path):
    header = header_of(tmp_path)
    del header.metadata["llama.rope.freq_base"]
    assert config_of(header).rope_theta == 10000.0


def test_ends_of_turns_are_recognized_by_their_ids_and_texts(tmp_path):
    tokens = ["a", "<|end_of_text|>", "<|eot_id|>", "<end>", "<|eom_id|>", "b"]
    header = header_of(
        tmp_path,
        **{
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.eot_token_id": 3,
            "tokenizer.ggml.eom_token_id": 5,
        },
    )
    assert set(config_of(header).eos_token_ids) == {1, 2, 3, 4, 5}


def test_the_sampling_parameters_of_a_file_are_the_defaults(tmp_path):
    metadata = {
        "general.sampling.temp": 0.6,
        "general.sampling.top_k": 40,
        "general.sampling.top_p": 0.9,
        "general.sampling.min_p": 0.05,
    }
    sampled = write_gguf(tmp_path / "a.gguf", tiny_model(), metadata=metadata)
    assert read_checkpoint_config(sampled).generation_defaults() == SamplingParams(
        temperature=0.6, top_k=40, top_p=0.9, min_p=0.05
    )
    greedy = write_gguf(tmp_path / "b.gguf", tiny_model())
    assert read_checkpoint_config(greedy).generation_defaults().temperature == 0


def test_dense_layers_of_one_size_may_be_listed_per_layer(tmp_path):
    found = config_of(
        header_of(
            tmp_path,
            **{"llama.attention.head_count_kv": [8] * 32, "llama.expert_count": 0},
        )
    )
    assert found == config_of(header_of(tmp_path)) and found.num_kv_heads == 8


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("general.architecture", "qwen2", "qwen2"),
        ("general.architecture", None, "architecture"),
        ("general.type", "adapter", "adapter"),
        ("llama.expert_count", 8, "expert_count"),
        ("llama.attention.causal", False, "attention.causal"),
        ("llama.rope.dimension_count", 64, "rope.dimension_count"),
        ("llama.attention.value_length", 64, "attention.value_length"),
        ("llama.attention.head_count_kv", [8, 4], "head_count_kv"),
        ("llama.rope.scaling.type", "longrope", "longrope"),
        ("llama.rope.scaling.attn_factor", 2.0, "attn_factor"),
        ("llama.block_count", "many", "num_hidden_layers"),
        ("llama.rope.freq_base", float("nan"), "freq_base"),
        ("llama.rope.freq_base", float("inf"), "freq_base"),
        ("llama.rope.freq_base", -1.0, "freq_base"),
        ("llama.attention.head_count", None, "num_attention_heads"),
    ],
)
def test_models_that_would_be_computed_wrongly_are_refused(tmp_path, key, value, named):
    factors = rope_factors(LlamaConfig.llama3_1_8b()) if key.endswith("freq_base") else None
    header = header_of(tmp_path, factors, **{key: value})
    if value is None:
        del header.metadata[key]
    with pytest.raises(UserError, match=named):
        config_of(header)


def test_an_unknown_key_is_treated_like_one_of_config_json(tmp_path):
    assert config_json(header_of(tmp_path, **{"llama.residual_scale": 0.5}))[
        "llama.residual_scale"
    ] == pytest.approx(0.5)
