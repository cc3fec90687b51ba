"""Requests that schemathesis makes of /openapi.json: each is answered as it is described."""

import json
import re

import httpx
import pytest

from tests.support.clients import run_client
from tests.support.processes import wait_until
from tests.support.served_checkpoint import write_served_checkpoint
from tests.support.server_process import REAL_SERVER, ServerProcess

pytestmark = pytest.mark.slow

# Few tokens, so that the requests without a limit end soon.
SMALL = (
    "--mesh=2x1",
    "--max-num-seqs=4",
    "--max-chunk=64",
    "--max-model-len=64",
    "--wait-for-programs",
)


@pytest.fixture
def server(tmp_path):
    """A small model, whose engine is that of any other."""
    path = write_served_checkpoint(tmp_path / "tiny", max_position_embeddings=128)
    with ServerProcess(REAL_SERVER, str(path), *SMALL) as server:
        yield server.wait_ready()


def gauges(server: ServerProcess) -> list[str]:
    """What says whether the engine is at rest, and whether anything was compiled."""
    names = "num_requests_running|num_requests_waiting|kv_pages_free|compilations_total"
    return re.findall(rf"^llama_jax:(?:{names}){{.*", httpx.get(f"{server.url}/metrics").text, re.M)


def test_generated_requests_are_answered_as_described(server):
    before, engine = gauges(server), server.engine_pid()
    assert len(before) == 4
    found = json.loads(run_client("drive_schemathesis.py", server.url, "30", timeout=500))
    assert found["requests"] >= 1000
    assert found["canaries"] >= 10
    wait_until(lambda: gauges(server) == before)
    assert server.engine_pid() == engine
    # Nothing failed. It also sends what is not HTTP.
    lines = {line.split(" ", 2)[2] for line in server.err}
    assert {line for line in lines if not line.startswith("INFO ")} <= {
        "WARNING Invalid HTTP request received.\n"
    }
