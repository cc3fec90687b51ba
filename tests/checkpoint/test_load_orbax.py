"""Loading the Orbax layout: any chunks, any mesh, and independence of the files afterwards."""

import os
import resource
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from convert import orbax_layout
from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.load import load_params
from sharding.mesh import make_mesh
from tests.support.conversions import convert_to, refusal, small_pieces
from tests.support.processes import open_files
from tests.support.tiny_checkpoint import bits, write_checkpoint

FLOAT32, BFLOAT16 = np.dtype("float32"), jax.numpy.dtype("bfloat16")
# Five layers on four stages: three stages have a padding layer. Of the vocabulary each of eight
# devices has 11 rows, but the last one only 6.
SIZES = {"num_hidden_layers": 5, "vocab_size": 83}


def write(path: Path, **options) -> dict[str, torch.Tensor]:
    """Writes a checkpoint to `path`/hf and `path`/orbax, in many chunks; returns its weights."""
    weights = write_checkpoint(path / "hf", **(SIZES | options))
    with small_pieces(chunk=512):
        convert_to(path / "orbax", path / "hf", verify=False)
    return weights


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write(path)
    assert len(list((path / "orbax").rglob("c/*/0"))) > 300
    return path


def load(path: Path, mesh: str = "4x2", dtype=FLOAT32):
    reader = open_checkpoint(path)
    params = load_params(reader, make_mesh(mesh), dtype)
    reader.close()
    return params


def assert_equal(one, other) -> None:
    leaves = zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True)
    for (name, a), b in leaves:
        assert bits(np.asarray(a)) == bits(np.asarray(b)), jax.tree_util.keystr(name)


@pytest.mark.parametrize("mesh", ["1x1", "1x2", "2x2", "4x2"])
def test_weights_are_put_together_from_many_chunks(path, mesh):
    assert_equal(load(path / "orbax", mesh), load(path / "hf", mesh))


@pytest.mark.parametrize("pieces", [1, 4, 5])
def test_columns_may_be_cut_into_any_number_of_pieces(tmp_path, monkeypatch, path, pieces):
    """Other versions of `convert` may choose another number; 5 divides no width."""
    monkeypatch.setattr(orbax_layout, "COLUMN_PIECES", pieces)
    convert_to(tmp_path / "new", path / "hf")
    for mesh in ("1x1", "1x2"):
        assert_equal(load(tmp_path / "new", mesh), load(path / "hf", mesh))


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_weights_are_cast_to_the_dtype_of_the_activations(tmp_path, layout):
    weights = write(tmp_path, dtype="bfloat16")
    for dtype, wanted in ((FLOAT32, torch.float32), (BFLOAT16, torch.bfloat16)):
        params = load(tmp_path / layout, "1x2", dtype)
        for name, array in (
            ("model.embed_tokens.weight", params.embedding[:83]),
            ("model.layers.1.self_attn.o_proj.weight", params.layers[1]["attention.wo"][0]),
        ):
            assert bits(np.asarray(array)) == bits(weights[name].to(wanted)), name


@pytest.mark.parametrize("layout", ["hf", "orbax"])
@pytest.mark.parametrize("then", ["deleted", "replaced", "overwritten"])
def test_loaded_weights_do_not_depend_on_the_files(tmp_path, path, layout, then):
    served = shutil.copytree(path / layout, tmp_path / "served")
    params = load(served)
    if then == "overwritten":
        for file in filter(Path.is_file, served.rglob("*")):
            with file.open("r+b") as opened:
                opened.write(bytes(file.stat().st_size))
    else:
        shutil.rmtree(served)
    if then == "replaced":
        changed = write(tmp_path / "new", initializer_range=0.5)
        (tmp_path / "new" / layout).rename(served)
        np.testing.assert_array_equal(
            np.asarray(load(served).embedding)[:83], changed["model.embed_tokens.weight"]
        )
    assert_equal(params, load(path / "hf"))


def test_no_file_stays_open(path):
    """A 70B checkpoint has thousands of chunks, and a process may often open only 1,024 files."""
    opened = [int(number) for number in os.listdir("/proc/self/fd")]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(opened) + 16, limits[1]))
    try:
        load(path / "orbax")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert open_files(path) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: os.truncate(file, 0),
        lambda file: os.truncate(file, file.stat().st_size // 4),
    ],
    ids=["deleted", "empty", "truncated"],
)
@pytest.mark.parametrize("columns", [slice(0, 32), slice(8, 24)], ids=["rows", "columns"])
@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_a_file_damaged_after_the_checkpoint_was_opened(tmp_path, path, layout, damage, columns):
    copy = shutil.copytree(path / layout, tmp_path / "copy")
    name = "model.layers.3.mlp.up_proj.weight"
    chunk = copy / f"weights/state/{name}/c/0/0"
    file = chunk if layout == "orbax" else copy / "model.safetensors"
    reader = open_checkpoint(copy)
    damage(file)
    index = (slice(0, 48), columns)
    assert str(file) in refusal(reader.read_into, name, index, np.empty((48, 32), FLOAT32)[index])
    assert str(file) in refusal(load_params, reader, make_mesh("1x1"), FLOAT32)
