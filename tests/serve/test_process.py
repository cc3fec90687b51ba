"""The life of the server's process, from its command line to its exit code, with an engine that
needs no device (fake_engine.py). Waits are for conditions; how long they take is not tested."""

import json
import signal
import socket
import threading
import time

import httpx
import pytest

from tests.support.server_process import FAKE_SERVER, ServerProcess, is_running, kill
from tests.support.tiny_tokenizer import make_tokenizer

STREAM = {"prompt": [5], "stream": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A directory for each thing that the engine can do."""
    parent = tmp_path_factory.mktemp("checkpoints")
    return {
        mode: make_tokenizer(parent / mode)
        for mode in ("fake", "fake:hang", "fake:fatal", "fake:bug")
    }


def start(checkpoints, *arguments: str, mode: str = "fake") -> ServerProcess:
    return ServerProcess(FAKE_SERVER, str(checkpoints[mode]), *arguments)


class Reader:
    """Reads a streamed answer of `max_tokens` in a thread."""

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
        """Of the whole stream, which ends with [DONE]."""
        self._thread.join(60)
        *blocks, done, rest = self.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(block.removeprefix("data: ")) for block in blocks]


def health(url: str) -> int:
    return httpx.get(url + "/health").status_code


def assert_gone(server: ServerProcess, engine: int) -> None:
    """Neither the engine runs nor does anybody listen."""
    assert not is_running(engine)
    host, port = server.url.removeprefix("http://").split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


# Ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_its_engine(checkpoints, number):
    with start(checkpoints).wait_ready() as server:
        engine = server.engine_pid()
        server.signal(number)
        assert server.end() == 0
        assert_gone(server, engine)
        assert server.err == []


def test_what_runs_is_finished_and_nothing_new_is_taken(checkpoints):
    with start(checkpoints).wait_ready() as server:
        reader = Reader(server.url, max_tokens=500)  # a second or more
        server.signal()
        server.wait_for("Shutting down")
        refused = httpx.post(server.url + "/v1/completions", json={"prompt": "Hi"})
        assert refused.status_code == health(server.url) == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        events = reader.events()
        assert len(events) == 500
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.end() == 0


def test_what_outlasts_the_patience_ends_with_an_error(checkpoints):
    with start(checkpoints, "--shutdown-timeout", "0.2").wait_ready() as server:
        reader = Reader(server.url, max_tokens=100_000)
        server.signal()
        assert reader.events()[-1]["error"]["type"] == "server_error"
        assert server.end() == 0


def test_a_second_signal_ends_it_at_once(checkpoints):
    with start(checkpoints, "--shutdown-timeout", "3600").wait_ready() as server:
        reader, engine = Reader(server.url, max_tokens=100_000), server.engine_pid()
        server.signal()
        server.wait_for("Shutting down")
        assert server.process.poll() is None
        server.signal()
        assert reader.events()[-1]["error"]["type"] == "server_error"
        assert server.end() == 0
        assert_gone(server, engine)


def test_a_start_can_be_interrupted_and_says_meanwhile_that_it_is_one(checkpoints):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = ServerProcess(FAKE_SERVER, str(checkpoints["fake:hang"]), port=port)
    with server:
        server.wait_for("Loading")
        assert httpx.get(server.url + "/health").json()["error"]["code"] == "starting"
        engine = server.engine_pid()
        server.signal()
        assert server.end() == 0
        assert_gone(server, engine)


def test_the_engines_death_ends_streams_with_an_error_and_the_server_with_its_reason(checkpoints):
    with start(checkpoints).wait_ready() as server:
        reader = Reader(server.url, max_tokens=100_000)
        kill(server.engine_pid())
        assert reader.events()[-1]["error"]["code"] == "engine_dead"
        assert server.end() == 1
        [line] = server.err
        assert line.startswith("error: The engine process was killed by SIGKILL")


def test_a_killed_server_leaves_no_engine(checkpoints):
    with start(checkpoints).wait_ready() as server:
        engine = server.engine_pid()
        server.signal(signal.SIGKILL)
        server.end()
        while is_running(engine):
            time.sleep(0.02)


# Starts that fail: one sentence, no traceback, no engine left


def failed(*arguments: str, port: int = 0) -> str:
    """What is said about a start that must fail."""
    with ServerProcess(FAKE_SERVER, *arguments, port=port) as server:
        assert server.end() == 1
        [line] = server.err
        assert line.startswith("error: ")
        assert line.endswith((".\n", ").\n"))
        return line


def test_a_missing_path(tmp_path):
    assert f"no directory {tmp_path / 'x'}: give" in failed(str(tmp_path / "x"))


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "no directory" in failed(str(tmp_path / "model.safetensors"))


def test_a_checkpoint_without_a_tokenizer(tmp_path):
    assert "has no tokenizer.json" in failed(str(tmp_path))


def test_a_port_in_use(checkpoints):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = failed(str(checkpoints["fake"]), port=port)
        assert f"port {port} is in use by another program: choose another --port." in said


def test_an_engine_that_cannot_start(checkpoints):
    assert "There is no model at nowhere" in failed(str(checkpoints["fake:fatal"]))


def test_an_engine_that_fails_in_a_way_that_nobody_foresaw(checkpoints):
    said = failed(str(checkpoints["fake:bug"]))
    assert "KeyError" in said
    assert "(log: " in said
