"""An interrupt at any line of the code that waits for the engine leaves nothing running.

The interrupt is raised by a trace function, at one line after the other, so that every place has
had it. Against an engine whose tokens count up from the prompt (fake_engine.py).
"""

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from llama_jax import LLM, SamplingParams
from tests.support.processes import FAKE, private_temporary_directory, wait_until
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

LONG = SamplingParams(max_tokens=100_000, ignore_eos=True)
SHORT = SamplingParams(max_tokens=3, ignore_eos=True)
FILES = ("llama_jax/client/blocking.py", "llama_jax/llm/text_stream.py", "llama_jax/llm/session.py")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("fake")
    write_checkpoint(path)
    make_tokenizer(path)
    with pytest.MonkeyPatch.context() as patch, private_temporary_directory(patch) as directory:
        patch.setattr("llama_jax.llm.llm.ENGINE_COMMAND", FAKE)
        (directory / "fake").symlink_to(path)
        with LLM(directory / "fake") as llm:
            yield llm


class Interrupter:
    """Raises `KeyboardInterrupt` when this thread has come to a line of `FILES`, counted from 0;
    and once more at an event after that (a call or a return), if `again` says at which.

    Attributes:
      lines: how many it has come to.
      raised: how often it has interrupted.
    """

    def __init__(self, line: int, again: int | None = None) -> None:
        self.lines = 0
        self.raised = 0
        self._line, self._again = line, again

    def __enter__(self) -> "Interrupter":
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)
        sys.setprofile(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        if event == "line":
            self.lines += 1
            if self.lines - 1 == self._line:
                # What a trace function raises ends the tracing; profiling goes on.
                if self._again is not None:
                    sys.setprofile(self._profile)
                self._interrupt()
        return self._trace

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename.endswith(FILES):
            assert self._again is not None
            self._again -= 1
            if self._again < 0:
                self._interrupt()

    def _interrupt(self) -> None:
        self.raised += 1
        raise KeyboardInterrupt


def generate(llm: LLM, params: SamplingParams) -> None:
    llm.generate([[1], [2]], params)


def stream(llm: LLM, params: SamplingParams) -> None:
    for number, _ in enumerate(llm.stream([1], params)):
        if number == 1:
            break


def closed_stream(llm: LLM, params: SamplingParams) -> None:
    with llm.stream([1], params) as pieces:
        next(pieces)


def assert_nothing_runs(llm: LLM) -> None:
    engine = llm._session.engine

    def is_idle() -> bool:
        return not (engine._calls or engine._tasks or engine.client._streams)

    try:
        wait_until(is_idle, seconds=1)
    except AssertionError:
        gc.collect()  # the exception, its frames and a stream may refer to each other
        wait_until(is_idle)


def lines_of(llm: LLM, call: Callable[[LLM, SamplingParams], None]) -> int:
    with Interrupter(-1) as counter:
        call(llm, SHORT)
    assert counter.lines > 10
    return counter.lines


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize("call", [generate, stream, closed_stream])
def test_an_interrupt_at_any_line_leaves_nothing(
    llm: LLM, call: Callable[[LLM, SamplingParams], None]
) -> None:
    for line in range(lines_of(llm, call)):
        with Interrupter(line) as interrupter, contextlib.suppress(KeyboardInterrupt):
            call(llm, LONG)
        assert interrupter.raised == 1
        assert_nothing_runs(llm)
    assert llm.generate([5], SHORT).token_ids == [6, 7, 8]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("call", [generate, stream])
def test_a_second_interrupt_while_the_first_is_handled(
    llm: LLM, call: Callable[[LLM, SamplingParams], None]
) -> None:
    twice = 0
    for line in range(lines_of(llm, call)):
        for again in range(8):
            with Interrupter(line, again) as interrupter, contextlib.suppress(KeyboardInterrupt):
                call(llm, LONG)
            # What a notebook does after a cell that was interrupted; see notebook/cells.py.
            llm._session.engine.cancel_calls(threading.get_ident())
            assert_nothing_runs(llm)
            twice += interrupter.raised == 2
    assert twice > 30
    assert llm.generate([5], SHORT).token_ids == [6, 7, 8]
