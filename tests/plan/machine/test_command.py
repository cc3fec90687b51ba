"""The command line of `--validate`: what it takes the plan to assume."""

import json
import shutil
from dataclasses import dataclass

import pytest

from llama_jax.costs.gpus import GPUS
from llama_jax.plan.__main__ import main
from llama_jax.plan.command_line import make_parser
from llama_jax.plan.machine import validate as module
from llama_jax.plan.machine.command import expectation
from llama_jax.plan.machine.exit_codes import Exit
from llama_jax.plan.machine.expectation import Check, Verdict
from llama_jax.plan.machine.validate import Validation
from llama_jax.serve.command_line.arguments import DEMO_CHECKPOINT


def expected(*flags: str):
    return expectation(make_parser().parse_args(["--validate", *flags]))


def test_what_the_command_line_plans_for():
    found = expected("--gpu", "h200", "--layout", "4x2")
    assert (found.mesh, found.gpus, found.gpu) == ((4, 2), 8, GPUS["h200"])
    assert expected("--layout", "2x2", "--gpus", "8").gpus == 8  # two replicas on this host
    assert expected("--layout", "2x2", "--replicas", "4").gpus == 4  # the others may be elsewhere
    # The planner's own choice, if no layout is given.
    found = expected("--gpu", "h100-sxm", "--gpus", "8")
    assert found.mesh[0] * found.mesh[1] <= found.gpus == 8


def test_a_cpu_and_whatever_there_is():
    for gpu in ("cpu", "auto"):
        found = expected("--gpu", gpu, "--layout", "4x2", "--model", str(DEMO_CHECKPOINT))
        assert found.gpus == 0 and found.mesh == (4, 2)
        assert found.checkpoint_bytes == (DEMO_CHECKPOINT / "model.safetensors").stat().st_size
    assert expected("--gpu", "auto").mesh == (1, 1)


def test_the_checkpoint_is_all_that_is_loaded(tmp_path):
    """A config.json is planned for without weights, and Orbax has files of no known kind."""
    where = ["--gpu", "cpu", "--layout", "1x1", "--model"]
    assert expected(*where, str(DEMO_CHECKPOINT / "config.json")).checkpoint_bytes == 0
    shutil.copy(DEMO_CHECKPOINT / "config.json", tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "0").write_bytes(bytes(1000))
    config = (tmp_path / "config.json").stat().st_size
    assert expected(*where, str(tmp_path)).checkpoint_bytes == 1000 + config


@dataclass
class Asked:
    expected: object = None
    checkpoint: object = None


@pytest.fixture
def asked(monkeypatch):
    """Replaces the look at this machine by a failure."""
    asked = Asked()

    def validate(expected, checkpoint):
        asked.expected, asked.checkpoint = expected, checkpoint
        text = "The GPU is slow: cool it."
        failed = Check("copy", "1", "2", Verdict.FAILS, Exit.COPY_RATE, text)
        return Validation([failed], None)

    monkeypatch.setattr(module, "validate", validate)
    return asked


def test_the_exit_code_and_the_text_say_what_failed(asked, capsys):
    flags = ["--validate", "--gpu", "auto", "--model", str(DEMO_CHECKPOINT)]
    assert main(flags) == Exit.COPY_RATE == 19
    assert "The GPU is slow: cool it." in capsys.readouterr().err
    assert asked.checkpoint == DEMO_CHECKPOINT
    assert main([*flags, "--json"]) == 19
    content = json.loads(capsys.readouterr().out)
    assert content["exit_code"] == content["checks"][0]["code"] == 19
    assert content["checks"][0]["verdict"] == "fails" and content["measurement"] is None


def test_a_machine_that_is_not_as_planned_is_not_calibrated(asked, tmp_path):
    flags = ["--validate", "--gpu", "auto", "--model", str(DEMO_CHECKPOINT)]
    assert main([*flags, "--calibrate", str(tmp_path / "file.json")]) == Exit.COPY_RATE
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_gpu_is_a_wrong_question(asked):
    assert main(["--validate", "--gpu", "h1000"]) == 2 and asked.expected is None
