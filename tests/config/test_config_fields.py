"""Every field of the configuration has an effect: changing it changes something computed.

A field that is parsed and never read is a promise not kept. The tests go through the fields of the
dataclass, so a new field fails until it has a perturbation here.
"""

import dataclasses
import json
import math
import zlib

import numpy as np
import pytest
import transformers
from flax import nnx
from transformers.models.llama import modeling_llama

from llama_jax.checkpoint.load import choose_dtype
from llama_jax.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LlamaConfig,
    Quantization,
    YarnScaling,
)
from llama_jax.config.rope_scaling import ROPE_TYPES
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.core import Engine
from llama_jax.engine.device_memory import choose_mesh_sizes
from llama_jax.engine.options import EngineOptions
from llama_jax.model import Llama
from llama_jax.model.rope import attention_factor, inverse_frequencies
from llama_jax.quantization import FORMATS
from llama_jax.weights.table import checkpoint_tensors
from sharding.mesh import make_mesh
from tests.support.programs import compile_few
from tests.support.quantized_checkpoint import quantize, save_weights

BASE = LlamaConfig(
    vocab_size=32,
    embed_dim=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    rope_theta=100.0,  # small enough that 40 tokens reach every band of the scaled frequencies
    rope_scaling=Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    norm_eps=1e-5,
    max_position_embeddings=64,
    eos_token_ids=(3,),
)
TOKENS = np.arange(40)[None] * 7 % BASE.vocab_size

# Another value for each field: those that change the logits, and those that act elsewhere.
IN_THE_LOGITS = {
    "vocab_size": 40,
    "embed_dim": 20,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 4,
    "head_dim": 10,
    "mlp_dim": 28,
    "rope_theta": 200.0,
    "rope_scaling": None,
    "norm_eps": 1e-2,
    "tie_embeddings": True,
    "quantization": Quantization(format="int8"),
}
ELSEWHERE = {"max_position_embeddings": 48, "dtype": "bfloat16", "eos_token_ids": None}
ROPE_SCALING = {
    "factor": 4.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 16,
}
# Other scalings, with another value for each of their fields. `DynamicScaling.factor` has no effect
# on the sequences that are supported.
OTHER_SCALINGS = {
    LinearScaling(factor=8.0): {"factor": 4.0},
    DynamicScaling(factor=8.0): {},
    YarnScaling(factor=8.0, original_max_position_embeddings=32, attention_factor=1.2): {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "attention_factor": 1.1,
        "beta_fast": 2.0,
        "beta_slow": 0.1,
        "truncate": False,
    },
}

# Compared with int4 in groups of 8.
QUANTIZATION = {"format": "fp8", "group_size": 4, "plain": ("model.layers.0.mlp.up_proj",)}


def write(path, config: LlamaConfig) -> str:
    """Writes a checkpoint whose elements depend only on their tensor's name and their position.

    A config with larger shapes has the same weights and some more, so a difference in the logits
    comes from the field, not from other random numbers.
    """
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    plain = checkpoint_tensors(dataclasses.replace(config, quantization=None))
    weights = {name: _pattern(name, tensor.shape) for name, tensor in plain.items()}
    if config.quantization:
        how = config.quantization
        quantized = quantize(weights, config.num_kv_heads, how.format, how.group_size)
        plain = {f"{module}.weight" for module in how.plain}
        weights = {name: weights[name] if name in plain else quantized[name] for name in weights}
    save_weights(weights, path)
    return str(path)


def _pattern(name: str, shape: tuple[int, ...]) -> np.ndarray:
    row, column = np.ogrid[: shape[0], : math.prod(shape[1:])]
    waves = np.sin(12.9898 * row + 78.233 * column + zlib.crc32(name.encode()) % 1000)
    return (0.3 * waves).reshape(shape).astype(np.float32)


@pytest.fixture(scope="module")
def base_logits(tmp_path_factory):
    return logits(tmp_path_factory.mktemp("base") / "base", BASE)


def logits(path, config: LlamaConfig) -> np.ndarray:
    model = Llama.from_pretrained(write(path, config))
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS))


def test_every_field_has_a_perturbation():
    names = {field.name for field in dataclasses.fields(LlamaConfig)}
    assert names == IN_THE_LOGITS.keys() | ELSEWHERE.keys()
    assert {field.name for field in dataclasses.fields(Llama3Scaling)} == ROPE_SCALING.keys()
    assert {Llama3Scaling, *map(type, OTHER_SCALINGS)} == set(ROPE_TYPES.values())
    for scaling, changes in OTHER_SCALINGS.items():
        if not isinstance(scaling, DynamicScaling):
            assert {field.name for field in dataclasses.fields(scaling)} == changes.keys()
    assert {field.name for field in dataclasses.fields(Quantization)} == QUANTIZATION.keys()


@pytest.mark.parametrize("name", IN_THE_LOGITS)
def test_a_field_changes_the_logits(tmp_path, base_logits, name):
    changed = logits(tmp_path / "changed", dataclasses.replace(BASE, **{name: IN_THE_LOGITS[name]}))
    assert _differ(base_logits, changed)


@pytest.mark.parametrize("name", ROPE_SCALING)
def test_a_field_of_the_rope_scaling_changes_the_logits(tmp_path, base_logits, name):
    scaling = dataclasses.replace(BASE.rope_scaling, **{name: ROPE_SCALING[name]})
    changed = logits(tmp_path / "changed", dataclasses.replace(BASE, rope_scaling=scaling))
    assert _differ(base_logits, changed)


@pytest.mark.parametrize(
    ("scaling", "name"),
    [(scaling, name) for scaling, changes in OTHER_SCALINGS.items() for name in changes],
)
def test_a_field_of_another_scaling_changes_the_rotation(scaling, name):
    def rotation(scaling):
        config = dataclasses.replace(BASE, rope_scaling=scaling, head_dim=32)
        return attention_factor(config) * np.cos(40 * inverse_frequencies(config))

    changed = dataclasses.replace(scaling, **{name: OTHER_SCALINGS[scaling][name]})
    assert _differ(rotation(scaling), rotation(changed))


@pytest.mark.parametrize("scaling", OTHER_SCALINGS, ids=lambda scaling: type(scaling).__name__)
def test_a_scaling_survives_config_json(scaling):
    config = dataclasses.replace(BASE, rope_scaling=scaling)
    content = json.loads(json.dumps(config.to_dict()))
    assert LlamaConfig.from_dict(content) == config
    theirs = transformers.LlamaConfig(**content)
    assert LlamaConfig.from_dict(theirs.to_dict()) == config
    rope = modeling_llama.LlamaRotaryEmbedding(theirs)
    np.testing.assert_allclose(inverse_frequencies(config), rope.inv_freq.numpy(), rtol=1e-6)
    assert rope.attention_scaling == attention_factor(config)


@pytest.mark.parametrize("name", QUANTIZATION)
def test_a_field_of_the_quantization_changes_the_logits(tmp_path, name):
    base = Quantization(format="int4", group_size=8)
    changed = dataclasses.replace(base, **{name: QUANTIZATION[name]})
    one, other = (
        logits(tmp_path / str(number), dataclasses.replace(BASE, quantization=quantization))
        for number, quantization in enumerate((base, changed))
    )
    assert _differ(one, other)


@pytest.mark.parametrize("name", FORMATS)
def test_the_quantization_survives_config_json(name):
    quantization = Quantization(format=name, group_size=-1, plain=("model.layers.1.mlp.up_proj",))
    config = dataclasses.replace(BASE, quantization=quantization)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_logits_depend_on_nothing_else(tmp_path, base_logits):
    """The same config gives the same logits to the last bit."""
    elsewhere = {**ELSEWHERE, "eos_token_ids": (5,)}
    same = logits(tmp_path / "same", dataclasses.replace(BASE, **elsewhere))
    np.testing.assert_array_equal(same, base_logits)


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return True
    assert np.isfinite(other).all()
    return np.abs(one - other).max() > 1e-4 * np.abs(one).max()


def test_max_position_embeddings_limits_the_engine():
    def longest(config):
        return choose_mesh_sizes(EngineOptions(path=""), config, make_mesh("1x1"), np.dtype("f4"))[
            1
        ]

    assert longest(BASE) == BASE.max_position_embeddings
    shorter = ELSEWHERE["max_position_embeddings"]
    assert longest(dataclasses.replace(BASE, max_position_embeddings=shorter)) == shorter


def test_auto_means_the_checkpoints_dtype_on_a_gpu():
    changed = dataclasses.replace(BASE, dtype=ELSEWHERE["dtype"])
    assert choose_dtype("auto", BASE, "gpu") == "float32"
    assert choose_dtype("auto", changed, "gpu") == "bfloat16"
    assert choose_dtype("auto", changed, "cpu") == "float32"
    half = dataclasses.replace(BASE, dtype="float16")
    assert choose_dtype("auto", half, "gpu") == "bfloat16"
    assert choose_dtype("float32", changed, "gpu") == "float32"
    with pytest.raises(ValueError, match="int8"):
        choose_dtype("int8", BASE, "gpu")


@pytest.mark.slow
def test_every_eos_id_ends_an_answer(tmp_path, monkeypatch):
    compile_few(monkeypatch)

    def answers(name, eos_token_ids):
        path = write(tmp_path / name, dataclasses.replace(BASE, eos_token_ids=eos_token_ids))
        engine = Engine(EngineOptions(path=path, mesh="1x1", max_num_seqs=1, max_chunk=64))
        for number, prompt in enumerate(([1, 2, 3], [9, 8, 7])):
            engine.add(number, prompt, SamplingParams(temperature=0, max_tokens=12))
        tokens, reasons = ([], []), {}
        while engine.has_work:
            for output in engine.step():
                tokens[output.request_id].append(output.token)
                if output.finish_reason:
                    reasons[output.request_id] = output.finish_reason
        return tokens, reasons

    (one, other), reasons = answers("none", ())
    assert (len(one), len(other), reasons) == (12, 12, {0: "length", 1: "length"})
    first = one[4]  # ends one answer; the second id ends the other one
    before = one[: one.index(first) + 1]
    second = next(token for token in other if token not in before)
    assert first not in other[: other.index(second)]
    expected = (before, other[: other.index(second) + 1])
    assert answers("both", (first, second)) == (expected, {0: "stop", 1: "stop"})
