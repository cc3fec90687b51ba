"""`--report DIR` as a user runs it: every section, every plot, in a browser."""

import json
import re
from html.parser import HTMLParser

import pytest

from llama_jax.plan.__main__ import MISSED, main
from llama_jax.plan.command_line import make_parser, read_question
from llama_jax.plan.frontier import points
from llama_jax.plan.json_text import plan_json
from llama_jax.plan.plan import make_plan
from llama_jax.plan.report import drawing
from llama_jax.plan.report.build import plan_report, target_section
from llama_jax.plan.report.document import Section
from llama_jax.plan.report.html import html
from llama_jax.plan.report.json_text import json_text
from llama_jax.plan.report.reference import reference_report
from llama_jax.plan.report.sections.alternatives import frontier_section
from llama_jax.plan.report.sections.risks import risk_section
from llama_jax.plan.report.sections.timeline import timeline_section
from llama_jax.terminal.units import count_text
from tests.support.browser import chromium, opened

SECTIONS = {
    *("targets", "why", "server", "stages", "memory", "ticks", "communication", "balance"),
    *("utilization", "headroom", "simulation", "frontier", "ring", "risks", "compliance"),
    "assumptions",
}
PLOTS = {
    "memory": {"memory_by_gpu"},
    "ticks": {"latency"},
    "simulation": {"time_to_first_token", "time_per_output_token"},
    "frontier": {"frontier"},
    "ring": {"ring"},
}
SMALL = ["--model", "llama3-8b", "--gpu", "h100-sxm", "--gpus", "2", "--rate", "4"]


class Resources(HTMLParser):
    """Collects what a page refers to outside itself."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = [v for n, v in attrs if n in ("src", "href", "xlink:href", "data", "srcset")]
        self.found += [value for value in values if not value.startswith("#")]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert main([*SMALL, "--duration", "20s", "--report", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_every_section_and_plot_is_there(written):
    content = json.loads((written / "report.json").read_text())
    assert set(content["sections"]) == SECTIONS and content["met"] is True
    for section, plots in PLOTS.items():
        assert set(content["sections"][section]["plots"]) == plots
    page = (written / "report.html").read_text()
    assert page.count("<svg") == sum(map(len, PLOTS.values()))
    text = (written / "report.md").read_text()
    for name in ("disaggregated prefill", "MoE", "power"):
        assert name in text and name in page


@pytest.mark.slow
def test_the_page_needs_nothing_from_elsewhere(written):
    page = (written / "report.html").read_text()
    assert Resources(page).found == []
    assert not re.findall(r"@import|url\((?!#)|<script|<link", page)


@pytest.mark.slow
def test_the_same_question_gives_the_same_report(written, tmp_path):
    assert main([*SMALL, "--duration", "20s", "--report", str(tmp_path)]) == 0
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_its_window_and_can_be_read(written, scheme, width):
    with chromium() as browser:
        view = {"width": width, "height": 900}
        address = (written / "report.html").as_uri()
        with opened(browser, address, viewport=view, color_scheme=scheme) as page:
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.locator("svg").count() == sum(map(len, PLOTS.values()))
            colors = page.evaluate(
                "[getComputedStyle(document.body).color, "
                "getComputedStyle(document.body).backgroundColor]"
            )
            ink, paper = (sum(map(int, re.findall(r"\d+", c)[:3])) for c in colors)
            assert (ink < paper) == (scheme == "light") and abs(ink - paper) > 500


@pytest.mark.slow
def test_a_long_heading_does_not_widen_a_phone(tmp_path):
    plan = make_plan(read_question(make_parser().parse_args(SMALL)))
    extra = Section("long", "A heading of as many words as that of a section that was simulated")
    (tmp_path / "report.html").write_text(html(plan_report(plan, None, (extra,))))
    address = (tmp_path / "report.html").as_uri()
    with (
        chromium() as browser,
        opened(browser, address, viewport={"width": 360, "height": 700}) as page,
    ):
        assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_the_frontier_of_one_layout_is_beside_all_others(monkeypatch):
    monkeypatch.setattr(drawing, "can_draw", lambda: False)
    plan = make_plan(read_question(make_parser().parse_args([*SMALL, "--layout", "1x2"])))
    assert len(plan.candidates) == 1
    sections = json.loads(json_text(plan_report(plan, None)))["sections"]
    found = sections["frontier"]["plots"]["frontier"]["points"]
    layouts = list(dict.fromkeys(point["layout"] for point in found))
    assert layouts[0] == "1x2" and set(layouts) == {"1x2", "2x1", "2 replicas of 1x1"}


def test_without_matplotlib_the_report_says_so_and_has_the_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(drawing, "can_draw", lambda: False)
    monkeypatch.setattr("llama_jax.plan.report.build.can_draw", lambda: False)
    assert main([*SMALL, "--duration", "2s", "--report", str(tmp_path)]) == 0
    assert "<svg" not in (tmp_path / "report.html").read_text()
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["sections"]["frontier"]["plots"]["frontier"]["points"]
    assumed = content["sections"]["assumptions"]["tables"]["assumptions"]
    assert any(row["assumed"] == "plots" for row in assumed)


def test_a_frontier_that_is_not_drawn_is_not_spoken_of_as_drawn(monkeypatch):
    plan = make_plan(read_question(make_parser().parse_args(SMALL)))
    drawn = frontier_section(plan).text
    monkeypatch.setattr(drawing, "can_draw", lambda: False)
    (text,) = frontier_section(plan).text
    assert text not in drawn and f"{len(points(plan))} points" in text


def test_the_report_says_what_the_plan_says(monkeypatch):
    monkeypatch.setattr(drawing, "can_draw", lambda: False)
    plan = make_plan(read_question(make_parser().parse_args(SMALL)))
    sections = json.loads(json_text(plan_report(plan, None)))["sections"]
    found = plan_json(plan, None)["layouts"][0]["figures"]

    def table(section: str, name: str) -> list[list]:
        return [list(row.values()) for row in sections[section]["tables"][name]]

    def same(cell: dict, name: str) -> bool:
        bounds = ("low", "expected", "high")
        return all(cell[b] == pytest.approx(found[name][b], rel=1e-6) for b in bounds)

    ticks = {row[0]: row[1:] for row in table("ticks", "parts")}
    for cell, kind in zip(ticks["whole tick"], ("decode", "prefill"), strict=True):
        assert same(cell, f"{kind} tick")
    for cell, kind in zip(ticks["communication"], ("decode", "prefill"), strict=True):
        assert same(cell, f"{kind} tick: communication")
    targets = {row[0]: row[1] for row in table("targets", "targets")}
    assert same(targets["time to first token"], "TTFT")
    assert same(targets["time per output token"], "TPOT")
    assert same(table("memory", "kv")[0][1], "KV capacity of a replica")


@pytest.mark.parametrize("prompt", [100, 5000])
def test_the_ring_runs_with_a_chunk_until_the_last_has_passed(prompt):
    question = [*SMALL, "--layout", "2x1", "--max-chunk", "128", "--prompt-tokens", str(prompt)]
    plan = make_plan(read_question(make_parser().parse_args(question)))
    chunks = -(-prompt // 128)
    (text,) = timeline_section(plan.best).text
    assert f"{count_text(chunks, 'chunk')} from tick 5" in text
    assert f"ticks 5 to {5 + chunks - 1 + 1}," in text  # in the second stage one tick later


def test_the_memory_of_a_plan_that_does_not_fit_is_that_of_one_request():
    plan = make_plan(read_question(make_parser().parse_args(["--gpus", "4", "--gpu", "a100-40"])))
    (missed,) = plan.best.missed
    (table,) = target_section(plan, None).tables
    (found,) = [row[1] for row in table.rows if "memory" in row[0]]
    assert missed.target == "memory"
    assert found.value.expected * plan.best.memory.total == pytest.approx(missed.value)


def test_a_plan_that_falls_behind_fills_its_cache():
    plan = make_plan(read_question(make_parser().parse_args([*SMALL, "--rate", "2000"])))
    (table,) = target_section(plan, None).tables
    (found,) = [row[1] for row in table.rows if "memory" in row[0]]
    assert plan.best.state().overload and 0.84 < found.value.expected <= 0.85
    assert any("needs 100%" in row[1] for row in risk_section(plan).tables[0].rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "question",
    [["--rate", "200"], ["--gpu", "l40s", "--gpus", "2"], ["--gpus", "1", "--model", "llama3-8b"]],
    ids=["too much", "does not fit", "one GPU"],
)
def test_a_plan_that_fails_is_reported_as_well(question, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "can_draw", lambda: False)
    code = main([*question, "--duration", "5s", "--report", str(tmp_path)])
    content = json.loads((tmp_path / "report.json").read_text())
    assert code == (0 if content["met"] else 1) and set(content["sections"]) == SECTIONS


@pytest.mark.slow
def test_the_reference_report_is_the_same_each_time():
    assert json_text(reference_report()) == json_text(reference_report())


@pytest.mark.slow
def test_the_verdict_of_a_report_counts_the_simulation(tmp_path, capsys):
    """All requests of a trace at once: on average it is an easy load, and most of them wait."""
    trace = tmp_path / "trace.csv"
    lines = ["0,1024,16"] * 60 + ["600,1024,16"]
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines))
    asked = [*SMALL[:-2], "--trace", str(trace)]
    assert make_plan(read_question(make_parser().parse_args(asked))).best.holds
    assert main([*asked, "--report", str(tmp_path / "report"), "--json"]) == MISSED
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["met"] is False
    assert json.loads(capsys.readouterr().out)["verdict"] == written["verdict"]
