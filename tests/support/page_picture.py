"""Writes the picture of docs/page.md: `python -m tests.support.page_picture docs/page.png`.

It shows the demo checkpoint on a 4 x 2 mesh of virtual CPU devices under load.
"""

import io
import sys
import threading

import httpx
from PIL import Image
from playwright.sync_api import expect

from tests.support.browser import chromium, opened
from tests.support.page import ask
from tests.support.server_process import REAL_SERVER, ServerProcess

CLIENTS = 14
SECONDS = 50
PROMPT = "Tell me about the ring. " * 12


def main(path: str) -> None:
    ended = threading.Event()
    server = ServerProcess(REAL_SERVER, "--mesh=4x2")

    def client(number: int) -> None:
        while not ended.wait(0.1 * number):
            body = {"prompt": f"{number} {PROMPT}", "max_tokens": 60 + 20 * number}
            body |= {"ignore_eos": True, "seed": number}
            httpx.post(server.url + "/v1/completions", json=body, timeout=120)

    with server.wait_ready(), chromium() as browser:
        clients = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
        size = {"width": 1360, "height": 1000}
        with opened(browser, server.url, viewport=size) as page:
            expect(page.locator("#state")).to_have_text("Ready")
            for thread in clients:
                thread.start()
            try:
                page.wait_for_timeout(1000 * SECONDS)
                ask(page, "Why does the ring never drain?")
                expect(page.locator(".answer .note").nth(0)).to_contain_text("tokens/s")
                page.click("#show-parameters")
                page.check("[name=colored]")
                page.fill("[name=temperature]", "1.5")
                page.fill("[name=seed]", "3")
                page.click("#show-parameters")
                ask(page, "What is this project?")
                expect(page.locator(".answer .note").nth(1)).to_contain_text("tokens/s")
                page.locator(".token:is(.level-1, .level-2, .level-3)").first.hover()
                image = Image.open(io.BytesIO(page.screenshot()))
                image.quantize(kmeans=3).save(path, optimize=True)  # a third of the bytes
            finally:
                ended.set()
                for thread in clients:
                    thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
