"""The openai package of npm and the Vercel AI SDK, on Node."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.calling import calling_server
from tests.support.fake_client import FakeServer, make_info
from tests.support.listening import listening
from tests.support.paths import ROOT
from tests.support.pausing import Pausing
from tests.support.processes import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None, reason="needs Node"),
]
FOLDER = ROOT / "tests" / "clients" / "node"


def with_a_full_queue(server: FakeServer) -> FakeServer:
    """Lets a header of a client ask for a full queue: "always", or "once" for a first attempt."""
    app, engine = server.app, server.engine

    async def refusing(scope, receive, send) -> None:
        headers = dict(scope["headers"])
        asked = headers.get(b"x-test-full-queue")
        first = headers.get(b"x-stainless-retry-count") == b"0"
        running = engine.running
        if asked == b"always" or (asked == b"once" and first):
            engine.running = engine.max_in_flight
        await app(scope, receive, send)
        engine.running = running if asked else engine.running

    server.app = refusing
    return server


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    """A plain one; others that never end, fail early, send comments in between, and call tools."""
    made = [FakeServer("Hello, 😀!", api_key="sesame") for _ in range(4)]
    made.append(calling_server(api_key="sesame"))
    with_a_full_queue(made[0])
    made[1].engine.eos = None
    made[1].engine.info = make_info(max_model_len=1_000_000)
    made[2].engine.fail_after = 2
    pausing = Pausing(made[3])
    yield made
    for server in made:
        wait_until(lambda: server.engine.running == 0)  # noqa: B023
    assert made[0].engine.aborted == 0
    assert made[1].engine.aborted == len(made[1].engine.requests) > 0
    assert pausing.comments >= 2 * len(made[3].engine.script) * len(made[3].engine.requests) > 0


@pytest.mark.parametrize("script", ["drive_openai.mjs", "drive_ai_sdk.mjs"])
def test_node_clients(servers, script):
    assert (FOLDER / "node_modules").exists(), "run `make test-all`, which installs the clients"
    with ExitStack() as stack:
        urls = [stack.enter_context(listening(server)) for server in servers]
        command = ["node", script, *urls]
        done = subprocess.run(
            command, cwd=FOLDER, capture_output=True, text=True, timeout=300, check=False
        )
        for server in servers:
            wait_until(lambda: server.engine.running == 0)  # noqa: B023
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
