"""Faults of sources and destinations: one sentence each, and no directory looks complete."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from convert import commands, conversion
from convert.__main__ import main
from convert.destination import explain
from convert.task import WORKER_BYTES, Stopped
from llama_jax.checkpoint import CheckpointError, manifest, open_checkpoint
from tests.support.another_user import as_another_user
from tests.support.conversions import change_weights, convert_to, files, refusal, small_pieces
from tests.support.tiny_checkpoint import write_checkpoint

NAME = "model.layers.0.mlp.gate_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def pieces():
    with small_pieces(shard=8000) as patch:
        yield patch


@pytest.fixture
def hf(tmp_path):
    write_checkpoint(tmp_path / "hf", num_hidden_layers=1)
    return tmp_path / "hf"


@pytest.fixture
def new(tmp_path):
    return tmp_path / "new"


def assert_incomplete(path) -> None:
    """Neither this program nor transformers can open it."""
    refusal(open_checkpoint, path)
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    ("value", "dtype", "options"),
    [
        (np.nan, "bfloat16", {}),
        (np.inf, "float16", {}),
        (-np.inf, "float32", {}),
        (np.nan, "float32", {"quantize": "int8"}),
        (np.inf, "bfloat16", {"quantize": "int4"}),
        (-np.inf, "float16", {"layout": "huggingface", "dtype": "float32"}),
    ],
)
def test_nan_and_infinity_are_rejected(tmp_path, new, value, dtype, options):
    write_checkpoint(tmp_path / "hf", num_hidden_layers=1, dtype=dtype)
    change_weights(tmp_path / "hf", lambda w: w[NAME].__setitem__((47, 31), value))
    message = refusal(convert_to, new, tmp_path / "hf", **options)
    assert NAME in message and "NaN" in message
    assert_incomplete(new)


def test_an_e4m3_value_that_is_nan(hf, tmp_path, new):
    convert_to(tmp_path / "fp8", hf, quantize="fp8")
    file = tmp_path / "fp8/weights/state" / NAME / "c/0/0"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    message = refusal(convert_to, new, tmp_path / "fp8")
    assert NAME in message and "NaN" in message


def test_a_scale_that_is_nan(hf, tmp_path, new):
    convert_to(tmp_path / "int8", hf, quantize="int8")
    scale = tmp_path / "int8/weights/state" / f"{NAME}_scale" / "c/0"
    scale.write_bytes(np.full(scale.stat().st_size // 4, np.nan, np.float32).tobytes())
    message = refusal(convert_to, new, tmp_path / "int8", layout="huggingface", quantize="plain")
    assert f"{NAME}_scale" in message and "NaN" in message


@pytest.mark.parametrize("damage", ["truncated", "header", "missing", "outside", "two shards"])
def test_a_damaged_source_leaves_no_destination(tmp_path, new, damage):
    path = tmp_path / "hf"
    write_checkpoint(path, shard_size="20KB")
    first, second, *_ = sorted(path.glob("*.safetensors"))
    index = json.loads((path / INDEX).read_text())
    if damage == "truncated":
        second.write_bytes(second.read_bytes()[:-1])
    elif damage == "header":
        text = b'{"a": 1}'
        first.write_bytes(len(text).to_bytes(8, "little") + text)
    elif damage == "missing":
        second.unlink()
    elif damage == "outside":
        index["weight_map"][NAME] = "../model.safetensors"
        (path / INDEX).write_text(json.dumps(index))
    else:
        weights = safetensors.torch.load(first.read_bytes())
        other = safetensors.torch.load(second.read_bytes())
        safetensors.torch.save_file(other | {next(iter(weights)): torch.zeros(3)}, second)
    what = {
        "truncated": second.name,
        "header": first.name,
        "missing": second.name,
        "outside": "../model.safetensors",
        "two shards": second.name,
    }
    assert what[damage] in refusal(convert_to, new, path)
    assert not new.exists()


def test_impossible_destinations(hf, tmp_path, new):
    before = files(hf)
    for inside in (hf, hf / "new", hf / "a" / ".." / "b", tmp_path / "x" / ".." / "hf"):
        assert str(inside) in refusal(convert_to, inside, hf)
    (tmp_path / "link").symlink_to(hf)
    assert "link/new" in refusal(convert_to, tmp_path / "link" / "new", hf)
    (tmp_path / "file").write_text("mine")
    assert "file" in refusal(convert_to, tmp_path / "file", hf)
    assert "file" in refusal(convert_to, tmp_path / "file" / "new", hf)
    for name, target in (("loop", "loop"), ("nowhere", "missing")):
        (tmp_path / name).symlink_to(tmp_path / target)
        assert "a link to nothing" in refusal(convert_to, tmp_path / name, hf)
    refusal(convert_to, tmp_path / "loop" / "new", hf)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    for resume in (False, True):
        assert "full" in refusal(convert_to, tmp_path / "full", hf, resume=resume)
    assert files(tmp_path / "full") == {"mine": b"precious"}
    assert files(hf) == before
    convert_to(new, hf)
    whole = files(new)
    assert str(new) in refusal(convert_to, new, hf)
    assert files(new) == whole


def test_too_little_memory(hf, new):
    assert "--max-memory" in refusal(convert_to, new, hf, max_memory=WORKER_BYTES - 1)
    assert not new.exists()


def test_as_many_workers_as_fit_into_the_memory(hf, new, pieces):
    started = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers):
            started.append(workers)
            super().__init__(workers)

    pieces.setattr(conversion, "ThreadPoolExecutor", Pool)
    pieces.setattr(os, "cpu_count", lambda: 64)
    convert_to(new, hf, max_memory=3 * WORKER_BYTES - 1, verify=False)
    assert started == [2]


def test_free_space_is_checked_first(hf, new, tmp_path, pieces):
    usage = namedtuple("usage", "total used free")
    size = sum(f.stat().st_size for f in hf.glob("*.safetensors"))
    pieces.setattr(shutil, "disk_usage", lambda path: usage(0, 0, size // 2))
    assert str(new / "deep") in refusal(convert_to, new / "deep", hf)
    assert not new.exists()
    new.mkdir()
    refusal(convert_to, new, hf)
    assert not list(new.iterdir())


def test_resuming_needs_space_only_for_the_rest(hf, new, pieces):
    """Unfinished files are deleted before the check."""

    def progress(phase, done, total):
        if done > total * 0.7:
            raise InterruptedError

    with contextlib.suppress(InterruptedError, ValueError):
        convert_to(new, hf, progress)
    asked = []

    def disk_usage(path):
        asked.append([*new.rglob("*.part")])
        return namedtuple("usage", "total used free")(0, 0, 25_000)

    pieces.setattr(shutil, "disk_usage", disk_usage)
    report = convert_to(new, hf, resume=True)
    assert report.bytes - report.resumed < 25_000 < report.bytes
    assert asked == [[]]


@pytest.mark.parametrize("layout", ["orbax", "huggingface"])
@pytest.mark.parametrize("stage", ["weights", "index", "config", "manifest"])
def test_a_full_disk(hf, new, tmp_path, layout, stage):
    """The file about to be written is a link to /dev/full."""
    convert_to(tmp_path / "whole", hf, layout="huggingface")
    shard = sorted((tmp_path / "whole").glob("*.safetensors"))[2].name
    names = {
        "weights": ["weights/state/model.norm.weight/c/0.part", f"{shard}.part"],
        "index": ["weights/state/_METADATA", INDEX],
        "config": ["config.json"] * 2,
        "manifest": ["llama_jax.json.part"] * 2,
    }
    file = new / names[stage][layout == "huggingface"]

    def progress(phase, done, total):
        if not file.is_symlink():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to("/dev/full")

    message = refusal(convert_to, new, hf, progress, layout=layout)
    assert str(new) in message and "--resume" in message
    refusal(open_checkpoint, new)
    if stage != "manifest":  # before this stage, other programs cannot open it either
        assert_incomplete(new)
    if not file.name.endswith(".part"):
        file.unlink()
    convert_to(new, hf, layout=layout, resume=True)
    open_checkpoint(new).close()


def test_a_full_temporary_folder(hf, new, tmp_path, pieces, capsys):
    """The small files are tried out there. An error of writing names no file."""

    class Full(tempfile.TemporaryDirectory):
        def __enter__(self):
            (Path(self.name) / "config.json").symlink_to("/dev/full")
            return super().__enter__()

    pieces.setattr(commands, "TemporaryDirectory", Full)
    assert main(["hf", str(hf), str(new)]) == 1
    assert "is full: free space" in capsys.readouterr().err
    assert not new.exists()


def test_a_full_quota_is_a_full_disk(new):
    message = str(explain(OSError(errno.EDQUOT, "Disk quota exceeded"), new))
    assert str(new) in message and "--resume" in message


def test_an_error_stops_the_other_workers(hf, new, pieces):
    begun, numbers, ended = threading.Barrier(2), itertools.count(), []

    def run(task, directory, advance, stopped):
        number = next(numbers)
        if number < 2:  # others may begin before the error is seen
            begun.wait(60)
        if number == 0:
            raise CheckpointError("It failed.")
        end = time.monotonic() + 60
        while not stopped():
            assert time.monotonic() < end
        ended.append(number)
        raise Stopped

    pieces.setattr(conversion, "run_task", run)
    pieces.setattr(os, "cpu_count", lambda: 2)
    assert refusal(convert_to, new, hf) == "It failed."
    assert 1 in ended


@pytest.mark.parametrize("value", [10**400, float("nan"), "much"])
def test_a_damaged_manifest(hf, new, value):
    convert_to(new, hf)
    file = new / manifest.MANIFEST
    content = json.loads(file.read_text()) | {"quantization_error": {"mlp.w_up": value}}
    file.write_text(json.dumps(content))
    assert "damaged" in refusal(open_checkpoint, new)


def test_a_weight_file_that_another_program_has_written(hf, new):
    convert_to(new, hf, layout="huggingface")
    file = next(new.glob("*.safetensors"))
    weights = safetensors.torch.load(file.read_bytes())
    safetensors.torch.save_file({name: weight.half() for name, weight in weights.items()}, file)
    message = refusal(open_checkpoint, new)
    assert file.name in message and "bytes instead of" in message


def test_a_manifest_with_a_name_that_no_file_can_have(hf, new):
    convert_to(new, hf)
    file = new / manifest.MANIFEST
    content = json.loads(file.read_text())
    content["files"]["a\0b"] = {"bytes": 1, "sha256": ""}
    file.write_text(json.dumps(content))
    assert r"a\x00b is missing" in refusal(open_checkpoint, new)


@pytest.mark.parametrize(
    ("scale", "named"),
    [
        (torch.tensor([np.nan]), "NaN"),
        (torch.ones(1, dtype=torch.float64), "F64"),
        (torch.zeros(1, dtype=torch.int64), "I64"),
    ],
)
def test_scales_of_the_cache_that_cannot_be_kept(hf, new, scale, named):
    name = "model.layers.0.self_attn.k_scale"
    change_weights(hf, lambda weights: weights.update({name: scale}))
    message = refusal(convert_to, new, hf)
    assert name in message and named in message


def test_a_config_with_text_that_utf_8_cannot_hold(hf, new):
    file = hf / "config.json"
    file.write_text(file.read_text().replace("{", r'{"_name_or_path": "\ud800 über",', 1))
    convert_to(new, hf)
    assert json.loads((new / "config.json").read_text())["_name_or_path"] == "\ud800 über"


def test_a_destination_without_write_permission(pieces):
    with tempfile.TemporaryDirectory() as name:  # accessible to other users
        path = Path(name)
        write_checkpoint(path / "hf", num_hidden_layers=1)
        (path / "locked").mkdir(mode=0o555)
        for readable in (path, path / "hf", *(path / "hf").iterdir()):
            readable.chmod(0o755)
        with as_another_user():
            message = refusal(convert_to, path / "locked" / "new", path / "hf")
            assert f"{path}/locked/new" in message
            assert f"{path}/locked" in refusal(convert_to, path / "locked", path / "hf")
        assert not list((path / "locked").iterdir())


@pytest.mark.parametrize("layout", ["orbax", "huggingface"])
def test_bytes_changed_by_the_disk_are_found_by_the_comparison(hf, new, pieces, layout):
    finish = conversion.LAYOUTS[layout][0].finish

    def flip(directory, weights):
        finish(directory, weights)
        file = max(directory.rglob("*.safetensors" if layout == "huggingface" else "0"),
                   key=lambda f: f.stat().st_size if f.is_file() else 0)  # fmt: skip
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    pieces.setattr(conversion.LAYOUTS[layout][0], "finish", flip)
    assert str(new) in refusal(convert_to, new, hf, layout=layout)
    assert_incomplete(new)


def test_everything_is_flushed_before_the_manifest(hf, new, pieces):
    """Each file and each directory, the manifest last; and the weights before config.json."""
    synced = []

    def fsync(handle):
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), new))

    pieces.setattr(os, "fsync", fsync)
    convert_to(new, hf)
    everything = {str(file.relative_to(new)) for file in new.rglob("*")} - {manifest.MANIFEST}
    assert everything < set(synced)
    assert synced[-2:] == [f"{manifest.MANIFEST}.part", "."]
    chunks = {name for name in everything if "/c/" in name}
    assert chunks <= set(synced[: synced.index("config.json")])
