"""`bench/gpu.sh`: every step runs by itself, and what it leaves behind is complete."""

import argparse
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench import attention, model, products, roofline, step
from bench.result import Result
from sharding.errors import UserError
from tests.support.paths import ROOT

STEPS = ["rates", "attention", "products", "step", "model_70b", "int4", "model_8b"]
ALL = [*STEPS[:2], "sanitize_attention", *STEPS[2:6], "sanitize_int4", STEPS[6]]

# In place of Python: succeeds, unless the name of the output is in the environment.
STUB = """#!/usr/bin/env bash
output=${@: -1}
name=$(basename "$output" .json)
echo "$*" >>"$STUB_LOG"
case " $MISSED " in *" $name "*) echo '{}' >"$output"; exit 1 ;; esac
case " $BROKEN " in *" $name "*) echo Traceback >&2; exit 1 ;; esac
case " $STOPPED " in *" $name "*) exit 124 ;; esac
case " $HANGING " in *" $name "*) echo '{}' >"${output%.json}.partial.json"; exec sleep 100 ;; esac
echo '{}' >"$output"
"""
# In place of compute-sanitizer, which also finds nothing in a program that fails at once.
SANITIZER = """#!/usr/bin/env bash
[[ $FAILING ]] && echo "No such module." || echo '{}' >"${@: -1}"
echo "========= ERROR SUMMARY: $FOUND"
"""


@pytest.fixture
def script(tmp_path):
    """Runs the script over stubs; returns its process, with the lines of its summary by step."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    for name, text in (("python", STUB), ("compute-sanitizer", SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    out.mkdir()
    (out / "step.json").write_text("from an earlier run")

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        variables = {
            "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"),
            "OUT": str(out), "STUB_LOG": str(tmp_path / "log"), "TMPDIR": str(tmp_path),
            "FOUND": "0 errors", **environment,
        }  # fmt: skip
        command = [ROOT / "bench/gpu.sh", *arguments]
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
        lines = done.stdout.split("\n\n")[-1].splitlines()[:-1]
        done.summary = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
        done.commands = (tmp_path / "log").read_text().splitlines()
        done.files = {path.name for path in out.iterdir()}
        return done

    return run


def test_all_steps_run_in_order(script):
    done = script()
    assert done.returncode == 0 and list(done.summary) == ALL
    measurements = [command.split()[2] for command in done.commands]
    assert measurements == [
        "roofline", "attention", "products", "step", "model", "products", "model",
    ]  # fmt: skip
    assert not any("--toy" in command for command in done.commands)
    # A machine may give back only eight files.
    assert done.files == {*(f"{step}.json" for step in STEPS), "machine.tar.gz"}


def test_a_run_that_was_cut_off_goes_on(script):
    done = script(STEPS="step sanitize_int4")
    assert done.returncode == 0 and list(done.summary) == ["step", "sanitize_int4"]
    assert script(STEPS="stepp").returncode == 2


def test_a_missed_goal_is_no_failure(script):
    done = script(MISSED="step model_8b")
    assert done.returncode == 0 and "missed" in done.summary["step"]


def test_a_step_that_fails_stops_no_other(script):
    done = script(BROKEN="attention step")
    assert done.returncode == 1
    assert "failed" in done.summary["attention"] and "failed" in done.summary["step"]
    # The result of an earlier run is gone, too.
    ran = set(STEPS) - {"attention", "step"}
    assert done.files == {*(f"{step}.json" for step in ran), "machine.tar.gz"}
    assert all(done.summary[step].startswith("ran") for step in ran)


def test_what_the_sanitizer_finds_is_a_failure(script):
    assert script(FOUND="3 errors").returncode == 1
    other = script(FOUND="Device not supported")
    assert other.returncode == 0 and "did not run" in other.summary["sanitize_int4"]


def test_the_sanitizer_is_not_believed_if_the_program_failed(script):
    assert "found nothing" in script().summary["sanitize_attention"]
    failed = script(FAILING="yes").summary["sanitize_attention"]
    assert "found nothing" not in failed and "No such module." in failed


def test_another_argument_is_refused():
    done = subprocess.run([ROOT / "bench/gpu.sh", "--fast"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr


@pytest.mark.slow
def test_a_step_that_hangs_is_stopped_and_the_time_is_kept(script):
    done = script(HANGING="products", LIMIT="7")
    assert done.returncode == 1
    assert "stopped" in done.summary["products"] and "skipped" in done.summary["step"]
    ran = {f"{name}.json" for name in ("rates", "attention")}
    assert done.files == {*ran, "products.partial.json", "machine.tar.gz"}


def test_what_hangs_is_not_tried_again(script):
    done = script(STOPPED="int4")
    assert "stopped" in done.summary["int4"]
    assert list(done.summary) == [step for step in ALL if step != "sanitize_int4"]


BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {
            "fastapi", "gguf", "h11", "httpx", "jinja2", "llguidance", "matplotlib", "msgspec",
            "prometheus_client", "safetensors", "starlette", "tokenizers", "torch", "transformers",
            "uvicorn", "uvloop", "zmq",
        }:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a machine with nothing but JAX, Flax and NumPy."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    return os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}


@pytest.mark.slow
def test_the_script_at_toy_size_on_a_bare_machine(bare, tmp_path):
    out = tmp_path / "out"
    environment = bare | {"OUT": str(out), "PYTHON": sys.executable}
    subprocess.run([ROOT / "bench/gpu.sh", "--toy"], env=environment, check=True)
    results = {path.stem: Result.read(path) for path in out.glob("*.json")}
    assert results.keys() == set(STEPS)
    assert all(result.rows and result.flags["toy"] for result in results.values())
    assert len(results["attention"].targets) == 15 and results["attention"].met
    times = {
        name: [row for row in result.rows if "time" in row] for name, result in results.items()
    }
    for rows in times.values():
        assert all(row["time"] > 0 and row.get("floor", 1) > 0 for row in rows), rows
    assert [row["batch"] for row in times["step"] if "batch" in row] == [1, 8, 32]
    assert [row["case"] for row in times["model_8b"]] == ["b2", "b3"]
    assert {row["format"] for row in times["products"]} == {"bfloat16", "int8", "fp8"}
    assert {row["format"] for row in times["int4"]} == {"int4"}
    assert all(result.plots for result in results.values())
    assert len(results["int4"].targets) == 5 and results["int4"].met
    with tarfile.open(out / "machine.tar.gz") as kept:
        assert {Path(name).stem for name in kept.getnames()} >= {*STEPS}


@pytest.mark.parametrize("measurement", [roofline, attention, products, step, model])
def test_full_size_is_refused_without_a_gpu(measurement):
    parser = argparse.ArgumentParser()
    measurement.add_arguments(parser)
    with pytest.raises(UserError, match="--toy"):
        measurement.run(parser.parse_args([]))
