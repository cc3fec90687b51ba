"""The picture of the deployment on the page, in a real Chromium."""

import re

import pytest
from playwright.sync_api import expect

from llama_jax.engine.interface import StageStats, Stats
from tests.support.browser import opened
from tests.support.page import answer_with, ask

pytestmark = pytest.mark.slow


def test_the_picture_shows_the_mesh_and_its_packets(page, server):
    mesh = page.locator("#mesh svg")
    expect(mesh.locator(".device")).to_have_count(4)
    expect(mesh.locator(".stage")).to_have_text(["stage 0 · layers 0–1", "stage 1 · layers 2–3"])
    expect(mesh.locator(".device").first).to_contain_text("weights 1.50 MB · KV 8 MB")
    expect(mesh.locator(".hollow")).to_have_count(2)
    server.engine.stats = Stats(
        num_running=3,
        num_waiting=2,
        pages_total=64,
        pages_free=16,
        ticks=7,
        tick_seconds=0.14,
        stages=(StageStats(3, 64), StageStats(0, 0)),
    )
    packets = mesh.locator(".packet")
    expect(packets).to_have_text(["3 +64", ""])  # packet 0 is in stage 0 after 7 ticks
    expect(mesh).to_have_attribute("aria-label", re.compile("Stage 0 holds 3 .* 64 .* Stage 1 "))
    gauges = page.locator("#gauges .tile")
    expect(gauges.nth(0)).to_contain_text("3")
    expect(gauges.nth(1)).to_contain_text("2")
    expect(gauges.nth(2)).to_contain_text("75.0%")
    where = packets.first.get_attribute("transform")
    expect(packets.first).not_to_have_attribute("transform", where)
    page.click("#table summary")
    expect(page.locator("#table tbody tr").first).to_contain_text("3 decode rows and 64 prompt")
    server.engine.stats = Stats(pages_total=64, pages_free=64, ticks=8)
    expect(mesh.locator(".hollow")).to_have_count(2)
    expect(page.locator("#motion")).to_contain_text("stands still")


def test_packets_do_not_move_where_motion_is_unwelcome(browser, served, server):
    with opened(browser, served[1], reduced_motion="reduce") as page:
        packets = (StageStats(3, 0), StageStats(2, 0))
        server.engine.stats = Stats(ticks=8, stages=packets)
        packet = page.locator("#mesh .packet").first
        expect(packet).to_have_text("2")  # it is in stage 1
        where = packet.get_attribute("transform")
        server.engine.stats = Stats(ticks=10, stages=(StageStats(3, 0), StageStats(9, 0)))
        expect(packet).to_have_text("9")
        assert packet.get_attribute("transform") == where
        server.engine.stats = Stats(ticks=11, stages=packets)
        expect(packet).to_have_text("3")
        assert packet.get_attribute("transform") != where


def test_latencies_are_compared_with_targets_that_can_be_set(page, server):
    answer_with(server, "Hello, world! ", pause=0.03)
    ask(page, "Hi")
    chart = page.locator(".chart", has_text="Time per output token")
    expect(chart.locator(".verdict")).to_have_text("p95 within")
    chart.locator("input").fill("1")
    chart.locator("input").press("Enter")
    expect(chart.locator(".verdict")).to_have_text("p95 above")
    assert re.match(r"M[\d.]+ [\d.]+L", chart.locator("path.line-0").get_attribute("d"))
    page.keyboard.press("Escape")
    page.reload()
    assert chart.locator("input").input_value() == "1"
