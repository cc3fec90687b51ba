"""The server's process from its command line to its exit code, with the engine of fake_engine.py.

Tests wait for conditions and do not measure time.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from llama_jax.serve.__main__ import main as entry_point
from llama_jax.serve.launch import THREADS, main
from tests.support.paths import ROOT
from tests.support.processes import FAKE, children, wait_until
from tests.support.server_process import FAKE_SERVER, ServerProcess, is_running, kill
from tests.support.tiny_tokenizer import make_tokenizer
from tests.support.tokenizer_kinds import write_tokenizer

STREAM = {"prompt": [5], "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A directory per mode of the fake engine."""
    parent = tmp_path_factory.mktemp("checkpoints")
    paths = {
        mode: make_tokenizer(parent / mode)
        for mode in ("fake", "fake:hang", "fake:fatal", "fake:bug")
    }
    for path in paths.values():
        (path / "model.safetensors").touch()
    return paths


def start(checkpoints, *arguments: str, mode: str = "fake") -> ServerProcess:
    return ServerProcess(FAKE_SERVER, str(checkpoints[mode]), *arguments)


class Reader:
    """Reads a streamed answer of up to `max_tokens` in a thread."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.began = threading.Event()
        self.text = ""
        self._thread = threading.Thread(target=self._read, args=(url, max_tokens))
        self._thread.start()
        assert self.began.wait(30)

    def _read(self, url: str, max_tokens: int) -> None:
        body = {**STREAM, "max_tokens": max_tokens}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
            for text in response.iter_text():
                self.text += text
                self.began.set()

    def events(self) -> list[dict]:
        """The events of the whole stream, which must end with [DONE]."""
        self._thread.join(60)
        *blocks, done, rest = self.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(block.removeprefix("data: ")) for block in blocks]


def up(url: str) -> float:
    """The metric engine_up."""
    text = httpx.get(url + "/metrics").text
    [line] = [line for line in text.splitlines() if line.startswith("llama_jax:engine_up{")]
    return float(line.split()[-1])


def health(url: str) -> int:
    return httpx.get(url + "/health").status_code


def assert_gone(server: ServerProcess, engine: int) -> None:
    """The engine has ended and the port is closed."""
    assert not is_running(engine)
    host, port = server.url.removeprefix("http://").split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


# Ends


# The tests below send SIGTERM and SIGHUP, too.
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_server_and_engine(checkpoints, number):
    with start(checkpoints).wait_ready() as server:
        engine = server.engine_pid()
        server.signal(number)
        assert server.end() == 0
        assert_gone(server, engine)
        assert server.err == []


def test_a_shutdown_finishes_running_requests_and_accepts_no_others(checkpoints):
    with start(checkpoints).wait_ready() as server:
        reader = Reader(server.url, max_tokens=300)
        os.kill(server.engine_pid(), signal.SIGSTOP)  # the request runs as long as the test wants
        server.signal()
        server.wait_for("Shutting down")
        refused = httpx.post(server.url + "/v1/completions", json={"prompt": "Hi"})
        assert refused.status_code == health(server.url) == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        os.kill(server.engine_pid(), signal.SIGCONT)
        events = reader.events()
        assert len(events) == 300
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.end() == 0


def test_requests_that_outlast_the_shutdown_timeout_end_with_an_error(checkpoints):
    with start(checkpoints, "--shutdown-timeout", "0.2").wait_ready() as server:
        reader = Reader(server.url, max_tokens=100_000)
        server.signal()
        assert reader.events()[-1]["error"]["code"] == "shutting_down"
        assert server.end() == 0


def test_a_server_ends_though_nobody_reads_its_log(checkpoints):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    command = [*FAKE_SERVER, str(checkpoints["fake"]), "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=writing, text=True, cwd=ROOT)
    try:
        ready = next(line for line in process.stdout if "Ready at" in line)
        url = re.search(r"http://[\d.:]+\d", ready)[0]
        assert httpx.get(url + "/nowhere").status_code == 404  # a line of the log
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()  # the kernel then kills its engine
        process.communicate()
        os.close(reading)
        os.close(writing)


@pytest.mark.slow
def test_a_burst_is_tokenized_in_few_threads(checkpoints):
    """Each of them would take the interpreter's lock from the streams of all others."""
    body = {"prompt": "word " * 20_000, "max_tokens": 1}
    with start(checkpoints).wait_ready() as server, ThreadPoolExecutor(30) as clients:

        def complete(_: int) -> int:
            return httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code

        def threads() -> int:
            return len(os.listdir(f"/proc/{server.process.pid}/task"))

        assert complete(0) == 200  # with the threads of the tokenizers library
        before = threads()
        assert {*clients.map(complete, range(30))} == {200}
        assert threads() < before + THREADS


def test_a_second_signal_ends_it_at_once(checkpoints):
    with start(checkpoints, "--shutdown-timeout", "3600").wait_ready() as server:
        reader, engine = Reader(server.url, max_tokens=100_000), server.engine_pid()
        server.signal()
        server.wait_for("Shutting down")
        server.signal(signal.SIGHUP)  # never counts as the second
        assert server.process.poll() is None
        assert health(server.url) == 503
        server.signal()
        assert reader.events()[-1]["error"]["code"] == "shutting_down"
        assert server.end() == 0
        assert_gone(server, engine)


@pytest.mark.parametrize(
    ("number", "code"),
    [pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow), (signal.SIGINT, 130)],
)
def test_a_start_is_reported_and_can_be_interrupted(checkpoints, number, code):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = ServerProcess(FAKE_SERVER, str(checkpoints["fake:hang"]), port=port)
    with server:
        server.wait_for("Loading")
        assert httpx.get(server.url + "/health").json()["error"]["code"] == "starting"
        engine = server.engine_pid()
        server.signal(number)
        assert server.end() == code
        assert_gone(server, engine)
        assert len(server.err) == (number == signal.SIGINT)


def test_ctrl_c_before_anything_is_started(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("llama_jax.serve.launch.main", interrupted)
    assert entry_point() == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_an_engine_that_drains_makes_the_server_refuse_requests_and_end(checkpoints):
    with start(checkpoints).wait_ready() as server:
        reader = Reader(server.url, max_tokens=1500)
        os.kill(server.engine_pid(), signal.SIGTERM)
        wait_until(lambda: health(server.url) == 503)
        refused = httpx.post(server.url + "/v1/completions", json={"prompt": "Hi"})
        assert refused.json()["error"]["code"] == "shutting_down"
        assert len(reader.events()) == 1500
        assert server.end() == 1


@pytest.mark.slow
def test_an_engine_that_stops_answering_gets_no_requests_until_it_answers_again(checkpoints):
    with start(checkpoints).wait_ready() as server:
        engine = server.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        wait_until(lambda: health(server.url) == 503)
        refused = httpx.post(server.url + "/v1/completions", json={"prompt": "Hi"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_silent"
        assert up(server.url) == 0
        os.kill(engine, signal.SIGCONT)
        wait_until(lambda: health(server.url) == 200)
        assert up(server.url) == 1


@pytest.mark.slow
def test_an_engine_that_hangs_for_good_ends_streams_and_the_server(checkpoints):
    flags = ("--watchdog-timeout", "1", "--sse-keep-alive-interval", "0")
    with start(checkpoints, *flags).wait_ready() as server:
        engine = server.engine_pid()
        reader = Reader(server.url, max_tokens=100_000)
        os.kill(engine, signal.SIGSTOP)
        assert reader.events()[-1]["error"]["code"] == "engine_dead"
        assert server.end() == 1
        assert "The engine sent no report for" in server.err[-1]
        assert_gone(server, engine)


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&- 2>&-", "> /dev/full 2> /dev/full", "| true"])
def test_a_server_whose_output_cannot_be_written_serves(checkpoints, redirection):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*FAKE_SERVER, str(checkpoints["fake"]), f"--port={port}"]
    shell = f"{shlex.join(command)} {redirection}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen(["bash", "-c", shell], cwd=ROOT, env=environment)
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        with contextlib.suppress(httpx.ConnectError):
            return health(url) == 200
        return False

    wait_until(ready, 60)
    [server] = children(process.pid)
    os.kill(server, signal.SIGTERM)
    assert process.wait(60) == 0


def test_the_engines_death_ends_streams_and_the_server(checkpoints):
    with start(checkpoints).wait_ready() as server:
        reader = Reader(server.url, max_tokens=100_000)
        kill(server.engine_pid())
        assert reader.events()[-1]["error"]["code"] == "engine_dead"
        assert server.end() == 1
        *access, line = server.err
        assert all('"POST /v1/completions HTTP/1.1" 200' in entry for entry in access)
        assert line.startswith("error: ") and "SIGKILL" in line


def test_a_killed_server_leaves_no_engine(checkpoints):
    with start(checkpoints).wait_ready() as server:
        engine = server.engine_pid()
        server.signal(signal.SIGKILL)
        server.end()
        wait_until(lambda: not is_running(engine))


# Starts that fail: one sentence and no traceback


@pytest.fixture
def failed(capsys):
    """Starts a server that must fail, in this process; returns its error message."""

    def start(*arguments: str, port: int = 0) -> str:
        assert main([*arguments, f"--port={port}"], FAKE) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert line.endswith((".", ".)"))
        return line

    return start


def test_a_missing_path(failed, tmp_path):
    assert str(tmp_path / "x") in failed(str(tmp_path / "x"))


def test_a_path_that_is_a_file(failed, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "model.safetensors" in failed(str(tmp_path / "model.safetensors"))


def test_a_checkpoint_without_a_tokenizer(failed, checkpoints, tmp_path):
    shutil.copy(checkpoints["fake"] / "config.json", tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert "tokenizer.json" in failed(str(tmp_path))


def test_a_port_in_use(failed, checkpoints):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert str(port) in failed(str(checkpoints["fake"]), port=port)


def test_a_port_in_use_is_found_before_anything_is_loaded(failed, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert str(port) in failed(str(tmp_path), port=port)  # without a tokenizer


def test_an_engine_that_cannot_start(failed, checkpoints):
    assert "There is no model at nowhere" in failed(str(checkpoints["fake:fatal"]))


def test_a_defect_in_the_engines_start_names_its_log(failed, checkpoints):
    message = failed(str(checkpoints["fake:bug"]))
    assert "KeyError" in message
    assert "(log: " in message


def test_a_chat_template_that_cannot_be_used_is_named_at_the_start(tmp_path, caplog):
    write_tokenizer(make_tokenizer(tmp_path), template="{{ messages | nosuchfilter }}")
    (tmp_path / "model.safetensors").touch()
    assert main([str(tmp_path), "--port=0"], engine_command=["false"]) == 1
    (record,) = [record for record in caplog.records if record.name == "llama_jax.serve"]
    assert record.levelname == "WARNING" and "nosuchfilter" in record.getMessage()


def test_a_defect_of_the_server_is_raised_with_its_traceback(tmp_path, monkeypatch):
    """A ValueError is an error of the user only if it is a UserError."""

    def defect(path):
        raise ValueError("cannot reshape array")

    monkeypatch.setattr("llama_jax.serve.setup.read_checkpoint_config", defect)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="reshape"):
        main([str(tmp_path), "--port=0"])
