"""Generation in a real kernel: what front ends are sent, and what interrupts leave running.

A cell is interrupted as a front end's button does it, at moments that a seed chooses.
"""

import itertools
import random
import time
from collections.abc import Iterator
from html import escape

import pytest

from tests.support.kernel import Kernel, running_kernel

pytestmark = pytest.mark.slow  # the kernel and the engine in it take ten seconds to start

START = """
import time
from llama_jax import LLM, SamplingParams

FOREVER = SamplingParams(temperature=0, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=40)
llm = LLM("demo/checkpoint", max_num_seqs=2, max_chunk=64, kv_cache_memory=1 << 24, in_process=IN)
before = llm.generate("The ring", SHORT)

def settle():
    "Returns when a report that is newer than this call says that nothing runs."
    for _ in range(2):
        report = llm.stats
        while llm.stats is report:
            time.sleep(0.005)
    assert llm.stats.num_running == llm.stats.num_waiting == 0, llm.stats
    assert llm.stats.pages_free == llm.stats.pages_total, llm.stats
"""
CELLS = (
    'llm.generate("The ring", FOREVER)',
    "llm.generate([[n] for n in range(1, 9)], FOREVER)",
    'llm.chat([{"role": "user", "content": "What is a stage?"}], FOREVER)',
    'llm.stream("The ring", FOREVER)',
    'for piece in llm.stream("The ring", FOREVER):\n    print(piece, end="")',
    'for piece in llm.stream("The ring", FOREVER):\n    time.sleep(0.05)',
    'stream = llm.stream("The ring", FOREVER)\nfor piece in stream:\n    time.sleep(0.05)',
)


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    with running_kernel() as kernel:
        yield kernel


@pytest.fixture(scope="module")
def start(kernel: Kernel) -> dict[str, list[str]]:
    """Starts an engine in the kernel's process; returns what that displays."""
    output = kernel.finish(kernel.begin(START.replace("IN)", "True)")))
    assert not output.error, output.messages
    assert [kind for kind, _ in output.messages if kind == "stream"] == []
    return output.displays()


def interrupt_cells(kernel: Kernel, times: int) -> None:
    """Interrupts cells that generate, some of them twice, and checks after each that nothing of it
    goes on."""
    chance = random.Random(times)
    for number in range(times):
        # Interrupts are for the cell's own code: before it, they can end the kernel.
        cell = kernel.begin('print("begun", flush=True)\n' + CELLS[number % len(CELLS)])
        kernel.finish(cell, until="stream")
        time.sleep(chance.choice([0.01, 0.1, 0.3]) * chance.random())
        kernel.interrupt()
        if chance.random() < 0.3:
            time.sleep(0.003 * chance.random())
            kernel.interrupt()
        output = kernel.finish(cell)
        # While IPython shows an interrupt, another one leaves a line on stderr instead.
        lines = [content["text"].strip() for kind, content in output.messages if kind == "stream"]
        assert "KeyboardInterrupt" in (output.error, *lines[-1:]), output.messages
        kernel.run("settle()")
    kernel.run('assert llm.generate("The ring", SHORT) == before')


@pytest.mark.usefixtures("start")
def test_interrupted_cells_leave_no_request_and_no_page(kernel: Kernel) -> None:
    interrupt_cells(kernel, 8)


@pytest.mark.parametrize("in_process", [True, False])
def test_interrupting_a_cell_50_times(in_process: bool) -> None:
    with running_kernel() as kernel:
        kernel.run(START.replace("IN)", f"{in_process})"))
        interrupt_cells(kernel, 50)


@pytest.mark.usefixtures("start")
def test_a_cell_that_fails_ends_what_it_opened_and_nothing_else(kernel: Kernel) -> None:
    kernel.run('kept = llm.stream("The ring", FOREVER); print(next(kept))')
    output = kernel.finish(kernel.begin('own = llm.stream("A", FOREVER); next(own); 1 / 0'))
    assert output.error == "ZeroDivisionError"
    kernel.run("assert list(own) == [] and own.text")
    kernel.run("assert next(kept)")
    output = kernel.finish(kernel.begin("next(kept); raise KeyboardInterrupt"))
    assert output.error == "KeyboardInterrupt"
    kernel.run("assert list(kept) == []; settle()")


def test_a_start_shows_its_progress(start: dict[str, list[str]]) -> None:
    (texts,) = start.values()
    assert texts[0].startswith("Starting the engine ░")
    assert any(text.startswith("Compiling programs ███") for text in texts)
    assert texts[-1].startswith("checkpoint is ready on the mesh 1x1 (cpu, float32) after ")


@pytest.mark.usefixtures("start")
def test_a_stream_shows_itself_as_it_grows(kernel: Kernel) -> None:
    kernel.run("LONG = SamplingParams(seed=3, max_tokens=200, ignore_eos=True)")
    text = kernel.run("answer = llm.generate('<b>A', LONG); print(answer.text, end='')")
    kernel.run("shown = llm.stream('<b>A', LONG)")
    output = kernel.finish(kernel.begin("shown"))
    (plain,) = output.displays().values()
    assert plain[0] == "" and plain[-1] == text and len(plain) >= 3
    assert all(later.startswith(sooner) for sooner, later in itertools.pairwise(plain))
    (html,) = output.displays("text/html").values()
    assert html[-1].endswith(f">{escape(text)}</div>")
    kernel.run("assert list(shown) == [] and shown.text == answer.text, shown")
    kernel.run("assert shown.finish_reason == 'length' and shown.token_ids == answer.token_ids")


@pytest.mark.usefixtures("start")
def test_many_prompts_show_a_bar_and_few_do_not(kernel: Kernel) -> None:
    many = "answers = llm.generate([[n] for n in range(1, 9)], LONG)"
    kernel.run("LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)")
    kernel.run("import llama_jax.llm.notebook.progress as progress; progress.PATIENCE_SECONDS = 0")
    output = kernel.finish(kernel.begin(many))
    (texts,) = output.displays().values()
    assert texts[-1].startswith(f"Requests {'█' * 24} 8 of 8  160 tokens, ")
    (html,) = output.displays("text/html").values()
    assert '<progress value="8" max="8"' in html[-1]
    for code in (many.replace("LONG)", "LONG, progress=False)"), 'llm.generate("A", SHORT)'):
        assert kernel.finish(kernel.begin(code)).displays() == {}


@pytest.mark.usefixtures("start")
def test_an_llm_and_its_answers_have_html(kernel: Kernel) -> None:
    for code, shown in (("llm", "on the mesh 1x1"), ("before", escape("The ring"))):
        messages = kernel.finish(kernel.begin(code)).messages
        (result,) = [content for kind, content in messages if kind == "execute_result"]
        assert shown in result["data"]["text/html"]
