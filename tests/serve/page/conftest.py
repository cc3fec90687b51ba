"""A browser, and a server whose engine follows a script; both serve the tests of one file."""

import pytest
from playwright.sync_api import expect

from tests.support.browser import chromium, opened
from tests.support.fake_client import FakeServer, make_info
from tests.support.listening import listening
from tests.support.processes import wait_until


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def served():
    server = FakeServer()
    with listening(server) as address:
        yield server, address


@pytest.fixture
def server(served):
    """One server for all tests; each may change what its engine answers."""
    server, _ = served
    script, eos, stats = server.engine.script, server.engine.eos, server.engine.stats
    server.engine.requests.clear()
    server.engine.aborted = 0
    yield server
    server.engine.pause, server.engine.fail_after = 0.0, None
    server.engine.script, server.engine.eos, server.engine.stats = script, eos, stats
    server.engine.info = make_info()
    wait_until(lambda: server.engine.running == 0)


@pytest.fixture
def page(browser, served, server):
    with opened(browser, served[1]) as page:
        expect(page.locator("#state")).to_have_text("Ready")
        yield page
