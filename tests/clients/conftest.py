"""The server that the real clients talk to."""

from collections.abc import Iterator

import pytest

from tests.support.paths import DEMO_CHECKPOINT
from tests.support.server_process import REAL_SERVER, ServerProcess


@pytest.fixture(scope="session")
def demo_server() -> Iterator[ServerProcess]:
    """A server of the demo checkpoint in float32, with 2 stages and 2 ranks."""
    options = ("--mesh=2x2", "--dtype=float32", "--max-num-seqs=8", "--max-chunk=128")
    with ServerProcess(REAL_SERVER, str(DEMO_CHECKPOINT), *options) as server:
        yield server.wait_ready()
