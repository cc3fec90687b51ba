"""`--preflight`: the planner looks at the machine before the engine starts."""

import sys

import pytest

from llama_jax.plan.machine.exit_codes import Exit
from llama_jax.serve import launch
from llama_jax.serve.command_line.arguments import DEMO_CHECKPOINT
from llama_jax.serve.launch import main
from llama_jax.serve.preflight import PreflightFailed, preflight

WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(' '.join(sys.argv[2:]))"


def planner(program: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, "-c", program, *arguments


def test_the_planner_is_asked_about_this_machine(tmp_path):
    asked = tmp_path / "asked"
    preflight("h100-sxm", "4x2", tmp_path, planner(WRITES, str(asked)))
    assert asked.read_text() == f"--gpu h100-sxm --layout 4x2 --model {tmp_path}"


@pytest.mark.parametrize("code", [Exit.GPU_COUNT, Exit.COPY_RATE, 2, 70])
def test_what_the_planner_finds_is_the_exit_code(tmp_path, code):
    with pytest.raises(PreflightFailed) as failed:
        preflight("auto", "1x1", tmp_path, planner(f"import sys; sys.exit({int(code)})"))
    assert failed.value.code == code


def test_a_failed_preflight_starts_no_engine(tmp_path, monkeypatch):
    started = tmp_path / "started"
    engine = planner(WRITES, str(started))

    def fails(gpu, mesh, checkpoint):
        assert (gpu, mesh, checkpoint) == ("h200", "2x1", DEMO_CHECKPOINT)
        preflight(gpu, mesh, checkpoint, planner("raise SystemExit(12)"))

    monkeypatch.setattr(launch, "preflight", fails)
    flags = ["--preflight", "--preflight-gpu", "h200", "--mesh", "2x1", "--port", "0"]
    assert main(flags, engine_command=engine) == 12
    assert not started.exists()
    # Without it, the engine is started (and ends at once, since it is none).
    assert main(["--port", "0"], engine_command=engine) == 1
    assert started.exists()


@pytest.mark.slow
def test_the_real_planner_looks_at_this_machine(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    preflight("auto", "4x2", DEMO_CHECKPOINT)
    with pytest.raises(PreflightFailed) as failed:
        preflight("h100-sxm", "4x2", DEMO_CHECKPOINT)
    assert failed.value.code in (Exit.DRIVER, Exit.GPU_COUNT)
