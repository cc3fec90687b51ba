"""`LLM` and `Completion` as HTML, and progress without a notebook."""

import asyncio
import io
import re
import subprocess
import sys
from contextlib import redirect_stderr
from html.parser import HTMLParser

import pytest

from llama_jax.engine.interface import DeviceInfo, EngineInfo, Progress, Stats
from llama_jax.llm.completion import Completion
from llama_jax.llm.notebook.display import running_text
from llama_jax.llm.notebook.html import llm_html
from llama_jax.llm.notebook.progress import RequestProgress, StartProgress, make_display
from tests.support.paths import ROOT

EVIL = '</div><script>alert("1")</script>&amp;'
ALLOWED = {"div", "b", "small", "code", "table", "tr", "th", "td", "br", "span"}
INFO = EngineInfo(
    model=EVIL, mesh="2x2", platform="cpu", dtype="float32", kv_cache_dtype="float32",
    vocab_size=10, max_model_len=4096, max_num_seqs=8, page_size=16, num_pages=100,
    num_programs=2, load_seconds=1.0, compile_seconds=2.0,
    devices=[
        DeviceInfo(f"gpu:{i}{EVIL}", i // 2, i % 2, [[0, 1, 2], []][i // 2], 17_639_000_000, 5_000)
        for i in range(4)
    ],
)  # fmt: skip


class Reader(HTMLParser):
    """Checks that tags are balanced and harmless, and collects the text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag in ALLOWED
        assert {name for name, _ in attributes} <= {"style", "role"}
        assert not re.search("background|#|[^-]color", str(dict(attributes).get("style")))
        if tag != "br":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_a_completion_is_escaped() -> None:
    answer = Completion("1 < 2 " + EVIL, [1, 2], "error", [3, 4, 5], "No " + EVIL, "Why " + EVIL)
    text = Reader(answer._repr_html_()).text
    for part in ("1 < 2 " + EVIL, "No " + EVIL, "Why " + EVIL, "2 tokens after 3", "error"):
        assert part in text
    ids = Completion("a", [1], "stop", [3, 4, 5])
    assert "3 token ids" in Reader(ids._repr_html_()).text and "Error" not in ids._repr_html_()
    assert Reader(running_text(EVIL)[1]).text.strip() == EVIL


def test_an_llm_shows_mesh_limits_and_state() -> None:
    stats = Stats(num_running=3, num_waiting=1, pages_total=100, pages_free=40)
    text = Reader(llm_html(INFO, stats, ended=None, place="here")).text
    for part in (EVIL, "2x2", "ready", "stage 0", "layers 0-2", "no layers", "rank 1",
                 f"gpu:3{EVIL}", "17.6 GB", "5.00 kB", "4,096 tokens", "100 pages of 16",
                 "3 running, 1 waiting, 60 of 100 pages in use"):  # fmt: skip
        assert part in text, part
    ended = Reader(llm_html(INFO, stats, ended="It died of " + EVIL, place="here")).text
    assert "It died of " + EVIL in ended and "running" not in ended


def test_progress_in_a_terminal_is_shown_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "IPython" not in sys.modules or sys.modules["IPython"].get_ipython() is None
    assert make_display(None) is None and make_display(False) is None
    with redirect_stderr(io.StringIO()) as shown:
        display = make_display(True)
        assert display is not None
        start = StartProgress(display, "a model")
        for done in range(3):
            start(Progress("compiling", done, 2, "8 rows"))
        start.ready(INFO)
    assert "Starting the engine" in shown.getvalue()
    assert "Compiling programs: 2 of 2" in shown.getvalue()


class Recorder:
    """A display that keeps what it is told, and then fails."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def update(self, *report: object) -> None:
        self.told.append(report)
        raise OSError("the display is broken")

    def finish(self, text: str = "") -> None:
        self.update(text)


def test_a_broken_display_does_not_end_a_start() -> None:
    display = Recorder()
    start = StartProgress(display, "a model")
    start(Progress("compiling", 1, 2, "8 rows"))
    start.failed()
    assert display.told == [
        ("Starting the engine", 0, 1, "a model"),
        ("Compiling programs", 1, 2, "8 rows"),
        ("a model did not start.",),
    ]


@pytest.mark.parametrize(
    ("total", "patience", "shown"), [(2, 0.0, True), (2, 60, False), (1, 0.0, False)]
)
def test_the_progress_of_requests_that_take_long(
    monkeypatch: pytest.MonkeyPatch, total: int, patience: float, shown: bool
) -> None:
    monkeypatch.setattr("llama_jax.llm.notebook.progress.PATIENCE_SECONDS", patience)
    display = Recorder()

    async def answer() -> str:
        count = RequestProgress(display, total)
        with count.shown():
            for _ in range(3):
                await asyncio.sleep(0)
            count.done += total
            return "answered"

    assert asyncio.run(answer()) == "answered"
    assert [report[:3] for report in display.told] == [("Requests", n, 2) for n in (0, 2)] * shown


def test_ipython_is_not_loaded() -> None:
    program = "import sys, llama_jax.llm.llm; assert 'IPython' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
