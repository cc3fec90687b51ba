"""`compare` finds every difference, and nothing else."""

import itertools
import json
import os
import shutil
import signal
from contextlib import closing
from functools import partial

import ml_dtypes
import numpy as np
import pytest

from convert.verification import compare
from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.orbax import OrbaxReader
from tests.support.conversions import FORMATS, convert_to, small_pieces
from tests.support.foreign_writer import GPTQ, gptq, write_foreign
from tests.support.tiny_checkpoint import write_checkpoint

LAYERED = "model.layers.1.mlp.gate_proj.weight"
KINDS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", LAYERED,
         "model.layers.2.input_layernorm.weight")  # fmt: skip
DTYPES = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn, "int4": np.uint8}


@pytest.fixture(autouse=True)
def pieces():
    with small_pieces():
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One model in every form."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(root / "hf", dtype="bfloat16")
    with small_pieces():
        convert_to(root / "orbax", root / "hf")
        convert_to(root / "back", root / "orbax", layout="huggingface")
        convert_to(root / "float32", root / "hf", dtype="float32")
        for format in FORMATS:
            convert_to(root / format, root / "hf", quantize=format)
            convert_to(root / f"{format}_plain", root / format, quantize="plain")
    return root


def differences(one, other, workers=2) -> list[str]:
    steps = []
    readers = (open_checkpoint(one), OrbaxReader(other) if (other / "weights").is_dir()
               else open_checkpoint(other))  # fmt: skip
    found = compare(*readers, workers, lambda *step: steps.append(step))
    assert not steps or steps[-1][0] == steps[-1][1] > 0
    return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *itertools.product(("hf", "orbax", "back"), ("hf", "orbax", "back", "float32", *FORMATS)),
        *((format, format) for format in FORMATS),
        *((format, f"{format}_plain") for format in FORMATS),
    ],
)
def test_equal_checkpoints_do_not_differ(checkpoints, one, other):
    assert differences(checkpoints / one, checkpoints / other) == []


def test_dequantized_weights_differ_from_the_original(checkpoints):
    for format in FORMATS:
        found = differences(checkpoints / "hf", checkpoints / f"{format}_plain")
        assert len(found) == 3 * 7
        assert differences(checkpoints / "hf", checkpoints / "orbax", 1) == []


def chunk_of(path, name: str, row: int):
    """The file that holds a row of an array, and the row's number in it."""
    array = path / "weights/state" / name
    height = json.loads((array / "zarr.json").read_text())["chunk_grid"]["configuration"][
        "chunk_shape"][0]  # fmt: skip
    file = array / "c" / str(row // height)
    return (file / "0" if file.is_dir() else file), row % height


def change(path, name, row, dtype, width, edit) -> None:
    """Edits one row of an array where it lies."""
    file, at = chunk_of(path, name, row)
    rows = np.frombuffer(bytearray(file.read_bytes()), dtype).reshape(-1, width)
    edit(rows[at])
    file.write_bytes(rows.tobytes())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("bit", [0, 15, *(pytest.param(b, marks=pytest.mark.slow) for b in (6, 7))])
def test_any_flipped_bit_of_an_unquantized_weight(checkpoints, tmp_path, name, bit):
    path = shutil.copytree(checkpoints / "orbax", tmp_path / "new")
    size = {"model.embed_tokens.weight": 96, "lm_head.weight": 96, LAYERED: 48}.get(name, 32)
    width = 32 if size > 32 else 1
    for row, column in ((0, 0), (size - 1, width - 1), (size // 2, width // 2)):

        def flip(numbers, column=column):
            numbers[column] ^= 1 << bit

        change(path, name, row, np.uint16, width, flip)
        place = [row, column] if width > 1 else [row]
        (problem,) = differences(checkpoints / "hf", path)
        assert name in problem and str(place) in problem
        change(path, name, row, np.uint16, width, flip)
    assert differences(checkpoints / "hf", path) == []


def test_the_sign_of_a_zero(checkpoints, tmp_path):
    """Compared as numbers, 0.0 and -0.0 would be equal."""
    paths = [shutil.copytree(checkpoints / "orbax", tmp_path / name) for name in ("plus", "minus")]
    for path, bits in zip(paths, (0x0000, 0x8000), strict=True):
        change(path, LAYERED, 0, np.uint16, 32, lambda numbers, bits=bits: numbers.fill(bits))
    (problem,) = differences(*paths)
    assert LAYERED in problem


def test_swapped_rows(checkpoints, tmp_path):
    path = shutil.copytree(checkpoints / "orbax", tmp_path / "new")
    file, _ = chunk_of(path, LAYERED, 3)
    rows = np.frombuffer(file.read_bytes(), np.uint16).reshape(-1, 32)
    file.write_bytes(rows[[0, 1, 2, 4, 3, *range(5, len(rows))]].tobytes())
    (problem,) = differences(checkpoints / "hf", path)
    assert LAYERED in problem and "[3, 0]" in problem


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "fault", ["value", "row", "scale", "tiny scale", "infinite scale", "nan scale", "zeros"]
)
def test_faults_of_quantized_weights(checkpoints, tmp_path, format, fault):
    path = shutil.copytree(checkpoints / format, tmp_path / "new")
    width = 16 if format == "int4" else 32

    def edit(numbers):
        if fault == "value":
            numbers.view(np.uint8)[5] ^= 0x40  # from the second highest bit of what it holds
        elif fault == "row":
            numbers[:] = np.roll(numbers.copy(), 1)
        else:
            numbers[:] = 0

    factors = {"scale": 1.1, "tiny scale": 0.9, "infinite scale": np.inf, "nan scale": np.nan}
    if fault in factors:
        groups = 32 // 16 if format == "int4" else 1

        def edit_scale(numbers):
            numbers[:] *= factors[fault]

        change(path, f"{LAYERED}_scale", 7, np.float32, groups, edit_scale)
    else:
        change(path, LAYERED, 7, DTYPES[format], width, edit)
    (problem,) = differences(checkpoints / "hf", path)
    assert LAYERED in problem and "[7, " in problem
    (problem,) = differences(checkpoints / format, path)  # these must be equal bit for bit
    assert LAYERED in problem


def test_ctrl_c_stops_the_comparison(checkpoints):
    done = []

    def progress(count: int, total: int) -> None:
        done.append(count / total)
        os.kill(os.getpid(), signal.SIGINT)

    with (
        closing(open_checkpoint(checkpoints / "hf")) as reader,
        pytest.raises(KeyboardInterrupt),
    ):
        compare(reader, reader, 2, progress)
    assert done and done[-1] < 0.5


def test_different_formats(checkpoints):
    for one, other in itertools.permutations(FORMATS, 2):
        assert len(differences(checkpoints / one, checkpoints / other)) == 3 * 7


def test_a_format_that_nothing_bounds_is_different(checkpoints, tmp_path):
    """This project does not round to it, so it knows of no largest error."""
    write_foreign(tmp_path, GPTQ | {"bits": 8}, partial(gptq, bits=8), dtype="bfloat16")
    assert len(differences(checkpoints / "hf", tmp_path)) == 3 * 7


def test_different_configurations(checkpoints, tmp_path):
    path = shutil.copytree(checkpoints / "hf", tmp_path / "new")
    config = json.loads((path / "config.json").read_text())
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rms_norm_eps": 0.5}
    (path / "config.json").write_text(json.dumps(config))
    (problem,) = differences(checkpoints / "hf", path)
    assert "rope_theta" in problem and "norm_eps" in problem
