"""Reading checkpoints in Hugging Face layout, and rejecting incomplete or damaged ones."""

import io
import json
import random
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from llama_jax.checkpoint import CheckpointError, open_checkpoint
from llama_jax.config import LlamaConfig
from llama_jax.weights.table import checkpoint_tensors
from tests.support.conversions import change_weights, refusal
from tests.support.tiny_checkpoint import bits, place_tensors, read, write_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    path = tmp_path_factory.mktemp("single")
    write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    write_checkpoint(path, shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def copy(tmp_path, single):
    return shutil.copytree(single, tmp_path / "copy")


@pytest.fixture
def sharded_copy(tmp_path, sharded):
    return shutil.copytree(sharded, tmp_path / "copy")


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
def test_reads_every_tensor_bit_for_bit(tmp_path, dtype, tied, shard_size):
    expected = write_checkpoint(
        tmp_path, dtype=dtype, shard_size=shard_size, tie_word_embeddings=tied
    )
    reader = open_checkpoint(tmp_path)
    assert reader.path == tmp_path
    assert reader.config == LlamaConfig.from_pretrained(tmp_path)
    assert reader.config.dtype == dtype
    assert set(reader.tensors) == set(expected) == set(checkpoint_tensors(reader.config))
    for name, tensor in expected.items():
        info = reader.tensors[name]
        array = read(reader, name)
        assert (array.shape, array.dtype.name) == (info.shape, info.dtype) == (tensor.shape, dtype)
        assert bits(array) == bits(tensor)


def test_tensors_at_odd_offsets(copy):
    """Other writers do not pad their headers, so tensors may start at any byte."""
    expected = safetensors.torch.load((copy / "model.safetensors").read_bytes())
    place_tensors(copy / "model.safetensors", 1)
    reader = open_checkpoint(copy)
    for name, tensor in expected.items():
        array = read(reader, name)
        assert bits(array) == bits(tensor)
        assert (array.astype(np.float32) == tensor.float().numpy()).all()


def test_reads_that_the_system_cuts_short(single, monkeypatch):
    """Linux reads at most 2 GiB at a time; the embedding table of 405B has 4 GB."""

    class Short(io.FileIO):
        def readinto(self, buffer):
            return super().readinto(memoryview(buffer)[:1000])

    reader = open_checkpoint(single)
    expected = safetensors.torch.load_file(single / "model.safetensors")
    monkeypatch.setattr(Path, "open", lambda path, *_, **__: Short(path))
    assert bits(read(reader, "lm_head.weight")) == bits(expected["lm_head.weight"])


def test_tensors_after_unsupported_dtypes(copy):
    """Their sizes determine where the next tensors lie."""
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"  # ignored, whatever its dtype
    expected = safetensors.torch.load((copy / "model.safetensors").read_bytes())
    for dtype in (torch.bool, torch.int16, torch.int64, torch.float8_e5m2, torch.complex64):
        buffers = {name.format(layer): torch.zeros(3, dtype=dtype) for layer in range(2)}
        safetensors.torch.save_file(expected | buffers, copy / "model.safetensors")
        reader = open_checkpoint(copy)
        assert {n: bits(read(reader, n)) for n in reader.tensors} == {
            n: bits(tensor) for n, tensor in expected.items()
        }


def test_the_dtype_is_that_of_the_weights_not_of_the_config(copy):
    change_json(copy / "config.json", dtype="float16")
    change_weights(copy, lambda w: w.update({n: t.bfloat16() for n, t in w.items() if t.ndim == 2}))
    reader = open_checkpoint(copy)
    assert reader.config.dtype == "bfloat16"
    assert reader.tensors["model.norm.weight"].dtype == "float32"
    assert read(reader, "lm_head.weight").dtype == ml_dtypes.bfloat16


def test_the_dtype_is_that_of_most_elements(copy):
    """Not of most tensors."""
    large = ("embed_tokens", "lm_head", "mlp")
    change_weights(
        copy,
        lambda w: w.update({n: t.half() for n, t in w.items() if any(x in n for x in large)}),
    )
    dtypes = [info.dtype for info in open_checkpoint(copy).tensors.values()]
    assert dtypes.count("float16") < dtypes.count("float32")
    assert open_checkpoint(copy).config.dtype == "float16"


def test_all_wrong_tensors_are_named_at_once(copy):
    def change(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.3.mlp.up_proj.weight"] = torch.zeros(48, 32)
        weights["model.norm.weight"] = torch.zeros(33)
        weights["lm_head.weight"] = torch.zeros(96, 32, dtype=torch.int8)

    change_weights(copy, change)
    message = refusal(open_checkpoint, copy)
    for token in (
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.norm.weight has shape [33]",
        "lm_head.weight is stored as int8",
    ):
        assert token in message


@pytest.mark.parametrize("name", ["module.{}", "base_model.model.{}", "{}.default"])
def test_the_other_names_of_all_tensors_are_shown(copy, name):
    def change(weights):
        for original in [*weights]:
            weights[name.format(original)] = weights.pop(original)

    change_weights(copy, change)
    message = refusal(open_checkpoint, copy)
    assert name.replace("{}", "") in message and "missing" in message


def test_many_missing_tensors_are_counted(copy):
    change_json(copy / "config.json", num_hidden_layers=9)
    message = refusal(open_checkpoint, copy)
    assert message.count("model.layers.3.") == 4 and f"{6 * 9 - 4} more" in message


@pytest.mark.parametrize("name", ["nowhere", "meta-llama/Meta-Llama-3-8B-Instruct"])
def test_a_missing_path(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    message = refusal(open_checkpoint, name)
    assert name in message and (f"hf download {name}" in message) == ("/" in name)


def test_a_file_instead_of_a_directory(single):
    assert "model.safetensors" in refusal(open_checkpoint, single / "model.safetensors")


def test_every_truncation_is_noticed(copy):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    for length in (0, 5, 8, 100, 8 + header, 8 + header + 100, len(data) - 1):
        file.write_bytes(data[:length])
        assert str(file) in refusal(open_checkpoint, copy), length
    file.write_bytes(data + b"\0")
    assert str(file) in refusal(open_checkpoint, copy)


def test_a_damaged_header_is_rejected_or_harmless(copy):
    """Any byte may be wrong: opening may succeed (a letter of the metadata) but never crash."""
    file = copy / "model.safetensors"
    data = file.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    rng = random.Random(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(8 + header)] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            open_checkpoint(copy)
        except CheckpointError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize(
    "entries",
    [
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
        '{"a": 3}',
        "[]",
        "[" * 100_000,
    ],
)
def test_impossible_headers(copy, entries):
    text = entries.encode()
    file = copy / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert str(file) in refusal(open_checkpoint, copy)


def test_a_file_that_cannot_be_mapped(copy):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to("/dev/null")
    message = refusal(open_checkpoint, copy)
    assert "model.safetensors" in message and "None" not in message


def test_an_index_of_missing_files(sharded_copy):
    gone = sorted(sharded_copy.glob("*.safetensors"))[:2]
    for file in gone:
        file.unlink()
    message = refusal(open_checkpoint, sharded_copy)
    assert all(file.name in message for file in gone)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "sub/../../x"])
def test_an_index_that_leaves_the_directory(sharded_copy, name):
    weight_map = json.loads((sharded_copy / INDEX).read_text())["weight_map"]
    change_json(sharded_copy / INDEX, weight_map=weight_map | {"lm_head.weight": name})
    assert name in refusal(open_checkpoint, sharded_copy)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}'],
)
def test_a_file_that_is_not_an_index(sharded_copy, text):
    (sharded_copy / INDEX).write_text(text)
    assert INDEX in refusal(open_checkpoint, sharded_copy)


def test_a_shard_that_git_lfs_has_not_fetched(sharded_copy):
    *_, last = sorted(sharded_copy.glob("*.safetensors"))
    last.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    message = refusal(open_checkpoint, sharded_copy)
    assert last.name in message and "git lfs pull" in message


def test_an_index_that_contradicts_the_files(sharded_copy):
    """A tensor in two files, and one that is not where the index says."""
    second, *_, first = sorted(sharded_copy.glob("*.safetensors"))
    weights = safetensors.torch.load_file(first)
    name = "lm_head.weight"  # which only a tied model can do without
    safetensors.torch.save_file(safetensors.torch.load_file(second) | {name: weights[name]}, second)
    message = refusal(open_checkpoint, sharded_copy)
    assert second.name in message and name in message
    del weights[name]
    safetensors.torch.save_file(weights, first, {"format": "pt"})
    message = refusal(open_checkpoint, sharded_copy)
    assert first.name in message and name in message


def test_a_single_file_beside_an_index_of_others_is_ambiguous(sharded_copy, single):
    shutil.copy(single / "model.safetensors", sharded_copy)
    assert "model.safetensors " in refusal(open_checkpoint, sharded_copy)


def test_an_index_of_a_single_file_is_followed(copy):
    names = safetensors.torch.load_file(copy / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (copy / INDEX).write_text(json.dumps(index))
    assert set(open_checkpoint(copy).tensors) == set(names)
