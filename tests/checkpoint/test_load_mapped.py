"""Shards of an Orbax checkpoint that are pages of its files: in place, and safe from both sides."""

import ctypes
import gc
import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from convert import orbax_layout
from llama_jax.checkpoint import open_checkpoint, pages
from llama_jax.checkpoint.load import load_params
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.model import Llama
from sharding.mesh import make_mesh
from tests.support.conversions import convert_to, files, refusal, small_pieces
from tests.support.reference import Request, drive, make_loop
from tests.support.tiny_checkpoint import bits, write_checkpoint

FLOAT32, BFLOAT16 = np.dtype("float32"), jax.numpy.dtype("bfloat16")
# Five layers on four stages: three stages have a padding layer. Rows of 4 KiB, a page, and of the
# vocabulary 11 for each of eight devices, but 6 for the last, whose others are padding.
SIZES = {"hidden_size": 1024, "num_hidden_layers": 5, "vocab_size": 83}
COLUMNS_SPLIT = ("attention.wo", "mlp.w_down")


def write(path: Path, dtype: str = "float32", chunk: int | None = None, **sizes) -> dict:
    """Writes a checkpoint at `path`/hf and `path`/orbax, and returns its weights."""
    weights = write_checkpoint(path / "hf", dtype=dtype, **(SIZES | sizes))
    with small_pieces(chunk=chunk or 64 << 20, block=1 << 20):
        convert_to(path / "orbax", path / "hf", verify=False)
    return weights


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint whose matrices lie in one file each."""
    path = tmp_path_factory.mktemp("whole")
    write(path)
    return path


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The same weights in files of at most 16 KiB: 11 rows lie in four files at least."""
    path = tmp_path_factory.mktemp("cut")
    write(path, chunk=16384)
    assert len(list((path / "orbax").rglob("c/*/0"))) > 400
    return path


def load(path: Path, mesh: str, dtype=FLOAT32):
    reader = open_checkpoint(path)
    params = load_params(reader, make_mesh(mesh), dtype)
    reader.close()
    return params


def shards(params) -> list[tuple[str, jax.Array]]:
    """The name of its array, and the data, of each shard in this process."""
    return [
        (jax.tree_util.keystr(path), shard.data)
        for path, array in jax.tree_util.tree_leaves_with_path(params)
        for shard in array.addressable_shards
    ]


def mapped_files(path: Path) -> list[tuple[int, int, str]]:
    """First address, end and name of every part of this process's memory that is a file's."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, *_, name = line.split(maxsplit=5)
        if name.startswith(str(path)):
            assert rights == "rw-p"  # private: what is written there is not the file's
            first, end = (int(address, 16) for address in addresses.split("-"))
            found.append((first, end, name))
    return found


def is_in_place(data: jax.Array, maps: list[tuple[int, int, str]]) -> bool:
    """Whether every byte of it lies in maps of files."""
    at = data.unsafe_buffer_pointer()
    end = at + data.nbytes
    for first, stop, _ in sorted(maps):
        if first <= at < stop:
            at = stop
    return at >= end


def assert_equal(one, other) -> None:
    for (name, a), (_, b) in zip(shards(one), shards(other), strict=True):
        assert bits(np.asarray(a)) == bits(np.asarray(b)), name


@pytest.mark.parametrize("mesh", ["1x1", "1x2", "2x2", "4x2"])
@pytest.mark.parametrize("layout", ["path", "cut"])
def test_mapped_weights_are_those_that_are_copied(request, layout, mesh):
    path = request.getfixturevalue(layout)
    params = load(path / "orbax", mesh)
    assert mapped_files(path / "orbax")
    copied = load(path / "hf", mesh)
    assert not mapped_files(path / "hf")
    assert_equal(params, copied)


def in_place(path: Path, mesh: str) -> dict[str, list[bool]]:
    """For each array whether each of its shards lies in maps of the checkpoint's files."""
    params = load(path, mesh)
    maps = mapped_files(path)
    found: dict[str, list[bool]] = {}
    for name, data in shards(params):
        found.setdefault(name, []).append(is_in_place(data, maps))
    return found


@pytest.mark.parametrize("layout", ["path", "cut"])
def test_what_is_a_run_of_bytes_lies_in_place(request, layout):
    found = in_place(request.getfixturevalue(layout) / "orbax", "4x2")
    for name, shards_in_place in found.items():
        expected = [True] * 8
        if "w_down" in name and layout == "cut":
            expected = [False] * 8  # of several files, whose lengths are no multiple of a page
        elif name.startswith(".layers[1]"):
            expected = [True] * 2 + [False] * 6  # padding layers
        elif name in (".embedding", ".lm_head"):
            expected = [True] * 7 + [False]  # padding of the vocabulary
        assert shards_in_place == expected, name
    assert not pages._abandoned  # nothing was tried in vain


def test_columns_that_are_not_cut_as_the_ranks_are_copied(path):
    for name, (shard_in_place,) in in_place(path / "orbax", "1x1").items():
        assert shard_in_place != any(map(name.count, COLUMNS_SPLIT)), name


@pytest.mark.parametrize("pieces", [1, 4, 5])
@pytest.mark.parametrize("mesh", ["1x1", "1x2"])
def test_columns_may_be_cut_in_any_number_of_pieces(tmp_path, monkeypatch, path, pieces, mesh):
    """As other versions of `convert` may choose; 5 divide none."""
    monkeypatch.setattr(orbax_layout, "COLUMN_PIECES", pieces)
    convert_to(tmp_path / "new", path / "hf")
    found = in_place(tmp_path / "new", mesh)
    for name in COLUMNS_SPLIT:
        whole_rows = mesh == "1x1" and pieces in (1, 5)
        assert found[f".layers[0]['{name}']"] == [whole_rows] * int(mesh[-1])
    assert_equal(load(tmp_path / "new", mesh), load(path / "hf", mesh))


@pytest.mark.parametrize("mesh", ["1x1", "4x2"])
def test_the_logits_are_those_of_copied_weights(cut, mesh):
    request = Request(0, 0, [1, 7, 40, 81, 3], SamplingParams(temperature=0.0, max_tokens=3))
    runs = []
    for name in ("hf", "orbax"):
        loop = make_loop(cut / name, mesh)
        assert bool(mapped_files(cut / name)) == (name == "orbax")
        runs.append(drive(loop, [request]))
    assert runs[0].tokens == runs[1].tokens
    assert len(runs[0].logits[0]) == 3
    for index, logits in runs[0].logits[0].items():
        assert np.isfinite(logits[:83]).all()
        np.testing.assert_array_equal(logits, runs[1].logits[0][index])


def test_whole_weights_lie_in_place(path):
    model = Llama.from_pretrained(path / "orbax")
    expected = Llama.from_pretrained(path / "hf")
    maps = mapped_files(path / "orbax")
    for ours, theirs in ((model.lm_head, expected.lm_head), (model.embedding, expected.embedding)):
        assert is_in_place(ours[...], maps)
        np.testing.assert_array_equal(ours[...], theirs[...])


def test_the_pages_go_with_the_weights(tmp_path, path):
    copy = shutil.copytree(path / "orbax", tmp_path / "copy")
    params = load(copy, "4x2")
    assert mapped_files(copy)
    del params
    gc.collect()
    assert not mapped_files(copy)


def test_nothing_that_is_done_to_the_weights_changes_the_files(path):
    before = files(path / "orbax")
    params = load(path / "orbax", "4x2")
    maps = mapped_files(path / "orbax")
    data = dict(shards(params))[".final_norm"]
    assert is_in_place(data, maps)
    ctypes.memset(data.unsafe_buffer_pointer(), 0xFF, data.nbytes)
    assert np.isnan(np.asarray(data)).all()  # it is the memory of the array
    change = jax.jit(lambda tree: jax.tree.map(lambda array: array * 0 + 7, tree), donate_argnums=0)
    changed = jax.block_until_ready(change(params))
    assert (np.asarray(changed.layers[0]["mlp.w_up"]) == 7).all()
    assert files(path / "orbax") == before


@pytest.mark.parametrize("then", ["deleted", "replaced"])
def test_the_checkpoint_may_go_while_its_weights_are_used(tmp_path, path, then):
    served = shutil.copytree(path / "orbax", tmp_path / "served")
    params = load(served, "4x2")
    maps = mapped_files(served)
    shutil.rmtree(served)
    if then == "replaced":
        changed = write(tmp_path / "new", initializer_range=0.5)
        (tmp_path / "new" / "orbax").rename(served)
        np.testing.assert_array_equal(
            np.asarray(load(served, "4x2").embedding)[:83], changed["model.embed_tokens.weight"]
        )
    assert all(is_in_place(data, maps) for _, data in shards(params.embedding)[:7])
    assert_equal(params, load(path / "hf", "4x2"))


def test_a_whole_file_renamed_over_one_that_is_mapped_changes_nothing(tmp_path, path):
    served = shutil.copytree(path / "orbax", tmp_path / "served")
    params = load(served, "4x2")
    for file in served.rglob("c/*/0"):
        new = file.with_name("new")
        new.write_bytes(bytes(file.stat().st_size))
        new.rename(file)
    assert_equal(params, load(path / "hf", "4x2"))


def test_no_file_stays_open_however_many_are_mapped(cut):
    """A checkpoint of 70B has thousands of chunks, and a process may often open no more than
    1,024."""
    opened = [int(number) for number in os.listdir("/proc/self/fd")]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened) + 16, limits[1]))
    try:
        params = load(cut / "orbax", "4x2")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len({name for *_, name in mapped_files(cut)}) > 300
    assert len(os.listdir("/proc/self/fd")) <= len(opened)
    assert_equal(params, load(cut / "hf", "4x2"))


def test_numbers_that_are_cast_are_copied(tmp_path):
    weights = write(tmp_path, dtype="bfloat16")
    params = load(tmp_path / "orbax", "1x2", FLOAT32)
    assert not mapped_files(tmp_path)
    expected = weights["model.embed_tokens.weight"].float()
    assert bits(np.asarray(params.embedding)[:83]) == bits(expected)
    stored = load(tmp_path / "orbax", "1x2", BFLOAT16)
    assert mapped_files(tmp_path)
    assert bits(np.asarray(stored.embedding)[:83]) == bits(weights["model.embed_tokens.weight"])


def test_what_is_not_aligned_is_copied(tmp_path):
    """Eleven rows of 80 bytes: of eight devices each fourth begins at a multiple of 64 bytes."""
    weights = write(tmp_path, dtype="bfloat16", hidden_size=40)
    reader = open_checkpoint(tmp_path / "orbax")
    for device in range(7):
        rows = slice(11 * device, 11 * device + 11)
        mapped = reader.map("model.embed_tokens.weight", (rows, slice(0, 40)), BFLOAT16)
        assert (mapped is not None) == (device in (0, 4))
    params = load(tmp_path / "orbax", "4x2", BFLOAT16)
    assert bits(np.asarray(params.embedding)[:83]) == bits(weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("call", ["mmap", "madvise"])
def test_files_that_the_system_does_not_map_are_copied(path, monkeypatch, call):
    """A file system without maps; a kernel before 5.14, which reads no pages when asked to."""
    refused = []
    monkeypatch.setattr(pages, "_abandoned", [])

    def refuse(*arguments):
        refused.append(arguments)
        return {"mmap": pages._FAILED, "madvise": -1}[call]

    libc = pages._libc()
    calls = {"mmap": libc.mmap, "madvise": libc.madvise} | {call: refuse}
    monkeypatch.setattr(pages, "_libc", lambda: SimpleNamespace(**calls))
    params = load(path / "orbax", "4x2")
    assert refused
    gc.collect()
    assert not mapped_files(path / "orbax")
    assert_equal(params, load(path / "hf", "4x2"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: os.truncate(file, 4096),
        lambda file: os.truncate(file, file.stat().st_size - 100),
    ],
)
def test_a_file_that_is_damaged_once_the_checkpoint_is_open(tmp_path, path, damage):
    """Past the end of a file a map holds zeros up to the next page, and then ends the process."""
    copy = shutil.copytree(path / "orbax", tmp_path / "copy")
    file = copy / "weights/state/model.layers.3.mlp.up_proj.weight/c/0/0"
    metadata = json.loads((file.parents[2] / "zarr.json").read_text())
    assert metadata["shape"] == [48, 1024]
    reader = open_checkpoint(copy)
    damage(file)
    assert str(file) in refusal(load_params, reader, make_mesh("4x2"), FLOAT32)
