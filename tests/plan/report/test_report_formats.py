"""The formats of a report: what one document becomes in HTML, Markdown, JSON and text."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.report.claims import Claim, limit_text
from llama_jax.plan.report.document import Plot, Report, Section, Table
from llama_jax.plan.report.html import html
from llama_jax.plan.report.json_text import json_text
from llama_jax.plan.report.judgement import Limit, Verdict, overall
from llama_jax.plan.report.markdown import markdown
from llama_jax.plan.report.quantities import band_text
from llama_jax.plan.report.writing import ReportError, write

MEASURED = Figure(Band(0.02, 0.025, 0.03), "s", Evidence.MEASURED_ELSEWHERE, "kernels")
COUNTED = Figure(Band.exactly(17.6e9), "bytes", Evidence.ARITHMETIC, "weights | table")
REPORT = Report(
    "8 × <H100>",
    "It holds & says `why`.",
    True,
    (
        Section(
            "targets",
            "Targets",
            ("One sentence.",),
            (Table("all", ("what", "figure"), (("tpot", MEASURED), ("weights", COUNTED))),),
            (Plot("line", "A line", {"x": [1, 2]}, "<svg></svg>"),),
        ),
    ),
    {"rate": 8},
)


@pytest.mark.parametrize(
    ("band", "unit", "text"),
    [
        (Band(0.02, 0.025, 0.03), "s", "25 (20–30) ms"),
        (Band(0.0005, 0.0009, 0.0012), "s", "900 (500–1,200) µs"),
        (Band(0.0, 0.0, 0.001), "s", "0 (0–1) ms"),
        (Band.exactly(0.5), "s", "500 ms"),
        (Band.exactly(1.0), "s", "1 s"),
        (Band.exactly(0.9996), "s", "1.00 s"),
        (Band.exactly(3600.0), "s", "3,600 s"),
        (Band.exactly(7200.0), "s", "2 h"),
        (Band.exactly(4.5e-6), "s", "4.50 µs"),
        (Band.exactly(0.0), "s", "0 µs"),
        (Band.exactly(17.6e9), "bytes", "17.6 GB"),
        (Band.exactly(0.85), "", "85 %"),
        (Band.exactly(0.99996), "", "99.99 %"),  # not all
        (Band.exactly(488281), "tokens", "488,281 tokens"),
        (Band.exactly(8), "requests/s", "8 requests/s"),
    ],
)
def test_a_figure_reads_in_the_unit_that_fits(band, unit, text):
    assert band_text(band, unit) == text


@pytest.mark.parametrize(
    ("band", "at_most", "at_least"),
    [
        (Band(1, 2, 3), Verdict.HOLDS, Verdict.FAILS),
        (Band(3, 4, 6), Verdict.LIKELY, Verdict.UNLIKELY),
        (Band(5, 5, 5), Verdict.HOLDS, Verdict.HOLDS),
        (Band(4, 6, 7), Verdict.UNLIKELY, Verdict.LIKELY),
        (Band(6, 7, 8), Verdict.FAILS, Verdict.HOLDS),
    ],
)
def test_a_band_is_judged_by_its_ends(band, at_most, at_least):
    figure = Figure(band, "s", Evidence.ARITHMETIC, "")
    assert Limit(5).judge(figure) is at_most
    assert Limit(5, at_least=True).judge(figure) is at_least


def test_the_weakest_verdict_decides():
    assert overall([Verdict.HOLDS, Verdict.UNLIKELY, Verdict.LIKELY]) is Verdict.UNLIKELY


def test_the_margin_is_a_share_of_the_bound():
    assert Limit(50).margin(40) == pytest.approx(0.2)
    assert Limit(8, at_least=True).margin(6) == pytest.approx(-0.25)


def test_a_claim_counts_the_arithmetic_and_the_simulation():
    """The weakest verdict, and the least room that an expected value leaves."""
    seconds, rates = (
        [Figure(band, unit, Evidence.ARITHMETIC, "") for band in bands]
        for unit, bands in (
            ("s", (Band(0.02, 0.03, 0.04), Band.exactly(0.06), Band.exactly(math.inf))),
            ("requests/s", (Band(9, 10, 11), Band.exactly(8.4))),
        )
    )
    late = Claim("TPOT", seconds[0], Limit(0.05), simulated=seconds[1])
    assert (late.required_verdict, late.claimed_verdict) == (Verdict.FAILS, None)
    assert late.verdict_text(late.required) == "fails: -20 %"
    endless = Claim("TPOT", seconds[2], Limit(0.05), simulated=seconds[0])
    assert endless.verdict_text(endless.required) == "fails: overloaded"
    kept = Claim("rate", rates[0], None, Limit(8.0, at_least=True), simulated=rates[1])
    assert kept.verdict_text(kept.claimed) == "holds: +5 %"
    assert limit_text(kept.claimed, kept.found) == "≥ 8 requests/s"
    assert limit_text(late.required, late.found) == "≤ 50 ms"


def test_json_has_every_figure_with_its_band_unit_evidence_and_source():
    content = json.loads(json_text(REPORT))
    rows = content["sections"]["targets"]["tables"]["all"]
    assert rows[0]["figure"] == {
        "low": 0.02,
        "expected": 0.025,
        "high": 0.03,
        "unit": "s",
        "evidence": "measured elsewhere",
        "source": "kernels",
    }
    assert content["met"] is True and content["inputs"] == {"rate": 8}
    assert content["sections"]["targets"]["plots"]["line"]["x"] == [1, 2]


def test_markdown_numbers_the_origins_of_figures_and_escapes_bars():
    text = markdown(REPORT)
    assert "| tpot | 25 (20–30) ms [1] |" in text
    assert "| weights | 17.6 GB [2] |" in text
    assert "[2] arithmetic: weights | table." in text


class Page(HTMLParser):
    """Checks that every element is closed, and collects what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "path", "use"):
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag


def test_the_page_is_whole_escaped_and_self_contained():
    text = html(REPORT)
    page = Page(text)
    assert page.open == [] and page.references == ["#targets"]
    assert "8 × &lt;H100&gt;" in text and "<code>why</code>" in text
    assert "25 ms<sup>1</sup> <span" in text and "<sup>2</sup>" in text
    assert not re.findall(r"@import|url\(|<script|<link", text)


def test_a_report_is_written_in_three_files_and_the_same_each_time(tmp_path):
    paths = write(REPORT, tmp_path / "new")
    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write(REPORT, tmp_path / "new")] == first


def test_a_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError):
        write(REPORT, tmp_path / "file")


def test_a_row_that_lacks_a_cell_is_a_defect():
    with pytest.raises(ValueError):
        Table("all", ("a", "b"), (("one",),))
