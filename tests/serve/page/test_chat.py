"""The chat of the page, in a real Chromium."""

import pytest
from playwright.sync_api import expect

from tests.support.browser import opened
from tests.support.fake_client import FakeServer
from tests.support.listening import listening
from tests.support.page import answer_with, answered, ask, prompts
from tests.support.processes import wait_until

pytestmark = pytest.mark.slow


def test_a_chat_streams_and_stops(page, server):
    answer_with(server, "Hello, world! ", pause=0.02)
    ask(page, "Hi there")
    text = page.locator(".answer .text")
    expect(text).to_contain_text("Hello, world! Hello")
    assert server.engine.running == 1
    expect(page.locator("#send")).to_be_hidden()
    before = len(text.text_content())
    expect(text).to_contain_text("Hello, world! " * 4)
    page.click("#stop")
    wait_until(lambda: server.engine.running == 0)
    assert server.engine.aborted == 1
    assert len(answered(page)) > before
    expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator("#message")).to_be_focused()


def test_the_conversation_is_sent_with_each_message_and_forgotten_at_the_end(page, server):
    ask(page, "One")
    assert answered(page) == "Hello, world!"
    ask(page, "Two")
    answered(page, 1)
    page.click("#regenerate")
    answered(page, 1)
    page.click("#clear")
    ask(page, "Three")
    answered(page)
    first, second, again, third = prompts(server)
    assert "One" in first
    assert second.index("One") < second.index("Hello, world!") < second.index("Two")
    assert again == second
    assert "Three" in third and "One" not in third and "world" not in third
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)
    stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}])")
    assert "Three" not in stored


def test_an_answer_is_text_whatever_it_looks_like(page, server):
    text = "<img src=x onerror=alert(1)>\n\n  *a*   b\t<b>c</b> &amp; é 世界 🦙"
    answer_with(server, text)
    ask(page, "<i>Hi</i>")
    assert answered(page) == text
    assert page.locator(".question .text").text_content() == "<i>Hi</i>"
    assert page.locator(".turn :is(img, b, i)").count() == 0
    space = page.locator(".answer .text").evaluate("node => getComputedStyle(node).whiteSpace")
    assert space == "pre-wrap"


def test_the_end_of_a_long_answer_stays_in_sight_until_the_reader_scrolls_up(page, server):
    below = "node => node.scrollHeight - node.scrollTop - node.clientHeight"
    answer_with(server, "Hello, world!\n" * 10, pause=0.005)
    ask(page, "Hi")
    transcript, text = page.locator("#transcript"), page.locator(".answer .text")
    expect(text).to_contain_text("Hello, world!\n" * 60)
    assert transcript.evaluate(below) < 100
    transcript.hover()
    page.mouse.wheel(0, -100_000)
    expect(page.locator(".question")).to_be_in_viewport()

    def place_after_more_lines() -> float:
        length = len(text.text_content())
        wait_until(lambda: len(text.text_content()) > length + 200)
        return transcript.evaluate("node => node.scrollTop")

    places = [place_after_more_lines() for _ in range(3)]
    # A line that arrives while the browser still scrolls to the top moves where it ends by as much.
    assert places[1] == places[2] < 100
    assert transcript.evaluate(below) > 500
    page.keyboard.press("Escape")


def test_parameters_reach_the_request(page, server):
    page.click("#show-parameters")
    given = {
        "system": "Be brief.",
        "temperature": "0.7",
        "top_p": "0.9",
        "top_k": "40",
        "max_tokens": "5",
        "seed": "11",
        "presence_penalty": "0.5",
        "frequency_penalty": "-0.5",
        "repetition_penalty": "1.2",
        "stop": "wor\nnever",
    }
    for name, value in given.items():
        page.fill(f"[name={name}]", value)
    ask(page, "Hi")
    assert answered(page) == "Hello, "
    [(_, params)] = server.engine.requests
    for name in given.keys() - {"system", "stop"}:
        assert getattr(params, name) == float(given[name])
    assert params.stop == ("wor", "never")
    assert params.logprobs is None
    assert "Be brief." in prompts(server)[0]


def test_a_parameter_that_is_left_empty_is_the_servers_choice(page, server):
    ask(page, "Hi")
    answered(page)
    [(_, params)] = server.engine.requests
    assert params == server.served.defaults


def test_tokens_are_colored_by_probability_where_asked(page, server):
    answer_with(server, "Hello, 🦙!")
    page.click("#show-parameters")
    page.check("[name=colored]")
    ask(page, "Hi")
    assert answered(page) == "Hello, 🦙!"
    tokens = page.locator(".token")
    assert "".join(tokens.all_text_contents()) == "Hello, 🦙!"
    assert 1 < tokens.count() <= len(server.engine.script)
    assert server.engine.requests[0][1].logprobs == 5
    classes = tokens.evaluate_all("tokens => tokens.map((token) => token.className)")
    assert set(classes) == {"token level-1"}  # the engine says exp(-0.5) of every token
    tokens.first.hover()
    tooltip = page.locator("#alternatives")
    shares = tooltip.locator(".choice-share").all_text_contents()
    assert shares[:2] == ["60.7%", "22.3%"]
    assert tooltip.locator(".chosen").count() == 1
    page.mouse.move(1, 1)
    expect(tooltip).to_be_hidden()


def test_a_model_without_a_chat_template_continues_the_text(browser):
    server = FakeServer(" and so on", chat_template=False)
    with listening(server) as address, opened(browser, address) as page:
        expect(page.locator("#message")).to_have_attribute("placeholder", "A text to continue")
        ask(page, "Once")
        assert answered(page) == " and so on"
        page.click("#show-parameters")
        expect(page.locator("[name=system]")).to_be_hidden()
        page.check("[name=colored]")
        ask(page, " Then")
        answered(page, 1)
        assert page.locator(".token").count() > 1
        once, then = prompts(server)
        assert once.endswith("Once")
        assert then.endswith("Once and so on Then")


# Errors


def test_an_error_is_shown_as_the_servers_sentence(page, server):
    page.click("#show-parameters")
    page.fill("[name=max_tokens]", "5000")
    ask(page, "Hi")
    alert = page.locator("[role=alert]")
    expect(alert).to_contain_text("maximum context length is 200 tokens")
    expect(page.locator("[name=max_tokens]")).to_have_attribute("aria-invalid", "true")
    page.fill("[name=max_tokens]", "5")
    expect(page.locator("[aria-invalid]")).to_have_count(0)
    page.click("#regenerate")
    assert answered(page)
    expect(alert).to_have_count(0)


def test_an_error_in_the_middle_of_a_stream_keeps_what_has_come(page, server):
    server.engine.fail_after = 3
    ask(page, "Hi")
    expect(page.locator("[role=alert]")).to_have_text("The logits are not finite.")
    assert "Hello, world!".startswith(answered(page))
    assert answered(page) != ""


def test_a_value_that_is_no_number_is_named_before_it_is_sent(page, server):
    page.click("#show-parameters")
    page.fill("[name=temperature]", "7")
    ask(page, "Hi")
    expect(page.locator("[role=alert]")).to_contain_text("Temperature")
    assert server.engine.requests == []


def test_a_server_that_is_gone_is_noticed(page):
    page.context.set_offline(True)
    expect(page.locator("#state")).to_have_text("The server cannot be reached.")
    ask(page, "Hi")
    expect(page.locator("[role=alert]")).to_have_text("The server cannot be reached.")
    page.context.set_offline(False)
    expect(page.locator("#state")).to_have_text("Ready")


# The key


def test_the_page_opens_with_the_key_and_keeps_it_in_this_tab(browser):
    server = FakeServer(api_key="sesame")
    with listening(server) as address, opened(browser, address) as page:
        page.fill("#key", "simsim")
        page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_have_text("The server refuses this key.")
        page.fill("#key", "sesame")
        page.keyboard.press("Enter")
        for _ in range(2):
            expect(page.locator("#state")).to_have_text("Ready")
            ask(page, "Hi")
            assert answered(page) == "Hello, world!"
            page.reload()  # does not ask again
        expect(page.locator("#state")).to_have_text("Ready")
        assert page.locator(".bar").evaluate("bar => getComputedStyle(bar).display") == "flex"
        assert page.evaluate("[document.cookie, JSON.stringify({...localStorage})]") == ["", "{}"]
        assert "sesame" not in page.url
        with opened(browser, address) as other:
            expect(other.locator("#key")).to_be_visible()
