"""What the tests of the page do with it, in a browser, and with the server behind it."""

from playwright.sync_api import Page, expect

from tests.support.fake_client import FakeServer, make_info


def answer_with(server: FakeServer, text: str, pause: float = 0.0) -> None:
    """The engine's next answers; without an end if they are slow."""
    server.engine.info = make_info(max_model_len=100_000)
    end = "" if pause else "<|eot_id|>"
    server.engine.script = server.tokenizer.encode(text + end, add_bos=False)
    server.engine.pause = pause
    if pause:
        server.engine.eos = -1


def ask(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def answered(page: Page, number: int = 0) -> str:
    """The text of a finished answer."""
    answer = page.locator(".answer").nth(number)
    expect(answer).not_to_have_attribute("aria-busy", "true")
    return answer.locator(".text").text_content()


def prompts(server: FakeServer) -> list[str]:
    """What the model was given, one text per request."""
    return [server.tokenizer.decode(prompt, False) for prompt, _ in server.engine.requests]
