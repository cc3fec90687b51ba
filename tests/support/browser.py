"""A real Chromium for slow tests; `make test-all` installs it into the virtual environment."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT = 20_000  # milliseconds; a busy machine takes its time

expect.set_options(timeout=TIMEOUT)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Runs the browser of the virtual environment, or else one of the system."""
    own = Path(sys.prefix) / "chromium"
    env = dict(os.environ)
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if own.is_dir():
        program = str(own / "chromium")
        env |= {"LD_LIBRARY_PATH": str(own / "lib"), "FONTCONFIG_FILE": str(own / "fonts.conf")}
    assert program, "run `make test-all`, which installs Chromium"
    with sync_playwright() as playwright:
        # Its sandbox cannot be set up by root, nor inside most containers.
        browser = playwright.chromium.launch(
            executable_path=program, env=env, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Browser, address: str, **options) -> Iterator[Page]:
    """Opens an address in a context of its own; asserts that no script of it fails.

    Refused requests are no failures: the browser lists them as "Failed to load resource".
    """
    context: BrowserContext = browser.new_context(**options)
    context.set_default_timeout(TIMEOUT)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "console",
        lambda message: (
            problems.append(message.text)
            if message.type in ("error", "warning") and "Failed to load" not in message.text
            else None
        ),
    )
    page.goto(address)
    try:
        yield page
        assert problems == []
    finally:
        context.close()
