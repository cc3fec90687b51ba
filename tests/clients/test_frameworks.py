"""langchain-openai and LiteLLM."""

from contextlib import ExitStack

import pytest

from tests.support.clients import run_client
from tests.support.fake_client import FakeServer
from tests.support.listening import listening

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", ["drive_langchain.py", "drive_litellm.py"])
def test_frameworks(script):
    plain, failing = (FakeServer("Hello, 😀!", api_key="sesame") for _ in range(2))
    failing.engine.fail_after = 2
    with ExitStack() as stack:
        run_client(script, *(stack.enter_context(listening(server)) for server in (plain, failing)))
        assert plain.engine.running == failing.engine.running == 0
    assert plain.engine.aborted == 0
