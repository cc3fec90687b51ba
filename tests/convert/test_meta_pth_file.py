"""`.pth` files against torch.load; damaged files; malicious pickles."""

import collections
import io
import os
import random
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.meta.pth_file import MAX_PICKLE, PthFile
from llama_jax.checkpoint.reader import CheckpointError
from tests.support.paths import ROOT
from tests.support.tiny_checkpoint import bits


def tensors(dtype=torch.float32):
    return {"a": torch.randn(6, 4).to(dtype), "b.weight": torch.randn(3).to(dtype)}


def saved(path, content, **options):
    torch.save(content, path / "x.pth", **options)
    return path / "x.pth"


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        PthFile(path)
    message = str(error.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
    return message


# --- what torch writes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_are_those_of_torch_load(tmp_path, dtype):
    plain = tensors(dtype)
    whole = torch.randn(10, 8).to(dtype)
    content = collections.OrderedDict(
        plain,
        parameter=torch.nn.Parameter(plain["a"]),
        rows=whole[3:7],
        columns=whole[:, 2:5],
        transposed=whole.t(),
        every_other=whole[1::2, ::3],
        scalar=torch.tensor(3.0, dtype=dtype),
        none=torch.empty(0, 7, dtype=dtype),
        one=whole[4:5, 6:7],
    )
    path = saved(tmp_path, content)
    file = PthFile(path)
    loaded = torch.load(path, weights_only=True)
    assert list(file.tensors) == list(loaded)
    for name, tensor in loaded.items():
        view = file.array(name)
        assert file.tensors[name].shape == view.shape == tuple(tensor.shape)
        assert str(dtype).endswith(file.tensors[name].dtype)
        assert view.tobytes() == bits(tensor.reshape(-1)), name
        assert not view.flags.writeable


def test_the_state_of_a_module_is_read(tmp_path):
    module = torch.nn.Linear(3, 2)
    file = PthFile(saved(tmp_path, module.state_dict()))  # it brings versions of its modules along
    assert list(file.tensors) == ["weight", "bias"]
    assert file.array("weight").tobytes() == bits(module.weight.detach())


def test_torch_is_not_needed(tmp_path):
    path = saved(tmp_path, tensors())
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from convert.meta.pth_file import PthFile\n"
        f"print(*PthFile(__import__('pathlib').Path({str(path)!r})).tensors)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["a", "b.weight"]


# --- files of other programs, and damaged files


def test_other_formats_are_rejected(tmp_path):
    old = saved(tmp_path, tensors(), _use_new_zipfile_serialization=False)
    assert "1.6" in refusal(old)
    for content in (b"", b"<html>"):
        old.write_bytes(content)
        refusal(old)
    old.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid")
    assert "git lfs pull" in refusal(old)
    old.unlink()
    refusal(old)


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_entries(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def test_a_compressed_file_is_rejected(tmp_path):
    path = saved(tmp_path, tensors())
    write_entries(path, entries(path), zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def test_an_encrypted_file_is_rejected(tmp_path):
    path = saved(tmp_path, tensors())
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flags of the first entry in the directory
    path.write_bytes(data)
    assert "encrypted" in refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_is_there_twice_is_rejected(tmp_path):
    path = saved(tmp_path, tensors())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/data/0", b"\0" * 96)
    assert "'x/data/0'" in refusal(path)


def test_a_big_endian_file_is_rejected(tmp_path):
    path = saved(tmp_path, tensors())
    write_entries(path, entries(path) | {"x/byteorder": b"big"})
    assert "big-endian" in refusal(path)


def test_an_archive_without_tensors_is_rejected(tmp_path):
    path = write_entries(tmp_path / "x.pth", {"x/readme": b"hello"})
    assert "data.pkl" in refusal(path)
    write_entries(path, {"x/data.pkl": b"", "y/data.pkl": b""})
    assert "data.pkl" in refusal(path)
    assert "dictionary" in refusal(saved(tmp_path, torch.ones(3)))
    assert "'step'" in refusal(saved(tmp_path, {"step": 3}))
    assert "'model'" in refusal(saved(tmp_path, {"model": tensors()}))
    assert "dictionary" in refusal(saved(tmp_path, {1: torch.ones(3)}))


def test_a_description_beyond_any_checkpoints_is_rejected(tmp_path):
    path = write_entries(tmp_path / "x.pth", {"x/data.pkl": b"N" * MAX_PICKLE + b"."})
    assert f"{MAX_PICKLE + 1:,} bytes" in refusal(path)


def test_bytes_that_are_not_there_are_missed(tmp_path):
    path = saved(tmp_path, tensors())
    whole = entries(path)
    write_entries(path, {name: data for name, data in whole.items() if name != "x/data/1"})
    assert "'b.weight'" in refusal(path)
    write_entries(path, whole | {"x/data/0": whole["x/data/0"][:-1]})
    assert "'a'" in refusal(path)


def test_an_entry_that_is_not_where_the_directory_says_is_rejected(tmp_path):
    path = saved(tmp_path, tensors())
    data = path.read_bytes()
    for name in (b"x/data.pkl", b"x/data/1"):
        header = data.index(name) - 30
        path.write_bytes(data[:header] + b"XX" + data[header + 2 :])
        assert name.decode() in refusal(path)


def test_a_file_cut_off_anywhere_is_rejected(tmp_path):
    path = saved(tmp_path, tensors())
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        between = [entry.header_offset for entry in archive.infolist()]
    for length in {*between, *range(0, len(data), 37), len(data) - 1}:
        path.write_bytes(data[:length])
        refusal(path)


def test_a_file_that_lost_bytes_in_its_middle_is_rejected(tmp_path):
    path = saved(tmp_path, tensors())
    data = path.read_bytes()
    for start in range(64, data.index(b"PK\1\2") - 64, 64):
        path.write_bytes(data[:start] + data[start + 64 :])
        refusal(path)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_random_damage_is_rejected_or_harmless(tmp_path):
    path = saved(tmp_path, tensors())
    data = path.read_bytes()
    chance = random.Random(0)
    rejected = 0
    for _ in range(1000):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            file = PthFile(path)
        except CheckpointError:
            rejected += 1
        else:
            for name in file.tensors:
                file.array(name).tobytes()
    assert 100 < rejected < 950


# --- pickles that try to do something


class Calls:
    """Something that torch.save writes as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# Protocol 2, which torch writes, has the names of Python 2.
@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("posix.system", Calls(os.system, "touch ran")),
        ("__builtin__.eval", Calls(eval, "open('ran', 'w')")),
        ("__builtin__.exec", Calls(exec, "open('ran', 'w')")),
        ("__builtin__.getattr", Calls(Path.touch, Path("ran"))),  # as getattr(Path, "touch")
        ("shutil.rmtree", shutil.rmtree),
        ("torch.LongStorage", torch.ones(3, dtype=torch.int64)),
    ],
)
@pytest.mark.parametrize("where", ["alone", "value", "key", "nested", "attribute"])
def test_nothing_is_called_but_named(tmp_path, monkeypatch, name, attack, where):
    monkeypatch.chdir(tmp_path)
    content = {
        "alone": attack,
        "value": tensors() | {"c": attack},
        "key": tensors() | {(attack,): torch.ones(3)},
        "nested": tensors() | {"c": {"d": ((attack,),)}},
        "attribute": with_attribute(attack),
    }[where]
    message = refusal(saved(tmp_path, content))
    assert f"'{name}'" in message
    assert not Path("ran").exists()


def with_attribute(attack):
    content = collections.OrderedDict(tensors())
    content.anything = attack
    return content


# --- pickles written by hand

START, STOP = b"\x80\x02", b"."
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def integer(value):
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def row(values):
    return b"(" + b"".join(map(integer, values)) + b"t"


def storage(key="0", length=8, kind=b"ctorch\nFloatStorage\n"):
    return b"(" + text("storage") + kind + text(key) + text("cpu") + integer(length) + b"tQ"


def tensor(shape=(2, 4), strides=(4, 1), offset=0, source=None, more=b"\x89)"):
    source = storage() if source is None else source
    return REBUILD + b"(" + source + integer(offset) + row(shape) + row(strides) + more + b"tR"


def handmade(path, program):
    content = {"x/data.pkl": START + program + STOP, "x/data/0": bytes(32)}
    return write_entries(path / "x.pth", content)


def one_tensor(path, value):
    return handmade(path, b"}" + text("a") + value + b"s")


def test_a_tensor_written_by_hand_is_read(tmp_path):
    view = PthFile(one_tensor(tmp_path, tensor())).array("a")
    np.testing.assert_array_equal(view, np.zeros((2, 4), np.float32))


HUGE = 1 << 61


@pytest.mark.parametrize(
    "value",
    [
        tensor(shape=(HUGE, HUGE)),
        tensor(shape=(2, 5)),
        tensor(shape=(3, 4)),
        tensor(shape=(8, HUGE), strides=(0, 0)),
        tensor(shape=(-2, -4)),
        tensor(shape=(2, -4)),
        tensor(strides=(-4, 1)),
        tensor(strides=(HUGE, 1)),
        tensor(offset=1),
        tensor(offset=-1),
        tensor(offset=HUGE),
        tensor(offset=1 << 2000),
        tensor(shape=(0, 4), offset=HUGE),
        tensor(shape=(1 << 2000, 4)),
        tensor(shape=(1,) * 9, strides=(1,) * 9),
        tensor(shape=(2,), strides=(4, 1)),
        tensor(source=storage(length=9)),
        tensor(source=storage(length=-1)),
        tensor(source=storage(length=HUGE)),
        tensor(source=storage(key="1")),
        tensor(source=storage(key="../data.pkl")),
        tensor(source=storage(kind=b"ccollections\nOrderedDict\n")),
        tensor(source=storage(kind=text("FloatStorage"))),
        tensor(source=integer(5)),
        tensor(source=integer(5) + b"Q"),
        tensor(source=b"N"),
        tensor(source=b"}"),
        tensor(more=b"\x89}}" + text("neg") + b"\x88s"),
        tensor(more=b""),
        tensor(more=b"\x89)NNN"),
        storage(),
        b"ctorch\nFloatStorage\n",
        REBUILD,
        REBUILD + b")R",
        REBUILD + integer(3) + b"R",
        b"ccollections\nOrderedDict\n(K\x01tR",
        b"ctorch._utils\n_rebuild_parameter\n(K\x01\x88)tR",
        integer(1) + b")R",
        text("text") + b")R",
        b"(" + tensor() + b"t",
        tensor() + b"}b",
    ],
)
def test_what_cannot_be_a_tensor_is_rejected(tmp_path, value):
    refusal(one_tensor(tmp_path, value))


@pytest.mark.parametrize(("shape", "strides"), [((1, 4), (HUGE, 1)), ((0, 4), (HUGE, HUGE))])
def test_strides_that_are_never_used_do_no_harm(tmp_path, shape, strides):
    view = PthFile(one_tensor(tmp_path, tensor(shape=shape, strides=strides))).array("a")
    assert view.shape == shape


@pytest.mark.parametrize(
    "program",
    [
        REBUILD + b"}" + text("__code__") + b"Ns" + b"b",  # BUILD sets attributes ...
        b"ccollections\nOrderedDict\n}" + text("__call__") + b"Ns" + b"b",
        REBUILD + b"N}" + text("__defaults__") + b"Ns\x86b",  # ... and this way others
        b"ctorch\nFloatStorage\n}" + text("dtype") + b"Ns" + b"b",
        b"ccollections\nOrderedDict\n)\x81",  # NEWOBJ
        b"(ios\nsystem\n",  # INST
        b"(ccollections\nOrderedDict\no",  # OBJ
        b"\x82\x01",  # EXT1
        text("os") + text("system") + b"\x93",  # STACK_GLOBAL
        b"\x96" + b"\xff" * 7 + b"\x7f",  # BYTEARRAY8 of 2^63 bytes
        b"\x8d" + b"\xff" * 7 + b"\x7f",  # BINUNICODE8
        b"X" + b"\xff" * 4,  # BINUNICODE of 4 GiB
        b"\x8b" + b"\xff\xff\xff\x7f",  # LONG4
        b"I" + b"9" * 5000 + b"\n",
        b"N0",
        b"",
        b"\xff",
        b"t",
        b"u",
        b"R",
        b"Q",
        b"s",
        b"b",
        b"h\x07",
        b"q\x07",
        b"\x87",
        b"(" * 100_000,
        b"(" * 100_000 + b"t" * 100_000,
        b"c",
        b"c\xff\n\xff\n",
        b"c__builtin__\neval\n",
        b"(K\x01K\x02K\x03u",
        b"}(" + text("a") + b"u",
        b"}" + text("a") + tensor() + b"s" + text("a") + tensor() + b"s",
        b"}(" + text("a") + tensor() + text("a") + tensor() + b"u",
    ],
    ids=range(35),
)
def test_instructions_that_torch_does_not_write_are_rejected(tmp_path, program):
    refusal(handmade(tmp_path, program))
    assert PthFile(one_tensor(tmp_path, tensor())).array("a").shape == (2, 4)  # nothing is left


def test_attributes_of_a_dictionary_change_nothing(tmp_path):
    attributes = b"}" + b"".join(text(n) + b"Ns" for n in ("items", "__class__", "__getitem__"))
    program = b"ccollections\nOrderedDict\n)R" + text("a") + tensor() + b"s" + attributes + b"b"
    assert list(PthFile(handmade(tmp_path, program)).tensors) == ["a"]


@pytest.mark.parametrize("place", ["key", "value"])
def test_deep_nesting_does_not_end_the_process(tmp_path, place):
    deep = b")" + b"\x85" * 300_000  # a tuple in a tuple in a tuple ...
    program = b"}" + (deep + b"K\1s" if place == "key" else text("a") + deep + b"s")
    refusal(handmade(tmp_path, program))


def test_bombs_take_no_memory(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal(handmade(tmp_path, b"Nr\xff\xff\xff\x7f"))  # a memo with two billion entries
    doubled = b"N" + b"".join(b"q\1h\1\x86" for _ in range(200))  # 2^200 leaves
    refusal(one_tensor(tmp_path, doubled))
    refusal(handmade(tmp_path, b"}" + doubled + b"K\1s"))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 << 10  # KiB


def test_the_attacks_would_work_on_a_file_that_is_simply_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, {"a": Calls(os.system, "touch ran")})
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert Path("ran").exists()
