"""Hugging Face → Orbax → Hugging Face: equal bits, config and logits; casts like PyTorch's."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from llama_jax.checkpoint import open_checkpoint
from tests.support.conversions import (
    change_weights,
    convert_to,
    load_weights,
    refusal,
    small_pieces,
)
from tests.support.tiny_checkpoint import bits, write_checkpoint

DTYPES = ("bfloat16", "float16", "float32")
EMBEDDING = "model.embed_tokens.weight"


def logits(path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 95, 33, 7]])).logits


def config_of(path) -> dict:
    return json.loads((path / "config.json").read_text())


QUICK = {("bfloat16", False, True), ("float16", True, False), ("float32", False, False)}


@pytest.mark.parametrize(
    ("dtype", "tied", "sharded"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(DTYPES, (False, True), (False, True))
    ],
)
def test_the_bits_survive_both_ways(tmp_path, dtype, tied, sharded):
    shard_size, limit, shards = ("20KB", 20_000, 0) if sharded else ("5GB", 10**9, 1)
    expected = write_checkpoint(
        tmp_path / "hf", dtype=dtype, shard_size=shard_size, tie_word_embeddings=tied
    )
    with small_pieces(shard=limit):
        there = convert_to(tmp_path / "orbax", tmp_path / "hf")
        back = convert_to(tmp_path / "back", tmp_path / "orbax", layout="huggingface")
    assert there.bytes == back.bytes == sum(tensor.nbytes for tensor in expected.values())
    found = load_weights(tmp_path / "back")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor), name
    written = len(list((tmp_path / "back").glob("*.safetensors")))
    assert written == shards or (not shards and 3 < written < 30)
    assert config_of(tmp_path / "back") == config_of(tmp_path / "hf")
    assert torch.equal(logits(tmp_path / "back"), logits(tmp_path / "hf"))
    assert open_checkpoint(tmp_path / "back").config == open_checkpoint(tmp_path / "hf").config


def test_thirty_shards(tmp_path):
    """One file per tensor, on both sides."""
    expected = write_checkpoint(tmp_path / "hf", shard_size="1KB", hidden_size=160)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == 30
    with small_pieces(shard=1):
        convert_to(tmp_path / "orbax", tmp_path / "hf")
        convert_to(tmp_path / "back", tmp_path / "orbax", layout="huggingface")
    assert (tmp_path / "back" / "model-00030-of-00030.safetensors").is_file()
    found = load_weights(tmp_path / "back")
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in expected.items()
    }
    for file in (tmp_path / "back").glob(
        "*.safetensors"
    ):  # the tensors are aligned, as by safetensors
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


def test_every_weight_keeps_its_own_dtype(tmp_path):
    write_checkpoint(tmp_path / "hf")
    change_weights(
        tmp_path / "hf", lambda w: w.update({n: t.half() for n, t in w.items() if t.ndim == 2})
    )
    expected = load_weights(tmp_path / "hf")
    convert_to(tmp_path / "orbax", tmp_path / "hf")
    convert_to(tmp_path / "back", tmp_path / "orbax", layout="huggingface")
    found = load_weights(tmp_path / "back")
    assert {n: (t.dtype, bits(t)) for n, t in found.items()} == {
        n: (t.dtype, bits(t)) for n, t in expected.items()
    }
    # Most of the weights are in float16, and the config, which said float32, tells the truth now.
    assert config_of(tmp_path / "back")["dtype"] == "float16"


def all_of(dtype: str, largest: float) -> torch.Tensor:
    """All values of a 16-bit dtype, or values that are hard to round; zero if too large."""
    if dtype == "float32":
        generator = np.random.default_rng(0)
        patterns = generator.integers(0, 2**32, 2**15, np.uint32)
        near = generator.uniform(2**-26, 2.0, 2**15).astype(np.float32).view(np.uint32)
        near[::2] &= 0xFFFF0000  # and halfway between two numbers in bfloat16, and in float16
        near[1::4] = near[1::4] & 0xFFFF0000 | 0x8000
        near[3::4] = near[3::4] & 0xFFFFE000 | 0x1000
        tensor = torch.from_numpy(np.concatenate([patterns, near]).view(np.float32))
    else:
        tensor = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    finite = torch.isfinite(tensor) & (tensor.double().abs() <= largest)
    return torch.where(finite, tensor, torch.zeros_like(tensor)).reshape(2048, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("layout", ["huggingface", pytest.param("orbax", marks=pytest.mark.slow)])
def test_casts_are_pytorchs(tmp_path, dtype, to, layout):
    write_checkpoint(tmp_path / "hf", dtype=dtype, vocab_size=2048)
    hard = all_of(dtype, 65504.0 if to == "float16" else 3.38e38)
    change_weights(tmp_path / "hf", lambda w: w.update({EMBEDDING: hard}))
    convert_to(tmp_path / "cast", tmp_path / "hf", dtype=to, layout=layout)
    if layout == "orbax":
        convert_to(tmp_path / "back", tmp_path / "cast", layout="huggingface")
        (tmp_path / "back").rename(tmp_path / "cast2")
    found = load_weights(tmp_path / ("cast2" if layout == "orbax" else "cast"))
    for name, tensor in load_weights(tmp_path / "hf").items():
        assert found[name].dtype == getattr(torch, to)
        assert bits(found[name]) == bits(tensor.to(getattr(torch, to))), name
    assert config_of(tmp_path / "cast")["dtype"] == to
    assert open_checkpoint(tmp_path / "cast").config.dtype == to


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 1e5), ("float32", 65520.0)])
def test_a_value_too_large_for_the_dtype_is_an_error(tmp_path, dtype, value):
    write_checkpoint(tmp_path / "hf", dtype=dtype)
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(tmp_path / "hf", lambda w: w[name].__setitem__((47, 31), value))
    message = refusal(convert_to, tmp_path / "new", tmp_path / "hf", dtype="float16")
    assert name in message and "--dtype" in message
    assert "--resume" in refusal(open_checkpoint, tmp_path / "new")


def test_only_files_of_a_checkpoint_are_copied(tmp_path):
    write_checkpoint(tmp_path / "hf")
    texts = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"é": "ü"}',
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "{{ bos }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "LICENSE.txt": "terms",
        "NOTICE": "notice",
        "USE_POLICY.md": "policy",
        "pytorch_model.bin": "not wanted",
        "training_args.json": "not wanted",
    }
    for folder in ("tokenizer_old", "additional_chat_templates"):
        (tmp_path / "hf" / folder).mkdir()
    for name, text in texts.items():
        (tmp_path / "hf" / name).write_text(text)
    convert_to(tmp_path / "orbax", tmp_path / "hf")
    convert_to(tmp_path / "back", tmp_path / "orbax", layout="huggingface")
    wanted = {name for name, text in texts.items() if text != "not wanted"}
    for path in (tmp_path / "orbax", tmp_path / "back"):
        small = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert {name for name in small if not name.startswith("weights/")} == wanted | {
            "config.json",
            "generation_config.json",
            "llama_jax.json",
            *(["model.safetensors"] if path.name == "back" else []),
        }
        for name in wanted | {"generation_config.json"}:
            assert (path / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
        for name in wanted:  # they may be edited
            (path / name).write_text(texts[name] + " ")
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("said", "dtype", "expected"),
    [
        ({}, None, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, None, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, "bfloat16", {"torch_dtype": "bfloat16"}),
        ({"dtype": "bfloat16"}, "float32", {"dtype": "float32"}),
        (
            {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
            "float16",
            {"dtype": "float16", "torch_dtype": "float16"},
        ),
    ],
)
def test_the_config_names_the_dtype_of_the_weights(tmp_path, said, dtype, expected):
    write_checkpoint(tmp_path / "hf", dtype="bfloat16")
    content = {key: value for key, value in config_of(tmp_path / "hf").items() if key != "dtype"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(content | said))
    convert_to(tmp_path / "new", tmp_path / "hf", dtype=dtype)
    assert config_of(tmp_path / "new") == content | expected


def test_a_stored_tied_head_is_dropped(tmp_path):
    write_checkpoint(tmp_path / "hf", tie_word_embeddings=True)
    change_weights(tmp_path / "hf", lambda w: w.update({"lm_head.weight": w[EMBEDDING].clone()}))
    convert_to(tmp_path / "new", tmp_path / "hf", layout="huggingface")
    assert "lm_head.weight" not in load_weights(tmp_path / "new")
    assert torch.equal(logits(tmp_path / "new"), logits(tmp_path / "hf"))


def test_a_converted_checkpoint_can_be_moved(tmp_path):
    expected = write_checkpoint(tmp_path / "hf")
    convert_to(tmp_path / "orbax", tmp_path / "hf")
    shutil.rmtree(tmp_path / "hf")
    (tmp_path / "orbax").rename(tmp_path / "elsewhere")
    convert_to(tmp_path / "back", tmp_path / "elsewhere", layout="huggingface")
    assert bits(load_weights(tmp_path / "back")[EMBEDDING]) == bits(expected[EMBEDDING])


def test_the_scales_of_the_kv_cache_are_kept(tmp_path):
    """The cache is not quantized here, but a program that does needs what a tool has measured."""
    write_checkpoint(tmp_path / "hf")
    scales = {
        "model.layers.0.self_attn.k_scale": np.float32([0.25]),
        "model.layers.0.self_attn.v_scale": np.array(0.5, np.float32),
        "model.layers.1.self_attn.k_proj.output_scale": np.float32([0.125, 2]),
    }
    others = {"model.layers.0.self_attn.q_scale": np.float32([3])}
    weights = load_weights(tmp_path / "hf")
    save_file(
        weights | {name: torch.from_numpy(array) for name, array in (scales | others).items()},
        tmp_path / "hf" / "model.safetensors",
        {"format": "pt"},
    )
    convert_to(tmp_path / "orbax", tmp_path / "hf")
    convert_to(tmp_path / "back", tmp_path / "orbax", layout="huggingface")
    for directory in ("orbax", "back"):
        kept = json.loads((tmp_path / directory / "kv_cache_scales.json").read_text())
        assert kept == {name: array.ravel().tolist() for name, array in scales.items()}
    assert load_weights(tmp_path / "back").keys() == weights.keys()
