"""A fork of a process that has an engine: the engine belongs to the parent alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.processes import FAKE

PROCESS = f"process_host({FAKE!r})"
THREAD = "in_process_host(build=FakeEngine)"


@pytest.mark.parametrize("host", [PROCESS, THREAD], ids=["process", "thread"])
def test_a_forked_child_cannot_use_the_engine_nor_end_it(host: str, tmp_path: Path) -> None:
    program = f"""
import os, sys, tempfile
tempfile.tempdir = {str(tmp_path)!r}
from llama_jax.client.blocking import BlockingClient
from llama_jax.client.engine_process import process_host
from llama_jax.client.in_process import in_process_host
from llama_jax.engine.errors import EngineDead
from llama_jax.engine.options import EngineOptions
from tests.support.engine_clients import collect
from tests.support.fake_engine import FakeEngine

def generate():
    outputs = client.run(collect(client.client, [5], max_tokens=3))
    assert [output.token for output in outputs] == [6, 7, 8]

client = BlockingClient(EngineOptions(path="fake"), None, {host})
generate()
child = os.fork()
if child == 0:
    try:
        generate()
    except EngineDead:
        client.begin_close()
        client.close()
        sys.exit(7)  # with all exit handlers and finalizers
    sys.exit(8)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
generate()
assert len(os.listdir(tempfile.tempdir)) == 1
client.close()
assert not os.listdir(tempfile.tempdir)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
