"""`python -m bench`: what it loads, what it refuses, and its exit status."""

import argparse
import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import __main__ as command_line
from bench.commands import MEASUREMENTS, READERS
from bench.new_process import command, in_new_process, outcome
from bench.partial import keep, partial_path
from bench.report import RESULTS
from bench.result import Plot, Result, Target
from sharding.errors import UserError
from tests.support.paths import ROOT

COMMANDS = MEASUREMENTS | READERS


def result(*targets: Target) -> Result:
    return Result.measured(
        "peers",
        "a test",
        args={},
        packages=(),
        units={"time": "s"},
        rows=[{"batch": 1, "time": 0.5}, {"batch": 2, "time": 0.75}],
        targets=targets,
        plots=[Plot("Time", "batch", ("time",))],
    )


@pytest.fixture
def fake(monkeypatch):
    """Replaces a measurement by one that returns or raises what the test appends."""
    answers = []

    def run(args: argparse.Namespace) -> Result:
        answer = answers.pop()
        if callable(answer):
            answer = answer(args)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    module = SimpleNamespace(__doc__="A test.", add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "bench.peers", module)
    return answers


def test_help_loads_no_measurement():
    program = (
        "import sys; from bench.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    help_text, loaded = done.stdout.rsplit("\n", 2)[:2]
    assert all(f"    {name} " in help_text or f"    {name}\n" in help_text for name in COMMANDS)
    roots = {name.split(".")[0] for name in loaded.split()}
    heavy = {"jax", "numpy", "torch", "transformers", "rich", "matplotlib", "msgspec", "starlette"}
    assert "argparse" in roots and not roots & heavy
    assert not {module for module, _ in COMMANDS.values()} & set(loaded.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommand_follows_the_protocol(name):
    """Reads the modules, since importing them takes seconds."""
    tree = ast.parse((ROOT / f"{COMMANDS[name][0].replace('.', '/')}.py").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert ast.get_docstring(tree)
    assert [len(functions[name].args.args) for name in ("add_arguments", "run")] == [1, 1]
    returned = ast.unparse(functions["run"].returns)
    assert returned == ("Result" if name in MEASUREMENTS else "None")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_each_subcommand_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        command_line.main([name, "--help"])
    assert end.value.code == 0
    assert f"python -m bench {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nothing"],
        ["--fast"],
        ["engine", "--parts", "nothing"],
        ["compare", "a.json"],
        ["compare", "missing.json", "missing.json"],
        ["compare", __file__, __file__],
        ["compare", str(ROOT), str(ROOT)],
        ["report", str(ROOT / "docs")],
        ["calibrate"],
        ["calibrate", "missing.json"],
        ["calibrate", str(RESULTS / "step_h200.json"), "--output", __file__ + "/a.json"],
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_said_in_one_line(argv, capfd):
    try:
        status = command_line.main(argv)
    except SystemExit as end:
        status = end.code
    out, err = capfd.readouterr()
    assert status == 2 and not out and len(err.splitlines()) == 1


def test_a_measurement_shows_and_writes_its_result(fake, tmp_path, capsys):
    met, missed = Target("a", 1.0, 2.0, "max"), Target("b", 1.0, 2.0, "min")
    path = tmp_path / "new" / "peers.json"
    for targets, status in (((), 0), ((met,), 0), ((met, missed), 1)):
        fake.append(result(*targets))
        assert command_line.main(["peers", "--output", str(path)]) == status
        assert Result.read(path) == result(*targets)
        assert path.with_suffix(".svg").read_text().startswith("<?xml")
    assert "MISSED" in capsys.readouterr().out


def test_a_plot_needs_no_package_to_keep_the_result(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fake.append(result())
    assert command_line.main(["peers", "--output", str(tmp_path / "a.json")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert "matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, status",
    [
        (UserError("one sentence"), 2),
        (ModuleNotFoundError("no module named x", name="x.y"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_error_of_a_measurement_is_one_line(fake, tmp_path, capsys, error, status):
    fake.append(error)
    assert command_line.main(["peers", "--output", str(tmp_path / "a.json")]) == status
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_a_defect_keeps_its_traceback(fake, tmp_path):
    for error in (ZeroDivisionError(), ModuleNotFoundError("no module", name="bench.gone")):
        fake.append(error)
        with pytest.raises(type(error)):
            command_line.main(["peers", "--output", str(tmp_path / "a.json")])


def test_a_measurement_that_ends_early_leaves_what_it_kept(fake, tmp_path, capsys):
    """And one that comes to its end leaves its result alone, whatever was there before."""
    path = tmp_path / "peers.json"

    def interrupted(args: argparse.Namespace) -> Result:
        keep(result(), args.output)
        raise KeyboardInterrupt

    def nothing(args: argparse.Namespace) -> Result:
        raise UserError("a sentence")

    for measurement, status, left in (
        (interrupted, 130, {"peers.partial.json"}),
        (nothing, 2, set()),  # that of an earlier run would pass for its own
        (interrupted, 130, {"peers.partial.json"}),
        (lambda args: keep(result(), args.output) or result(), 0, {"peers.json", "peers.svg"}),
    ):
        fake.append(measurement)
        assert command_line.main(["peers", "--output", str(path)]) == status
        assert {file.name for file in tmp_path.iterdir()} == left
        assert (str(partial_path(path)) in capsys.readouterr().out) == (status == 130)


def test_a_file_that_cannot_be_written_is_refused_before_measuring(fake, tmp_path, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a.json"):
        fake.append(AssertionError("measured"))
        assert command_line.main(["peers", "--output", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


# --- functions in processes of their own ---------------------------------------------------------


def test_a_function_runs_in_a_new_process():
    assert in_new_process(json.loads, '{"a": [1, null]}') == {"a": [1, None]}


def test_what_a_new_process_lacks_or_refuses_is_raised_here():
    with pytest.raises(ModuleNotFoundError) as missing:
        in_new_process(importlib.import_module, "no_such_package")
    assert missing.value.name == "no_such_package"


def test_the_outcome_is_the_last_line():
    assert outcome('printed\n{"result": 5}\n') == 5
    with pytest.raises(UserError):
        outcome('{"error": "a sentence"}')
    with pytest.raises(ModuleNotFoundError):
        outcome('{"missing": "torch"}')
    assert command(json.loads, "1")[-3:] == ["json", "loads", '["1"]']
    assert Path(command(json.loads)[0]) == Path(sys.executable)
