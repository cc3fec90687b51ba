"""The page over a real engine: its picture follows the load, and a stopped answer ends."""

import re
import threading

import httpx
import pytest
from playwright.sync_api import expect

from tests.support.browser import opened
from tests.support.page import ask
from tests.support.paths import DEMO_CHECKPOINT
from tests.support.processes import wait_until
from tests.support.server_process import REAL_SERVER, ServerProcess

pytestmark = pytest.mark.slow

STREAMS = 10  # at most three in each of four packets, so at least one
LONG = {"prompt": "the ring " * 40, "max_tokens": 150, "ignore_eos": True}


@pytest.fixture(scope="module")
def server():
    with ServerProcess(REAL_SERVER, str(DEMO_CHECKPOINT), "--mesh=4x2") as server:
        yield server.wait_ready()


@pytest.fixture
def load(server):
    """Clients that ask again as soon as they are answered; call the value to end them."""
    ended = threading.Event()

    def client() -> None:
        while not ended.is_set():
            httpx.post(server.url + "/v1/completions", json=LONG, timeout=120)

    threads = [threading.Thread(target=client) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()

    def end() -> None:
        ended.set()
        for thread in threads:
            thread.join()

    yield end
    end()


def stats(server: ServerProcess) -> dict:
    return httpx.get(server.url + "/status").json()["stats"]


def test_the_picture_changes_under_load(browser, server, load):
    with opened(browser, server.url) as page:
        expect(page.locator("#mesh .device")).to_have_count(8)
        running = page.locator("#gauges .tile", has_text="Running").locator(".value")
        expect(running).to_have_text(str(STREAMS))
        packets = page.locator("#mesh .packet").filter(has_text=re.compile("^[123]"))
        expect(packets).to_have_count(4)
        expect(page.locator("#motion")).to_contain_text("A tick takes")
        expect(page.locator("#mesh .kv-used").first).not_to_have_attribute("width", "0")
        expect(page.locator(".chart .verdict").nth(1)).to_contain_text("p95")

        ask(page, "What is a pipeline stage?")
        expect(page.locator(".answer .text")).not_to_be_empty()
        page.keyboard.press("Escape")
        expect(page.locator(".answer .note")).to_contain_text("Stopped.")
        load()
        wait_until(lambda: stats(server)["num_running"] == 0)
        assert stats(server)["pages_free"] == stats(server)["pages_total"]
        expect(running).to_have_text("0")
        expect(page.locator("#mesh .hollow")).to_have_count(4)
