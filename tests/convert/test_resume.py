"""Kills at any moment, Ctrl-C, reboots: `--resume` continues, and no half looks complete."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from orbax.checkpoint import v1 as ocp

from convert import journal
from convert.task import WORKER_BYTES
from convert.verification import check_checksums
from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.manifest import JOURNAL, MANIFEST, checksum
from tests.support.conversions import convert_to, files, load_weights, refusal, small_pieces
from tests.support.paths import ROOT
from tests.support.tiny_checkpoint import bits, write_checkpoint

PIECES = {"chunk": 2000, "block": 1000, "shard": 8000}
CASES = {
    "orbax": {},
    "int8": {"quantize": "int8"},
    "huggingface": {"layout": "huggingface"},
    "one_file": {"layout": "huggingface", "dtype": "float32"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    write_checkpoint(path, dtype="bfloat16", num_hidden_layers=1)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def process():
    """Sends orders to a `conversion_process`, whose children convert and are killed."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.conversion_process"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as opened:

        def ask(source, destination, options, **order):
            order |= {"source": str(source), "destination": str(destination), "options": options}
            opened.stdin.write(json.dumps(order) + "\n")
            opened.stdin.flush()
            return json.loads(opened.stdout.readline())

        yield ask
        opened.stdin.close()


def assert_not_half(path, source, whole) -> None:
    """After a kill, the directory is complete, or neither this program nor others open it."""
    if (path / MANIFEST).is_file():
        open_checkpoint(path).close()
        assert {name: data for name, data in files(path).items() if name != JOURNAL} == whole
        return
    refusal(open_checkpoint, path)
    expected = load_weights(source)
    for read in (_by_transformers, _by_orbax):
        try:
            found = read(path)
        except Exception:
            continue
        for name, tensor in found.items():  # quantized by now, or the source's
            assert bits(tensor) == bits(expected[name].to(tensor.dtype)), name
        assert found.keys() == expected.keys()


def _by_transformers(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model.state_dict()


def _by_orbax(path):
    arrays = ocp.load(path / "weights")
    if any(array.dtype.name == "int8" for array in arrays.values()):
        assert len(arrays) == 3 + 9 + 7  # seven scales
        raise ValueError("not the source's numbers")
    return {n: torch.from_numpy(a.view("uint16")).view(torch.bfloat16) for n, a in arrays.items()}


def moments(phases: dict[str, int], rng: random.Random, each: int) -> list[int]:
    """`each` random moments of every phase, at least two of the last."""
    starts = [*phases.values()]
    last = range(phases["Declaring"], phases["End"])
    chosen = rng.sample(last, min(2 * each, len(last)))
    for first, end in itertools.pairwise(starts):
        chosen += rng.sample(range(first, end), min(each, end - first))
    return sorted(set(chosen))


@pytest.mark.parametrize(
    ("case", "each"),
    [
        *((case, 1) for case in CASES),
        *(pytest.param(case, 10, marks=pytest.mark.slow) for case in CASES),
    ],
)
def test_a_kill_at_any_moment(process, source, tmp_path, case, each):
    """At `each` random moments of every phase; a phase can be too short to have that many."""
    options = CASES[case] | {"max_memory": WORKER_BYTES}  # one worker: the same moments every time
    pieces = PIECES | ({"shard": 10**9} if case == "one_file" else {})
    phases = process(source, tmp_path / "whole", options, pieces=pieces)["phases"]
    assert list(phases) == ["Preparing", "Writing", "Finishing", "Verifying", "Declaring", "End"]
    whole = files(tmp_path / "whole")
    rng = random.Random(case)
    seen = set()
    for moment in moments(phases, rng, each):
        path = tmp_path / str(moment)
        killed = process(source, path, options, pieces=pieces, moment=moment)
        assert killed["status"] == -9
        seen.add(killed["during"])
        assert_not_half(path, source, whole)
        again = options | {"resume": True}
        later = rng.randrange(1, phases["End"])
        killed = process(source, path, again, pieces=pieces, moment=later)
        assert killed["status"] in (-9, 0)  # a run that has less to do may end before that
        assert_not_half(path, source, whole)
        assert process(source, path, again, pieces=pieces)["status"] == 0
        assert files(path) == whole
        assert not check_checksums(path)
        shutil.rmtree(path)
    assert seen == set(phases) - {"End"}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["orbax", "int8", "huggingface"])
def test_twenty_kills_of_a_large_conversion(process, tmp_path, case):
    """240 MB, each kill from another process while the conversion runs."""
    sizes = {"vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 4096}
    write_checkpoint(tmp_path / "hf", dtype="bfloat16", shard_size="100MB", **sizes, **{
        "num_hidden_layers": 6, "head_dim": 128, "num_attention_heads": 8})  # fmt: skip
    options = CASES[case]
    pieces = {"chunk": 2 << 20, "block": 1 << 18, "shard": 20_000_000}
    phases = process(tmp_path / "hf", tmp_path / "whole", options, pieces=pieces)["phases"]
    whole = files(tmp_path / "whole")
    assert sum(map(len, whole.values())) > 100e6
    rng = random.Random(case)
    for number in range(20):
        path = tmp_path / str(number)
        moment = rng.randrange(phases["Writing"], phases["End"] - 20)
        killed = process(tmp_path / "hf", path, options, pieces=pieces, moment=moment, outside=True)
        assert killed["status"] == -9, "it was over before"
        refusal(open_checkpoint, path)
        done = convert_count(path)
        again = process(tmp_path / "hf", path, options | {"resume": True}, pieces=pieces)
        assert again["status"] == 0
        assert done or killed["during"] == "Writing"
        assert files(path) == whole
        shutil.rmtree(path)


def convert_count(path) -> int:
    """The number of finished tasks in the journal."""
    return (path / JOURNAL).read_text().count('"task"')


@pytest.mark.parametrize(("signal", "status"), [("SIGINT", 130), ("SIGTERM", -15)])
@pytest.mark.parametrize("during", ["Writing", "Verifying"])
def test_ctrl_c_and_sigterm(process, source, tmp_path, signal, status, during):
    phases = process(source, tmp_path / "whole", {}, pieces=PIECES)["phases"]
    moment = phases[during] + 15
    stopped = process(source, tmp_path / "new", {}, pieces=PIECES, moment=moment, signal=signal)
    assert (stopped["status"], stopped["during"]) == (status, during)
    assert "--resume" in refusal(convert_to, tmp_path / "new", source)
    assert_not_half(tmp_path / "new", source, None)
    done = process(source, tmp_path / "new", {"resume": True}, pieces=PIECES)
    assert done["status"] == 0
    assert files(tmp_path / "new") == files(tmp_path / "whole")


class Interrupted(Exception):
    """Ends a conversion in the middle."""


def interrupt(source, path, after=15, **options) -> None:
    """Leaves a conversion unfinished, with some tasks done."""

    def progress(*_):
        nonlocal after
        after -= 1
        if after == 0:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert_to(path, source, progress, **options)
    assert convert_count(path) >= 2


@pytest.fixture
def pieces():
    with small_pieces(**PIECES) as patch:
        yield patch


@pytest.fixture
def whole(source, tmp_path, pieces):
    convert_to(tmp_path / "whole", source)
    return files(tmp_path / "whole")


def test_finished_tasks_are_not_repeated(source, tmp_path, pieces, whole):
    path = tmp_path / "new"
    interrupt(source, path)
    times = {file: file.stat().st_mtime_ns for file in _finished_files(path)}
    size = sum(file.stat().st_size for file in times)
    steps, summed = [], []
    pieces.setattr(journal, "checksum", lambda file: summed.append(file) or checksum(file))
    report = convert_to(path, source, lambda *step: steps.append(step), resume=True)
    assert 0 < report.resumed <= size
    assert steps[0] == ("Writing", report.resumed, report.bytes)
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert summed and not any(file in times for file in summed)  # of this boot: nothing is verified
    assert files(path) == whole


def test_resuming_a_finished_conversion_changes_nothing(source, tmp_path, pieces):
    path = tmp_path / "new"
    first = convert_to(path, source, quantize="int8")
    times = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    (path / JOURNAL).touch()  # a kill right after the manifest is written leaves it
    again = convert_to(path, source, quantize="int8", resume=True)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == times
    assert (again.config, again.bytes, again.resumed) == (first.config, first.bytes, first.bytes)
    assert again.quantization_error == first.quantization_error
    assert str(path) in refusal(convert_to, path, source, resume=True)
    (path / "config.json").unlink()
    message = refusal(convert_to, path, source, quantize="int8", resume=True)
    assert "config.json" in message


def test_resuming_a_new_directory_starts_the_conversion(source, tmp_path, pieces, whole):
    convert_to(tmp_path / "new", source, resume=True)
    assert files(tmp_path / "new") == whole


def test_files_of_an_earlier_boot_are_verified(source, tmp_path, pieces, whole):
    """A power failure may leave a file with its name and length but without its bytes."""
    boot = tmp_path / "boot_id"
    boot.write_text("one\n")
    pieces.setattr(journal, "BOOT_ID", boot)
    interrupt(source, tmp_path / "new")
    boot.write_text("two\n")
    first, second, *_ = _finished_files(tmp_path / "new")
    first.write_bytes(bytes(first.stat().st_size))
    kept = second.stat().st_mtime_ns
    convert_to(tmp_path / "new", source, resume=True)
    assert files(tmp_path / "new") == whole
    assert second.stat().st_mtime_ns == kept


@pytest.mark.parametrize("damage", ["shortened", "gone"])
def test_files_that_do_not_match_the_journal_are_written_again(
    source, tmp_path, pieces, whole, damage
):
    interrupt(source, tmp_path / "new")
    first, *_ = _finished_files(tmp_path / "new")
    first.write_bytes(first.read_bytes()[:-1])
    if damage == "gone":
        first.unlink()
    convert_to(tmp_path / "new", source, resume=True)
    assert files(tmp_path / "new") == whole


def test_without_boot_ids_all_files_are_verified(source, tmp_path, pieces, whole):
    pieces.setattr(journal, "BOOT_ID", tmp_path / "nothing")
    interrupt(source, tmp_path / "new")
    first, *_ = _finished_files(tmp_path / "new")
    first.write_bytes(bytes(first.stat().st_size))
    convert_to(tmp_path / "new", source, resume=True)
    assert files(tmp_path / "new") == whole


def _finished_files(path) -> list[Path]:
    """The files of finished tasks in the journal."""
    lines = [json.loads(line) for line in (path / JOURNAL).read_text().split("\n") if line]
    found = [path / name for line in lines if "task" in line for name in line["task"]["files"]]
    assert len(found) >= 2
    return found


def test_a_journal_cut_anywhere(source, tmp_path, pieces, whole):
    interrupt(source, tmp_path / "new")
    text = (tmp_path / "new" / JOURNAL).read_bytes()
    for end in (0, 1, 20, text.rindex(b"\n"), text.rindex(b"\n") + 30, len(text) - 1, len(text)):
        path = shutil.copytree(tmp_path / "new", tmp_path / str(end))
        (path / JOURNAL).write_bytes(text[:end])
        convert_to(path, source, resume=True)
        assert files(path) == whole, end


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\xff\xfe{", b"\n[1]\n3\n"])
def test_a_journal_with_garbage_at_its_end(source, tmp_path, pieces, whole, tail):
    """As a file system may leave it after a power failure."""
    interrupt(source, tmp_path / "new")
    with (tmp_path / "new" / JOURNAL).open("ab") as file:
        file.write(tail)
    convert_to(tmp_path / "new", source, resume=True)
    assert files(tmp_path / "new") == whole


@pytest.mark.parametrize(
    "changed", [{"dtype": "float32"}, {"quantize": "int8"}, {"layout": "huggingface"}]
)
def test_other_options_are_rejected(source, tmp_path, pieces, changed):
    interrupt(source, tmp_path / "new")
    before = files(tmp_path / "new")
    message = refusal(convert_to, tmp_path / "new", source, resume=True, **changed)
    assert str(tmp_path / "new") in message
    assert files(tmp_path / "new") == before


def test_chunks_of_another_size_are_rejected(source, tmp_path, pieces):
    """As after an update of the program: new chunks would not match the existing ones."""
    interrupt(source, tmp_path / "new")
    with small_pieces(chunk=4000):
        message = refusal(convert_to, tmp_path / "new", source, resume=True)
    assert str(tmp_path / "new") in message


@pytest.mark.parametrize("change", ["touched", "edited", "sampling", "added", "other"])
def test_a_changed_source_is_rejected(source, tmp_path, pieces, change):
    copy = shutil.copytree(source, tmp_path / "copy")
    interrupt(copy, tmp_path / "new")
    if change == "touched":
        os.utime(copy / "model.safetensors", ns=(1, 1))
    elif change == "edited":
        (copy / "tokenizer.json").write_text("[]")
    elif change == "sampling":
        (copy / "generation_config.json").write_text('{"temperature": 0.5}')
    elif change == "added":
        (copy / "chat_template.jinja").write_text("{{ messages }}")
    else:
        shutil.rmtree(copy)
        write_checkpoint(copy, dtype="bfloat16", num_hidden_layers=1)
    message = refusal(convert_to, tmp_path / "new", copy, resume=True)
    assert str(tmp_path / "new") in message


def test_files_that_are_not_read_may_change(source, tmp_path, pieces, whole):
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "README.md").write_text("A model.")
    (copy / "adapter_model.safetensors").write_bytes(b"")
    interrupt(copy, tmp_path / "new")
    (copy / "README.md").write_text("A better model.")
    (copy / "adapter_model.safetensors").unlink()
    (copy / "original").mkdir()
    (copy / "original" / "params.json").write_text("{}")
    (copy / "training.log").write_text("")
    os.utime(copy / "tokenizer.json", ns=(1, 1))
    report = convert_to(tmp_path / "new", copy, resume=True)
    assert report.resumed > 0
    assert files(tmp_path / "new") == whole


def test_two_conversions_at_once(source, tmp_path, pieces, whole):
    messages = []

    def progress(*_):
        if not messages:
            messages.append(refusal(convert_to, tmp_path / "new", source))
            messages.append(refusal(convert_to, tmp_path / "new", source, resume=True))

    convert_to(tmp_path / "new", source, progress)
    assert all("is running" in message and "delete" not in message for message in messages)
    assert all(str(tmp_path / "new") in message for message in messages)
    assert files(tmp_path / "new") == whole


def test_an_unfinished_manifest_is_ignored(source, tmp_path, pieces, whole):
    interrupt(source, tmp_path / "new")
    (tmp_path / "new" / f"{MANIFEST}.part").write_text("{")
    convert_to(tmp_path / "new", source, resume=True)
    assert files(tmp_path / "new") == whole
    open_checkpoint(tmp_path / "new").close()
