"""`LLM` on the engine of fake_engine.py, whose tokens count up from the prompt."""

import asyncio
import dataclasses
import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from llama_jax import LLM, SamplingParams
from llama_jax.engine.errors import EngineDead, EngineStartError
from llama_jax.engine.interface import Progress, TokenLogprobs
from llama_jax.engine.options import OptionError
from llama_jax.text.tokenizer import TokenizerError
from sharding.errors import UserError
from tests.support.paths import ROOT
from tests.support.processes import (
    FAKE,
    assert_gone,
    children,
    is_running,
    private_temporary_directory,
    wait_until,
)
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

FOREVER = SamplingParams(ignore_eos=True)
LETTERS = SamplingParams(max_tokens=5)
StartLLM = Callable[..., LLM]
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path)
    (path / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 3]}'
    )
    return make_tokenizer(path)


@pytest.fixture
def start(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartLLM]:
    """Starts an `LLM` on a fake engine; the mode is in the name of the checkpoint's directory."""
    with private_temporary_directory(monkeypatch) as directory:
        monkeypatch.setattr("llama_jax.llm.llm.ENGINE_COMMAND", FAKE)
        started: list[LLM] = []

        def start(mode: str = "fake", **options: object) -> LLM:
            link = directory / mode
            link.symlink_to(checkpoint)
            started.append(LLM(link, **options))
            return started[-1]

        yield start
        for llm in started:
            llm.close()
            assert_gone(llm.pid)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    """Shared by the tests that leave it as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_jax.llm.llm.ENGINE_COMMAND", FAKE)
        with LLM(checkpoint) as llm:
            yield llm


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def interrupt_when(condition: Callable[[], bool]) -> threading.Thread:
    """Sends Ctrl-C as soon as the condition holds, or never will: then the test fails, and ends."""

    def watch() -> None:
        try:
            wait_until(condition)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    (thread := threading.Thread(target=watch)).start()
    return thread


# Answers


def test_a_text_is_completed(llm: LLM) -> None:
    (first,) = llm.tokenizer.encode("A", add_bos=False)
    answer = llm.generate("xA", LETTERS)
    assert answer.text == "BCDEF"
    assert answer.token_ids == [first + i for i in range(1, 6)]
    assert answer.prompt_token_ids == llm.tokenizer.encode("xA")
    assert answer.prompt_token_ids[0] == llm.tokenizer.bos_token_id
    assert (answer.finish_reason, answer.error) == ("length", None)


def test_token_ids_are_used_as_they_are(llm: LLM) -> None:
    answer = llm.generate([5, 997])
    assert (answer.prompt_token_ids, answer.token_ids) == ([5, 997], [998, 999, 0])
    assert answer.finish_reason == "stop"


def test_a_list_is_answered_in_its_order_and_with_its_params(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n) for n in (9, 1, 2)]
    answers = llm.generate(["A", [7], [1, 8]], params)
    assert [answer.token_ids for answer in answers][1:] == [[8], [9, 10]]
    assert answers[0].text == "BCDEFGHIJ"
    assert llm.generate([]) == []
    assert [answer.token_ids for answer in llm.generate([[7]], params[1])] == [[8]]


def test_chats(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hello"}]
    answer = llm.chat(conversation, LETTERS)
    assert answer.prompt_token_ids == llm.tokenizer.encode_chat(conversation)
    assert llm.chat([conversation] * 2, LETTERS) == [answer, llm.chat(iter(conversation), LETTERS)]
    assert "".join(llm.stream_chat(conversation, LETTERS)) == answer.text


@pytest.mark.parametrize(
    ("stop", "text", "last"), [(["DE"], "BC", "E"), (["F", "C"], "B", "C"), (["Z"], "BCDEF", "F")]
)
def test_stop_strings(llm: LLM, stop: list[str], text: str, last: str) -> None:
    params = SamplingParams(max_tokens=5, stop=tuple(stop))
    answer = llm.generate("A", params)
    assert answer.text == text
    assert answer.finish_reason == ("length" if stop == ["Z"] else "stop")
    assert [answer.token_ids[-1]] == llm.tokenizer.encode(last, add_bos=False)
    assert "".join(llm.stream("A", params)) == text
    shown = dataclasses.replace(params, include_stop_str_in_output=True)
    assert llm.generate("A", shown).text == text + ("" if stop == ["Z"] else stop[-1])
    wait_until(lambda: llm.stats.num_running == 0)  # nothing is generated after the stop string


def test_a_stream_yields_text_as_it_arrives(llm: LLM) -> None:
    stream = llm.stream("A", FOREVER)
    assert [next(stream) for _ in range(5)] == list("BCDEF")
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]  # while it goes on
    assert next(stream) == "G"


def test_leaving_a_stream_aborts_its_request(llm: LLM) -> None:
    before = llm.stats.generation_tokens
    for piece in llm.stream("A", FOREVER):
        assert piece == "B"
        break
    wait_until(lambda: llm.stats.generation_tokens > before and llm.stats.num_running == 0)


def test_defaults_are_the_checkpoints(llm: LLM) -> None:
    assert llm.defaults == SamplingParams(temperature=0.6, top_p=0.9)
    some = dataclasses.replace(llm.defaults, max_tokens=2)
    assert llm.generate([5], some).token_ids == [6, 7]


def test_more_prompts_than_the_engine_accepts_at_once(start: StartLLM) -> None:
    llm = start(max_num_seqs=2, max_queue=1)
    prompts = [[n] for n in range(1, 101)]
    answers = llm.generate(prompts, SamplingParams(max_tokens=2))
    assert [answer.token_ids for answer in answers] == [[n + 1, n + 2] for n in range(1, 101)]


def test_streams_that_are_not_read_hold_no_place(start: StartLLM) -> None:
    llm = start(max_num_seqs=1, max_queue=1)
    streams = [llm.stream("A", SamplingParams(max_tokens=9)) for _ in range(2)]
    assert [next(stream) for stream in streams] == ["B", "B"]
    answers = llm.generate(["A"] * 5, LETTERS)
    assert [answer.text for answer in answers] == ["BCDEF"] * 5
    assert ["".join(stream) for stream in streams] == ["CDEFGHIJ"] * 2


def test_a_request_that_the_engine_refuses_does_not_harm_the_others(start: StartLLM) -> None:
    llm = start("fake:refuse")
    one = SamplingParams(max_tokens=1)
    ruled = dataclasses.replace(one, grammar='start: "x"')  # which is at fault itself
    refused, stuck, answered = llm.generate([[13, 1], [5], [1, 13]], [one, ruled, one])
    assert (refused.finish_reason, refused.error) == ("error", "13 brings bad luck.")
    assert (stuck.finish_reason, stuck.error) == ("error", "No token is left.")
    assert (answered.finish_reason, answered.token_ids) == ("length", [14])


def test_works_inside_a_running_event_loop(llm: LLM) -> None:
    async def cell() -> str:
        return llm.generate("A", LETTERS).text + "".join(llm.stream("A", LETTERS))

    assert asyncio.run(cell()) == "BCDEF" * 2


def test_threads_share_the_engine(llm: LLM, pool: ThreadPoolExecutor) -> None:
    def answer(n: int) -> list[int]:
        return llm.generate([n], SamplingParams(max_tokens=50)).token_ids

    answers = list(pool.map(answer, range(1, 21)))
    assert answers == [list(range(n + 1, n + 51)) for n in range(1, 21)]


# Ctrl-C


def test_ctrl_c_ends_the_requests_of_its_call_only(llm: LLM, pool: ThreadPoolExecutor) -> None:
    other = pool.submit(llm.generate, [5], SamplingParams(max_tokens=300))
    wait_until(lambda: llm.stats.num_running == 1)
    interrupter = interrupt_when(lambda: llm.stats.num_running >= 3)  # the other may have ended
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2], [3]], FOREVER)
    interrupter.join()
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]
    assert other.result().token_ids == list(range(6, 306))
    wait_until(lambda: llm.stats.num_running == 0)


def test_ctrl_c_ends_a_stream(llm: LLM) -> None:
    stream = llm.stream([1], FOREVER)
    interrupter = interrupt_when(lambda: llm.stats.num_running == 1)
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pass
    interrupter.join()
    assert list(stream) == []
    wait_until(lambda: llm.stats.num_running == 0)
    assert llm.generate([5], LETTERS).token_ids == [6, 7, 8, 9, 10]


def test_ctrl_c_ends_a_start(start: StartLLM) -> None:
    before = children(os.getpid())
    progress: list[Progress] = []
    interrupter = interrupt_when(lambda: len(progress) == 2)
    with pytest.raises(KeyboardInterrupt):
        start("fake:hang", progress=True, on_progress=progress.append)  # instead of showing it
    interrupter.join()
    assert [step.phase for step in progress] == ["starting", "loading"]
    assert children(os.getpid()) <= before


# Ends


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_a_killed_engine_is_an_error_at_once(
    start: StartLLM, pool: ThreadPoolExecutor, call: str
) -> None:
    llm = start()

    def consume() -> object:
        answer = getattr(llm, call)([1], FOREVER)
        return answer if call == "generate" else list(answer)

    waiting = [pool.submit(consume) for _ in range(3)]
    wait_until(lambda: llm.stats.num_running == 3)
    os.kill(llm.pid, signal.SIGKILL)
    for future in waiting:
        assert isinstance(future.exception(timeout=10), EngineDead)
    with pytest.raises(EngineDead, match="SIGKILL"):
        consume()


def test_close_ends_calls_of_other_threads(start: StartLLM, pool: ThreadPoolExecutor) -> None:
    llm = start(max_num_seqs=2, max_queue=1)
    stream = llm.stream([1], FOREVER)
    next(stream)
    waiting = pool.submit(llm.generate, [[1]] * 50, FOREVER)  # of which most have no place yet
    wait_until(lambda: llm.stats.num_running == 3)
    llm.close()
    llm.close()
    for call in (waiting.result, lambda: next(stream), lambda: llm.generate([1])):
        with pytest.raises(EngineDead):
            call()
    assert_gone(llm.pid)


def test_a_with_block_closes(start: StartLLM) -> None:
    with start() as llm:
        assert is_running(llm.pid)
    assert_gone(llm.pid)


def test_garbage_collection_ends_the_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_jax.llm.llm.ENGINE_COMMAND", FAKE)
    before = set(threading.enumerate())
    with private_temporary_directory(monkeypatch) as directory:
        llm = LLM(checkpoint)
        pid = llm.pid
        stream = llm.stream([1], FOREVER)  # left as it is
        next(stream)
        del llm, stream
        gc.collect()
        wait_until(lambda: set(threading.enumerate()) <= before)
        assert_gone(pid)
        assert not list(directory.iterdir())


@pytest.mark.parametrize(
    "end", ["next(stream)", *map(slow, ("", "raise SystemExit", "llm.close()"))]
)
def test_an_interpreter_that_ends_leaves_nothing(
    checkpoint: Path, tmp_path: Path, end: str
) -> None:
    program = f"""
import tempfile
tempfile.tempdir = {str(tmp_path)!r}
import llama_jax.llm.llm
llama_jax.llm.llm.ENGINE_COMMAND = {FAKE!r}
llm = llama_jax.LLM({str(checkpoint)!r})
stream = llm.stream([1], llama_jax.SamplingParams(ignore_eos=True))
print(llm.pid)
{end}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not is_running(int(done.stdout))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [slow(signal.SIGTERM), signal.SIGKILL])
def test_the_engine_dies_with_its_script(
    checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    program = f"""
import tempfile
tempfile.tempdir = {str(tmp_path)!r}
import llama_jax.llm.llm
llama_jax.llm.llm.ENGINE_COMMAND = {FAKE!r}
llm = llama_jax.LLM({str(checkpoint)!r})
print(llm.pid, flush=True)
llm.generate([1], llama_jax.SamplingParams(ignore_eos=True))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as script:
        assert script.stdout is not None
        engine = int(script.stdout.readline())
        assert is_running(engine)
        script.send_signal(number)
    wait_until(lambda: not is_running(engine))


# Bad input


def test_a_bad_checkpoint_is_refused_before_an_engine_is_started(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama_jax.llm.llm.ENGINE_COMMAND", ("/nonexistent/engine",))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (tmp_path / "none", broken):
        with pytest.raises(UserError, match=path.name) as caught:
            LLM(path)
        assert "\n" not in str(caught.value)
    for name in ("config.json", "model.safetensors"):
        (broken / name).symlink_to(checkpoint / name)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        LLM(broken)
    with pytest.raises(TypeError, match="max_seqs"):
        LLM(checkpoint, max_seqs=3)
    with pytest.raises(OptionError, match="max_num_seqs"):
        LLM(checkpoint, max_num_seqs="3")
    with pytest.raises(EngineStartError):
        LLM(checkpoint)  # nothing else is wrong with this one


def test_a_start_that_fails_is_one_sentence(start: StartLLM) -> None:
    before = set(threading.enumerate())
    with pytest.raises(EngineStartError, match=r"^There is no model at nowhere"):
        start("fake:fatal")
    wait_until(lambda: set(threading.enumerate()) <= before)


def test_a_model_without_a_chat_template(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(checkpoint / name)
    make_tokenizer(tmp_path, chat_template=False)
    monkeypatch.setattr("llama_jax.llm.llm.ENGINE_COMMAND", FAKE)
    with LLM(tmp_path) as llm:
        with pytest.raises(TokenizerError):
            llm.chat([{"role": "user", "content": "A"}])
        assert llm.generate("A", LETTERS).text == "BCDEF"


# The package


def test_the_package_is_lazy() -> None:
    program = """
import sys
import llama_jax
assert {"LLM", "Llama", "LlamaConfig", "SamplingParams"} <= set(dir(llama_jax))
assert not [name for name in sys.modules if name.startswith("llama_jax.")]
from llama_jax import LLM, LlamaConfig, SamplingParams
heavy = {"jax", "jaxlib", "flax", "torch"} & set(sys.modules)
assert not heavy, heavy
from llama_jax import Llama
assert "jax" in sys.modules
try:
    llama_jax.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=ROOT)


def test_log_probabilities(llm: LLM) -> None:
    """Of an answer and of a stream; the fake engine gives token t the log-probability -t / 1000."""
    params = SamplingParams(max_tokens=3, logprobs=1)
    answer = llm.generate([65], params)
    wanted = [TokenLogprobs(-t / 1000, [(t, -0.5)]) for t in answer.token_ids]
    assert len(wanted) == 3 and answer.logprobs == wanted
    stream = llm.stream([65], params)
    list(stream)
    assert stream.logprobs == wanted
    assert llm.generate([65], LETTERS).logprobs is None
    other = llm.stream([65], LETTERS)
    list(other)
    assert other.logprobs == []


def test_log_probabilities_of_a_prompt(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, prompt_logprobs=1)
    answer = llm.generate([65, 66, 67], params)
    wanted = [None, *[(-t / 1000, [(7, -0.5)], 2) for t in (66, 67)]]
    found = [each and (round(each.logprob, 6), *each[1:]) for each in answer.prompt_logprobs]
    assert found == wanted
    stream = llm.stream([65, 66, 67], params)
    next(stream)
    assert stream.prompt_logprobs == answer.prompt_logprobs
    list(stream)
    assert stream.prompt_logprobs == answer.prompt_logprobs
    assert llm.generate([65], LETTERS).prompt_logprobs is None
