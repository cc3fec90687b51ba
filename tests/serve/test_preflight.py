"""`--preflight`: the planner looks at the machine before the engine starts."""

import asyncio
import os
import signal
import sys

import httpx
import pytest

from llama_jax.plan.machine.exit_codes import Exit
from llama_jax.serve import launch
from llama_jax.serve.command_line.arguments import DEMO_CHECKPOINT
from llama_jax.serve.launch import main
from llama_jax.serve.preflight import PreflightFailed, preflight
from tests.support.processes import is_running, wait_until

WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(' '.join(sys.argv[2:]))"


def planner(program: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, "-c", program, *arguments


def test_the_planner_is_asked_about_this_machine(tmp_path):
    asked = tmp_path / "asked"
    asyncio.run(preflight("h100-sxm", "4x2", tmp_path, planner(WRITES, str(asked))))
    assert asked.read_text() == f"--gpu h100-sxm --layout 4x2 --model {tmp_path}"


@pytest.mark.parametrize("code", [Exit.GPU_COUNT, Exit.COPY_RATE, 2, 70])
def test_what_the_planner_finds_is_the_exit_code(tmp_path, code):
    with pytest.raises(PreflightFailed) as failed:
        asyncio.run(
            preflight("auto", "1x1", tmp_path, planner(f"import sys; sys.exit({int(code)})"))
        )
    assert failed.value.code == code


def test_a_failed_preflight_starts_no_engine(tmp_path, monkeypatch):
    started = tmp_path / "started"
    engine = planner(WRITES, str(started))

    async def fails(gpu, mesh, checkpoint):
        assert (gpu, mesh, checkpoint) == ("h200", "2x1", DEMO_CHECKPOINT)
        await preflight(gpu, mesh, checkpoint, planner("raise SystemExit(12)"))

    monkeypatch.setattr(launch, "preflight", fails)
    flags = ["--preflight", "--preflight-gpu", "h200", "--mesh", "2x1", "--port", "0"]
    assert main(flags, engine_command=engine) == 12
    assert not started.exists()
    # Without it, the engine is started (and ends at once, since it is none).
    assert main(["--port", "0"], engine_command=engine) == 1
    assert started.exists()


WAITS = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1], "pids").write_text(f"{os.getpid()} {child.pid} .")
while not pathlib.Path(sys.argv[1], "go on").exists():
    time.sleep(0.05)
child.kill()
"""


def test_the_server_lives_while_the_planner_looks(tmp_path, monkeypatch):
    """Otherwise, a liveness probe would restart it again and again."""
    answers, address = [], str(tmp_path / "socket")

    async def slow(gpu, mesh, checkpoint):
        command = planner(WAITS, str(tmp_path))
        looking = asyncio.create_task(preflight(gpu, mesh, checkpoint, command))
        transport = httpx.AsyncHTTPTransport(uds=address)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            answers.extend([(await client.get(path)).status_code for path in ("/live", "/health")])
        (tmp_path / "go on").touch()
        await looking

    monkeypatch.setattr(launch, "preflight", slow)
    assert main(["--preflight", "--uds", address], engine_command=planner("")) == 1
    assert answers == [200, 503]


def test_a_signal_ends_the_planner_and_its_processes(tmp_path, monkeypatch):
    pids, started = tmp_path / "pids", tmp_path / "started"

    async def stopped(gpu, mesh, checkpoint):
        command = planner(WAITS, str(tmp_path))
        looking = asyncio.create_task(preflight(gpu, mesh, checkpoint, command))
        while not pids.exists() or not pids.read_text().endswith("."):
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await looking

    monkeypatch.setattr(launch, "preflight", stopped)
    assert main(["--preflight", "--port", "0"], engine_command=planner(WRITES, str(started))) == 0
    assert not started.exists()
    for pid in pids.read_text().split()[:2]:
        wait_until(lambda pid=pid: not is_running(int(pid)))


@pytest.mark.slow
def test_the_real_planner_looks_at_this_machine(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    asyncio.run(preflight("auto", "4x2", DEMO_CHECKPOINT))
    with pytest.raises(PreflightFailed) as failed:
        asyncio.run(preflight("h100-sxm", "4x2", DEMO_CHECKPOINT))
    assert failed.value.code in (Exit.DRIVER, Exit.GPU_COUNT)
