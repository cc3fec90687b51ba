"""The Orbax layout: other programs read it, slices are exact, and damage is detected."""

import json
import shutil

import numpy as np
import pytest
import safetensors
import tensorstore
import torch
from orbax.checkpoint import v1 as ocp

from convert.verification import check_checksums
from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.huggingface import HuggingFaceReader
from llama_jax.checkpoint.manifest import MANIFEST
from llama_jax.checkpoint.reader import numpy_dtype
from llama_jax.config import LlamaConfig
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.weights.table import checkpoint_tensors
from tests.support.conversions import (
    FORMATS,
    convert_to,
    files,
    load_weights,
    refusal,
    small_pieces,
)
from tests.support.processes import open_files
from tests.support.reference import Request, drive, make_loop
from tests.support.tiny_checkpoint import bits, read, write_checkpoint

NAME = "model.layers.0.mlp.gate_proj.weight"  # [48, 32]
SPLIT = "model.layers.1.mlp.down_proj.weight"  # [32, 48], its columns in two halves
STATE = "weights/state"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "new"
    with small_pieces():
        convert_to(path, source)
    assert len(list((path / STATE / NAME / "c").iterdir())) == 7  # of 7 rows, the last padded
    return path


@pytest.fixture
def copy(tmp_path, converted):
    return shutil.copytree(converted, tmp_path / "copy")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_orbax_itself_reads_the_weights(tmp_path, dtype):
    expected = write_checkpoint(tmp_path / "hf", dtype=dtype)
    with small_pieces():
        convert_to(tmp_path / "new", tmp_path / "hf")
    restored = ocp.load(tmp_path / "new" / "weights")
    assert restored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (restored[name].dtype.name, restored[name].shape) == (dtype, tensor.shape)
        assert bits(np.asarray(restored[name])) == bits(tensor), name


@pytest.mark.parametrize("format", FORMATS)
def test_orbax_itself_reads_quantized_weights(source, tmp_path, format):
    with small_pieces():
        convert_to(tmp_path / "new", source, quantize=format)
    restored = ocp.load(tmp_path / "new" / "weights")
    reader = open_checkpoint(tmp_path / "new")
    assert restored.keys() == reader.tensors.keys()
    values = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "uint8"}[format]
    assert restored[NAME].dtype.name == values
    for name, array in restored.items():
        assert (array.dtype.name, array.shape) == (reader.tensors[name].dtype,
                                                   reader.tensors[name].shape)  # fmt: skip
        assert bits(np.asarray(array)) == bits(read(reader, name)), name


def test_an_array_is_plain_zarr(source, converted):
    """Read by the specification, and by TensorStore."""
    expected = load_weights(source)[NAME].numpy()
    metadata = json.loads((converted / STATE / NAME / "zarr.json").read_text())
    height, width = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    chunks = [
        np.fromfile(converted / STATE / NAME / "c" / str(number) / "0", "<f4")
        for number in range(-(-48 // height))
    ]
    assert all(chunk.size == height * width for chunk in chunks)
    rows = np.concatenate(chunks).reshape(-1, width)
    assert bits(rows[:48]) == bits(expected)
    assert not rows[48:].any()
    spec = {"driver": "zarr3", "kvstore": f"file://{converted / STATE / NAME}/"}
    assert bits(tensorstore.open(spec).result().read().result()) == bits(expected)


def test_columns_split_over_ranks_are_stored_in_two_pieces(source, converted):
    expected = load_weights(source)[SPLIT].numpy()
    assert sorted(file.name for file in (converted / STATE / SPLIT / "c/0").iterdir()) == ["0", "1"]
    halves = [
        np.concatenate([np.fromfile(file, "<f4") for file in sorted(
            (converted / STATE / SPLIT / "c").glob(f"*/{half}"), key=lambda f: int(f.parent.name)
        )])
        for half in (0, 1)
    ]  # fmt: skip
    for half, columns in zip(halves, (expected[:, :24], expected[:, 24:]), strict=True):
        assert bits(half.reshape(-1, 24)[:32]) == bits(np.ascontiguousarray(columns))
    spec = {"driver": "zarr3", "kvstore": f"file://{converted / STATE / SPLIT}/"}
    assert bits(tensorstore.open(spec).result().read().result()) == bits(expected)


def test_columns_that_cannot_be_halved_stay_together(tmp_path):
    weights = write_checkpoint(tmp_path / "hf", intermediate_size=49, num_hidden_layers=1)
    convert_to(tmp_path / "new", tmp_path / "hf")
    reader = open_checkpoint(tmp_path / "new")
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert bits(read(reader, name)) == bits(weights[name])


@pytest.mark.parametrize("layout", ["source", "converted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", [NAME, SPLIT])
def test_a_slice_is_numpys_slice(request, source, layout, dtype, name, monkeypatch):
    monkeypatch.setattr("llama_jax.checkpoint.file_array._BLOCK_BYTES", 500)  # read at a time
    reader = open_checkpoint(request.getfixturevalue(layout))
    whole = load_weights(source)[name]
    rng = np.random.default_rng(0)
    for number in range(60):
        rows, columns = (sorted(rng.integers(0, size + 1, 2)) for size in whole.shape)
        if number % 2:  # whole rows, which are read in another way
            columns = 0, whole.shape[1]
        index = np.s_[int(rows[0]) : int(rows[1]), int(columns[0]) : int(columns[1])]
        part = read(reader, name, index, numpy_dtype(dtype))
        assert bits(part) == bits(whole[index].to(getattr(torch, dtype))), index
    norm = read(reader, "model.norm.weight", (slice(5, 30),))
    assert bits(norm) == bits(load_weights(source)["model.norm.weight"][5:30])


def test_a_reader_fills_arrays_that_are_not_contiguous(converted, source):
    out = np.zeros((48, 64), np.float32)
    index = np.s_[0:48, 0:32]
    open_checkpoint(converted).read_into(NAME, index, out[:, ::2])
    np.testing.assert_array_equal(out[:, ::2], load_weights(source)[NAME])
    assert not out[:, 1::2].any()


def test_no_file_stays_open(converted):
    """A checkpoint of 70B has 2,300 chunks, and a process may often open no more than 1,024."""
    reader = open_checkpoint(converted)
    arrays = [read(reader, name) for name in reader.tensors]
    assert open_files(converted) == [] and len(arrays) == 30
    with (converted / MANIFEST).open():
        assert open_files(converted) == [str(converted / MANIFEST)]


@pytest.mark.parametrize(
    "mesh", ["4x2", *(pytest.param(m, marks=pytest.mark.slow) for m in ("1x1", "1x2", "2x2"))]
)
def test_the_logits_are_those_of_the_source_on_every_mesh(tmp_path, mesh):
    write_checkpoint(tmp_path / "hf", num_hidden_layers=5, vocab_size=83)
    with small_pieces():
        convert_to(tmp_path / "orbax", tmp_path / "hf")
    request = Request(0, 0, [1, 7, 40, 81, 3], SamplingParams(temperature=0.0, max_tokens=4))
    runs = [drive(make_loop(tmp_path / name, mesh), [request]) for name in ("hf", "orbax")]
    assert runs[0].tokens == runs[1].tokens
    assert runs[0].logits[0].keys() == runs[1].logits[0].keys() != set()
    for index, logits in runs[0].logits[0].items():
        assert np.isfinite(logits[:83]).all()
        np.testing.assert_array_equal(logits, runs[1].logits[0][index])


def test_the_manifest_lists_every_file(converted):
    manifest = json.loads((converted / MANIFEST).read_text())
    found = files(converted)
    del found[MANIFEST]
    assert manifest["files"].keys() == found.keys()
    assert {name: len(data) for name, data in found.items()} == {
        name: record["bytes"] for name, record in manifest["files"].items()
    }
    assert not check_checksums(converted)


@pytest.mark.parametrize("layout", ["orbax", "huggingface"])
def test_a_changed_byte_is_found_by_its_checksum(source, tmp_path, layout):
    path = tmp_path / "new"
    with small_pieces():
        convert_to(path, source, layout=layout)
    rng = np.random.default_rng(0)
    names = sorted(name for name, data in files(path).items() if data and name != MANIFEST)
    for name in rng.choice(names, 8).tolist():
        data = (path / name).read_bytes()
        changed = bytearray(data)
        changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        (path / name).write_bytes(changed)
        steps = []
        (problem,) = check_checksums(path, lambda *step: steps.append(step))  # noqa: B023
        assert name in problem
        assert steps[-1][0] == steps[-1][1] > 0
        (path / name).write_bytes(data)
    assert not check_checksums(path)


def test_missing_and_shortened_files_are_named_together(copy):
    first, second = copy / STATE / NAME / "c/0/0", copy / STATE / NAME / "c/3/0"
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    (copy / STATE / "_METADATA").write_text("")
    message = refusal(open_checkpoint, copy)
    for name in (f"{NAME}/c/0/0", f"{NAME}/c/3/0", "_METADATA"):
        assert f"{STATE}/{name}" in message


@pytest.mark.parametrize("damage", [lambda f: f.unlink(), lambda f: f.write_bytes(b"")])
def test_a_chunk_damaged_after_the_checkpoint_was_opened(copy, damage):
    reader = open_checkpoint(copy)
    file = copy / STATE / NAME / "c/6/0"
    damage(file)
    assert str(file) in refusal(read, reader, NAME)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"format": "llama_jax checkpoint", "version": 2}',
        '{"format": "llama_jax checkpoint", "version": 2, "layout": "orbax", "plan": "", '
        '"files": 3}',
        '{"format": "llama_jax checkpoint", "version": 2, "layout": "orbax", "plan": "", '
        '"files": {"a": {"bytes": "1", "sha256": ""}}}',
        '{"format": "llama_jax checkpoint", "version": 2, "layout": "orbax", "plan": "", '
        '"files": {"a": {"bytes": 1}}}',
        '{"format": "llama_jax checkpoint", "version": 2, "layout": "orbax", "plan": "", '
        '"files": {}, "colour": "red"}',
        '{"format": "llama_jax checkpoint", "version": 2, "layout": "zip", "plan": "", '
        '"files": {}, "quantization_error": {}}',
        '{"format": "llama_jax checkpoint", "version": 2, "layout": "orbax", "plan": "", '
        '"files": {"../a": {"bytes": 1, "sha256": ""}}, "quantization_error": {}}',
    ],
)
def test_a_damaged_manifest(copy, text):
    (copy / MANIFEST).write_text(text)
    assert MANIFEST in refusal(open_checkpoint, copy)


def test_another_version_of_the_layout(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"version": 3}))
    assert "version 3" in refusal(open_checkpoint, copy)


def rewrite(path, name: str, text: str) -> None:
    """Changes a file, and its length in the manifest."""
    (path / name).write_text(text)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name]["bytes"] = len(text)
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change",
    [
        {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"}]},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [7, 16]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 32]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [6.5, 32]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": []}}},
        {"shape": [48]},
        {"shape": 48},
        {"data_type": "complex64"},
        {"data_type": "bfloat16"},  # the chunks have twice the bytes
        {"data_type": ["float32"]},
        {"chunk_key_encoding": {"name": "v2"}},
        {"zarr_format": 2},
        {"storage_transformers": [1]},
    ],
)
def test_an_array_of_another_kind(copy, change):
    name = f"{STATE}/{NAME}/zarr.json"
    metadata = json.loads((copy / name).read_text())
    rewrite(copy, name, json.dumps(metadata | change))
    message = refusal(open_checkpoint, copy)
    assert NAME in message


@pytest.mark.parametrize("text", ["", "[]", "null", "{}"])
def test_malformed_array_metadata(copy, text):
    rewrite(copy, f"{STATE}/{NAME}/zarr.json", text)
    assert f"{NAME}/zarr.json" in refusal(open_checkpoint, copy)


def test_weights_that_the_config_does_not_describe(copy):
    config = json.loads((copy / "config.json").read_text())
    rewrite(copy, "config.json", json.dumps(config | {"num_hidden_layers": 2}))
    assert "model.layers.2.mlp.up_proj.weight" in refusal(open_checkpoint, copy)


def test_a_config_may_be_edited(copy):
    file = copy / "config.json"
    file.write_text(file.read_text() + "\n")
    assert open_checkpoint(copy).config == LlamaConfig.from_pretrained(copy)
    (problem,) = check_checksums(copy)
    assert "config.json" in problem


def test_the_source_is_read_in_the_order_of_its_files(source, tmp_path, monkeypatch):
    read_so_far = []
    read_into = HuggingFaceReader.read_into

    def note(self, name, index, out):
        read_so_far.append(name)
        read_into(self, name, index, out)

    monkeypatch.setattr(HuggingFaceReader, "read_into", note)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    convert_to(tmp_path / "new", source, verify=False)
    with safetensors.safe_open(source / "model.safetensors", "np") as file:
        in_file = file.offset_keys()
    assert list(dict.fromkeys(read_so_far)) == in_file
    assert in_file != list(checkpoint_tensors(open_checkpoint(source).config))
