"""The page by keyboard, by ear, in both colors and on a phone, in a real Chromium."""

import pytest
from playwright.sync_api import expect

from tests.support.browser import opened
from tests.support.page import answer_with, answered, ask
from tests.support.processes import wait_until

pytestmark = pytest.mark.slow


PHONE = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True}

# The parts of the page that scroll sideways.
WIDE = """[...document.querySelectorAll("html, main, #transcript, #parameters, #deployment")]
    .filter((node) => node.scrollWidth > node.clientWidth)
    .map((node) => node.id || node.tagName)"""

# The contrast of every text with the first opaque color behind it (WCAG 2.1, 1.4.3).
CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const rgb = (layers) => {
        canvas.clearRect(0, 0, 1, 1);
        for (const layer of layers) { canvas.fillStyle = layer; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (color) => {
        const [r, g, b] = color.map((c) => c / 255)
            .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const low = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const text = texts.currentNode, node = text.parentElement;
        if (!text.data.trim() || !node.checkVisibility()) continue;
        if (node.closest(":disabled, .packet")) continue;
        const layers = [];
        for (let at = node; at; at = at.parentElement) {
            layers.unshift(at.closest(".device") && at.tagName === "text"
                ? getComputedStyle(document.querySelector(".mesh .box")).fill
                : getComputedStyle(at).backgroundColor);
        }
        const style = getComputedStyle(node);
        const ink = node instanceof SVGElement ? style.fill : style.color;
        const [a, b] = [rgb(layers), rgb([...layers, ink])].map(light);
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) low.push([text.data.trim().slice(0, 30), ratio]);
    }
    return low;
}"""


def test_everything_can_be_done_by_keyboard(page, server):
    press = page.keyboard.press
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("two")
    press("Shift+Enter")
    page.keyboard.type("lines")
    press("Enter")
    answered(page)
    assert page.locator(".question .text").text_content() == "two\nlines"
    press("Alt+p")
    expect(page.locator("[name=system]")).to_be_focused()
    press("Shift+Tab")
    expect(page.locator("#show-parameters")).to_be_focused()
    for _ in range(11):
        press("Tab")
    expect(page.locator("[name=colored]")).to_be_focused()
    press("Space")
    press("Alt+r")
    assert answered(page) == "Hello, world!"
    press("Alt+m")
    expect(page.locator("#message")).to_be_focused()
    press("Shift+Tab")  # one token, of them all
    expect(page.locator(".token").first).to_be_focused()
    expect(page.locator("#alternatives")).to_be_visible()
    press("ArrowRight")
    expect(page.locator(".token").nth(1)).to_be_focused()
    press("End")
    expect(page.locator(".token").last).to_be_focused()
    assert page.locator(".token").last.get_attribute("aria-describedby") == "alternatives"
    press("Escape")
    expect(page.locator("#alternatives")).to_be_hidden()
    press("Alt+/")
    expect(page.locator("#shortcuts")).to_be_visible()
    press("Escape")
    answer_with(server, "Hello, world! ", pause=0.02)
    press("Alt+m")
    page.keyboard.type("go on")
    press("Enter")
    wait_until(lambda: server.engine.running == 1)
    press("Escape")
    wait_until(lambda: server.engine.running == 0)
    press("Alt+n")
    expect(page.locator(".turn")).to_have_count(0)


def test_the_focus_can_be_seen_on_its_way_through_the_page(page):
    ways = page.evaluate("""[...document.querySelectorAll("a, button, input, summary, [tabindex]")]
        .filter((node) => node.checkVisibility() && !node.disabled).length""")
    seen = set()
    while True:
        page.keyboard.press("Tab")
        focused, *outline = page.evaluate(
            """() => {
                const node = document.activeElement;
                const { outlineStyle, outlineWidth } = getComputedStyle(node);
                return [[...document.all].indexOf(node), outlineStyle, outlineWidth];
            }"""
        )
        if focused in seen:
            break
        seen.add(focused)
        if page.evaluate("document.activeElement !== document.body"):
            assert outline == ["solid", "3px"]
    assert len(seen) >= ways


def test_answers_are_read_to_users_of_screen_readers_by_sentences(page, server):
    said = """new MutationObserver(() => (window.said ??= []).push(
        document.getElementById("spoken").textContent)
    ).observe(document.getElementById("spoken"), { childList: true, characterData: true })"""
    page.evaluate(said)
    answer_with(server, "One is. Two is. Three")
    ask(page, "Hi")
    answered(page)
    assert page.locator("#spoken").get_attribute("aria-live") == "polite"
    heard = page.evaluate("window.said")
    assert heard[0].startswith("One is.") and len(heard) <= 4
    assert " ".join(heard).startswith("One is. Two is. Three")
    # Without names, buttons and fields cannot be told apart.
    nameless = """[...document.querySelectorAll("button, input, textarea, section, [role=meter]")]
        .filter((node) => node.checkVisibility())
        .filter((node) => !node.textContent.trim() && !node.ariaLabel && !node.labels?.length
            && !node.getAttribute("aria-labelledby"))
        .map((node) => node.outerHTML)"""
    assert page.evaluate(nameless) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(browser, served, server, scheme):
    with opened(browser, served[1], color_scheme=scheme) as page:
        expect(page.locator("#state")).to_have_text("Ready")
        assert page.evaluate(CONTRAST) == []
        page.click("#show-parameters")
        page.check("[name=colored]")
        ask(page, "Hi")
        answered(page)
        for level in range(5):
            page.locator(".token").nth(level).evaluate(
                "(token, level) => { token.className = `token level-${level}`; }", level
            )
        page.fill("[name=max_tokens]", "5000")
        ask(page, "Hi")
        expect(page.locator("[role=alert]")).to_be_visible()
        page.click("#table summary")
        page.locator(".token").first.hover()
        page.locator("#shortcuts").evaluate("dialog => dialog.show()")
        assert page.evaluate(CONTRAST) == []


def test_light_and_dark_follow_the_system_until_one_is_chosen(browser, served, server):
    def background(theme: str) -> str:
        expect(page.locator("html")).to_have_attribute("data-theme", theme)
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    with opened(browser, served[1], color_scheme="dark") as page:
        dark = background("dark")
        page.emulate_media(color_scheme="light")
        light = background("light")
        assert dark != light
        page.click("#theme")
        assert background("dark") == dark
        page.reload()
        assert background("dark") == dark
        page.click("#theme")
        assert background("light") == light


def test_nothing_is_wider_than_a_phone(browser, served, server):
    answer_with(server, "a_very_long_word_that_does_not_end_" * 5 + " and more")
    with opened(browser, served[1], **PHONE) as page:
        expect(page.locator("#state")).to_have_text("Ready")
        page.tap("#show-parameters")
        assert page.evaluate(WIDE) == []
        page.check("[name=colored]")
        ask(page, "x" * 200)
        answered(page)
        assert page.evaluate(WIDE) == []
        expect(page.locator("#deployment")).to_be_hidden()
        page.tap("#show-deployment")
        expect(page.locator("#chat")).to_be_hidden()
        expect(page.locator("#mesh .device")).to_have_count(4)
        page.tap("#table summary")
        expect(page.locator("#table tbody tr")).to_have_count(4)
        assert page.evaluate(WIDE) == []
