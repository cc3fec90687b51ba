"""Hugging Face → Orbax → arrays: the same bits, in bounded memory, and nothing half-done passes."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tensorstore
import torch
from orbax.checkpoint import v1 as ocp
from tiny_checkpoint import bits, read, write_checkpoint

from convert import huggingface_to_orbax
from llama_jax.checkpoint import CheckpointError, open_checkpoint, orbax
from llama_jax.checkpoint.orbax import MANIFEST, OrbaxReader
from llama_jax.checkpoint.reader import numpy_dtype
from llama_jax.config import ConfigError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    write_checkpoint(path)
    (path / "tokenizer.json").write_text("{}")
    (path / "LICENSE.txt").write_text("terms")
    (path / "pytorch_model.bin").write_text("not wanted")
    return path


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_to_orbax, "CHUNK_BYTES", 1024)  # several chunks in each matrix
        size = huggingface_to_orbax.convert(source, path)
    weights = safetensors.torch.load_file(source / "model.safetensors")
    assert size == sum(tensor.nbytes for tensor in weights.values())
    return path


@pytest.fixture
def copy(tmp_path, converted):
    return shutil.copytree(converted, tmp_path / "copy")


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
def test_the_bits_survive(tmp_path, monkeypatch, dtype, tied, shard_size):
    monkeypatch.setattr(huggingface_to_orbax, "GROUP_BYTES", 40_000)  # several groups
    expected = write_checkpoint(
        tmp_path / "hf", dtype=dtype, shard_size=shard_size, tie_word_embeddings=tied
    )
    steps = []
    huggingface_to_orbax.convert(tmp_path / "hf", tmp_path / "orbax", lambda *s: steps.append(s))
    reader = open_checkpoint(tmp_path / "orbax")
    assert isinstance(reader, OrbaxReader)
    assert reader.config == open_checkpoint(tmp_path / "hf").config
    assert set(reader.tensors) == set(expected)
    for name, tensor in expected.items():
        array = read(reader, name)
        assert (array.dtype.name, array.shape) == (dtype, tensor.shape)
        assert bits(array) == bits(tensor)
    assert len(steps) > 2 and steps[0] == (0, steps[-1][1])
    assert steps[-1] == (sum(t.nbytes for t in expected.values()),) * 2


def test_orbax_itself_reads_the_weights(source, converted):
    restored = ocp.load(converted / "weights")
    expected = safetensors.torch.load_file(source / "model.safetensors")
    assert set(restored) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(restored[name], tensor.numpy())


def test_what_belongs_to_a_checkpoint_comes_along(source, converted):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "LICENSE.txt"):
        assert (converted / name).read_bytes() == (source / name).read_bytes()
    assert not (converted / "pytorch_model.bin").exists()


@pytest.mark.parametrize("index", [np.s_[3:7, 0:32], np.s_[0:96, 8:16], np.s_[50:96, 1:3]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["source", "converted"])
def test_a_slice_is_numpys_slice(request, monkeypatch, source, layout, dtype, index):
    monkeypatch.setattr(orbax, "READ_BYTES", 1)  # one row of chunks at a time
    reader = open_checkpoint(request.getfixturevalue(layout))
    name = "model.embed_tokens.weight"
    whole = safetensors.torch.load_file(source / "model.safetensors")[name]
    part = read(reader, name, index, numpy_dtype(dtype))
    assert bits(part) == bits(whole[index].to(getattr(torch, dtype)))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
def test_both_layouts_cast_as_pytorch_does(tmp_path, stored, loaded):
    """Ties, values too large or too small for the dtype, infinities and NaN included."""
    write_checkpoint(tmp_path / "hf", dtype=stored)
    file, name = tmp_path / "hf" / "model.safetensors", "model.norm.weight"
    weights = safetensors.torch.load(file.read_bytes())
    odd = [0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1e-40, np.inf, -np.inf, np.nan]
    weights[name] = torch.tensor(odd + [0.1] * (32 - len(odd))).to(getattr(torch, stored))
    safetensors.torch.save_file(weights, file)
    huggingface_to_orbax.convert(tmp_path / "hf", tmp_path / "orbax")
    for layout in ("hf", "orbax"):
        array = read(open_checkpoint(tmp_path / layout), name, dtype=numpy_dtype(loaded))
        expected = weights[name].to(getattr(torch, loaded)).float().numpy()
        np.testing.assert_array_equal(array.astype(np.float32), expected)


@pytest.mark.parametrize(
    "index", [np.s_[256:512, 0:1024], np.s_[0:1024, 256:512]], ids=["rows", "columns"]
)
def test_a_slice_reads_little_more_than_its_bytes(tmp_path, monkeypatch, index):
    monkeypatch.setattr(huggingface_to_orbax, "CHUNK_BYTES", 64 * 1024)
    name = "model.layers.0.mlp.gate_proj.weight"
    write_checkpoint(tmp_path / "hf", hidden_size=1024, intermediate_size=1024)
    huggingface_to_orbax.convert(tmp_path / "hf", tmp_path / "orbax")
    reader = open_checkpoint(tmp_path / "orbax")
    before = _bytes_read()
    part = read(reader, name, index)
    assert part.nbytes <= _bytes_read() - before <= 1.5 * part.nbytes


def _bytes_read() -> int:
    (metric,) = tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read"
    )
    return metric["values"][0]["value"]


def test_a_full_destination_is_left_alone(source, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        huggingface_to_orbax.convert(source, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_bad_source_leaves_no_destination(source, tmp_path):
    broken = shutil.copytree(source, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        huggingface_to_orbax.convert(broken, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_interrupted_conversion_is_no_checkpoint(source, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_to_orbax, "GROUP_BYTES", 1)

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        huggingface_to_orbax.convert(source, tmp_path / "new", stop)
    assert "did not finish" in refusal(tmp_path / "new")


def test_missing_and_shortened_files_are_named_together(copy):
    files = sorted(copy.glob("weights/state/ocdbt*/d/*"), key=lambda file: file.stat().st_size)
    files[-1].write_bytes(files[-1].read_bytes()[:-1])
    (copy / "weights/state/manifest.ocdbt").unlink()
    message = refusal(copy)
    assert "manifest.ocdbt is missing" in message
    assert f"{files[-1].name} has" in message


def test_damaged_weights_are_an_error_when_they_are_read(copy):
    """Lengths alone do not show it, but what Orbax keeps about its files does."""
    for file in copy.glob("weights/state/**/d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError) as caught:
        read(open_checkpoint(copy), "model.norm.weight")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "version": 1, "files": 3}'])
def test_a_broken_manifest(copy, text):
    (copy / MANIFEST).write_text(text)
    assert f"{MANIFEST} cannot be read" in refusal(copy)


def test_another_version_of_the_layout(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(manifest | {"version": 2}))
    assert "version 2" in refusal(copy)


def test_weights_that_the_config_does_not_describe(copy):
    config = json.loads((copy / "config.json").read_text())
    text = json.dumps(config | {"num_hidden_layers": 2})
    (copy / "config.json").write_text(text)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"]["config.json"] = len(text)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert "model.layers.2.mlp.up_proj.weight belongs to no weight" in refusal(copy)


def start(*arguments, stderr=subprocess.PIPE):
    """`python -m convert` with these arguments, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "convert", *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        env={name: value for name, value in os.environ.items() if not name.startswith("JAX_")},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def run(*arguments) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate()
    return process.returncode, out, err


def test_the_command_line(source, tmp_path):
    code, out, err = run("hf", source, tmp_path / "new")
    assert (code, out) == (0, "")
    assert re.fullmatch(rf"\s*Wrote 0.00 GB of weights to {tmp_path}/new in \d+ s.\n", err)
    assert open_checkpoint(tmp_path / "new").tensors
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run("hf", source, tmp_path / "new")
    assert (code, out) == (1, "")
    assert err.strip() == (
        f"error: {tmp_path}/new exists and is not an empty directory: choose another, or delete it."
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_line_refuses_what_is_no_source(tmp_path):
    code, _, err = run("hf", tmp_path / "none", tmp_path / "new")
    assert (code, err.strip()) == (1, f"error: There is no directory {tmp_path}/none.")
    assert not (tmp_path / "new").exists()
    code, _, err = run("gguf", tmp_path, tmp_path / "new")
    assert code == 2 and "invalid choice: 'gguf'" in err


def test_help():
    code, out, _ = run("--help")
    assert code == 0 and "python -m convert hf SRC DST" in out


def test_progress_is_shown_on_a_terminal(source, tmp_path):
    screen, terminal = pty.openpty()
    process = start("hf", source, tmp_path / "new", stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the end, once nobody has the terminal open
        while part := os.read(screen, 4096):
            shown += part
    os.close(screen)
    assert process.wait() == 0
    size = sum(t.nbytes for t in safetensors.torch.load_file(source / "model.safetensors").values())
    assert b"writing weights" in shown
    assert f"{size / 1000:.1f}/{size / 1000:.1f} kB".encode() in shown


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -15), (signal.SIGKILL, -9)]
)
def test_what_is_left_of_a_stopped_conversion_is_no_checkpoint(source, tmp_path, sent, status):
    process = start("hf", source, tmp_path / "new")
    while not (tmp_path / "new").exists():
        assert process.poll() is None
    process.send_signal(sent)
    out, err = process.communicate()
    assert process.returncode == status, err
    assert "Traceback" not in out + err
    with pytest.raises((CheckpointError, ConfigError)):
        open_checkpoint(tmp_path / "new")
