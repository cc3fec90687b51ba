"""The logs: their lines, what cannot be forged in them, and a reader that has stopped."""

import asyncio
import io
import itertools
import json
import logging
import os
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import LatencyStats, Stats
from llama_jax.serve.monitoring.access_log import write_access
from llama_jax.serve.monitoring.logs import (
    REQUESTS,
    Background,
    OneLine,
    RequestLogError,
    logging_to,
)
from llama_jax.serve.monitoring.request_log import RequestLog
from llama_jax.serve.monitoring.request_record import RequestRecord
from llama_jax.serve.monitoring.throughput import log_throughput, throughput_line
from llama_jax.terminal.one_line import one_line
from tests.support.fake_client import FakeServer, user

EVIL = "a\n2026-11-26 00:00:00 INFO forged\r\x1b[2Jb\x9b31m\u2028\u202ec\ud800"


@pytest.fixture
def records(caplog):
    """What is logged, from the level "debug" on."""
    caplog.set_level(logging.DEBUG, "llama_jax")
    logging.getLogger(REQUESTS).addHandler(caplog.handler)
    logging.getLogger(REQUESTS).propagate = False
    yield caplog
    logging.getLogger(REQUESTS).removeHandler(caplog.handler)
    logging.getLogger(REQUESTS).propagate = True


def logged(records) -> list[dict]:
    """The objects of the request log."""
    return [
        json.loads(record.getMessage()) for record in records.records if record.name == REQUESTS
    ]


# Lines


def test_text_of_one_line_stays_as_it_is_and_the_rest_is_escaped():
    assert one_line("Grüße, 世界 😀!") == "Grüße, 世界 😀!"
    assert one_line(EVIL).isprintable() and "\\n" in one_line(EVIL)


def test_a_message_and_a_traceback_cannot_look_like_other_records():
    try:
        raise ValueError(EVIL)
    except ValueError:
        record = logging.LogRecord("x", 40, "f", 1, "said %s", (EVIL,), sys.exc_info())
    first, *rest = OneLine().format(record).split("\n")
    assert first.endswith(one_line(f"said {EVIL}"))
    assert rest and all(line.startswith("    ") and line.isprintable() for line in rest)


# The access log


def test_a_line_per_request(records):
    server = FakeServer(api_key="k2")
    server.app.listeners.append(write_access)
    headers = {"X-Request-Id": "mine", "Authorization": "Bearer k2"}
    server.post("/v1/completions?secret=1", {"prompt": "Hi"}, headers=headers)
    server.get('/no"where', headers={"X-Request-Id": "mine"})
    for path in ("/health", "/live"):
        server.get(path)
    first, second, *quiet = records.records
    assert first.levelno == second.levelno == logging.INFO
    assert '"POST /v1/completions HTTP/1.1" 200 ' in first.getMessage()
    assert "request mine, key " in first.getMessage() and "secret" not in first.getMessage()
    assert '"GET /no%22where HTTP/1.1" 401 ' in second.getMessage()
    assert "key" not in second.getMessage()
    assert [record.levelno for record in quiet] == [logging.DEBUG] * 2


def test_a_probe_that_is_refused_is_not_quiet(records):
    server = FakeServer(api_key="k2")
    server.app.listeners.append(write_access)
    server.get("/metrics")
    assert [record.levelno for record in records.records] == [logging.INFO]


def test_a_probe_during_the_start_is_quiet(records):
    """There are no routes yet."""
    write_access(RequestRecord(id="x", method="GET", path="/health", client="c", status=503))
    assert [record.levelno for record in records.records] == [logging.DEBUG]


def test_a_client_cannot_forge_a_line():
    target = io.StringIO()
    handler = logging.StreamHandler(target)
    handler.setFormatter(OneLine())
    logger = logging.getLogger("llama_jax.serve.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # pytest-xdist cannot send the surrogate on
    try:
        write_access(RequestRecord(id="x", method=EVIL, path=EVIL, client=EVIL))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    [line] = target.getvalue().splitlines()
    assert line.isprintable()


# The request log


@pytest.mark.parametrize("stream", [False, True])
def test_an_object_per_request_for_text(records, stream):
    server = FakeServer("Hello!", api_key="k2")
    server.engine.cached_tokens = 3
    server.app.listeners.append(RequestLog())
    headers = {"X-Request-Id": "mine", "Authorization": "Bearer k2"}
    body = {"messages": user("Hi SECRET"), "n": 2, "max_tokens": 3, "stop": ["SECRET"]}
    server.post(
        "/v1/chat/completions", {**body, "temperature": 0.5, "stream": stream}, headers=headers
    )
    server.get("/v1/models", headers=headers)
    [entry] = logged(records)
    [(prompt, _), _] = server.engine.requests
    assert entry["request_id"] == "mine" and len(entry["key"]) == 8
    assert entry["model"] == "tiny" and entry["path"] == "/v1/chat/completions"
    assert (entry["status"], entry["error"], entry["stream"], entry["n"]) == (200, None, stream, 2)
    assert entry["params"] == {"max_tokens": 3, "temperature": 0.5}
    assert (entry["prompt_tokens"], entry["completion_tokens"]) == (len(prompt), 6)
    assert entry["cached_tokens"] == 3
    assert [choice["finish_reason"] for choice in entry["choices"]] == ["length"] * 2
    assert all(
        0 < choice["first_token_seconds"] <= choice["last_token_seconds"] <= entry["seconds"]
        for choice in entry["choices"]
    )
    assert "SECRET" not in json.dumps(entry) and "k2" not in json.dumps(entry)


def test_errors_before_and_within_a_stream_are_logged(records):
    server = FakeServer("Hello!")
    server.app.listeners.append(RequestLog())
    server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 9999})
    server.engine.fail_after = 2
    server.post("/v1/completions", {"prompt": "Hi", "stream": True})
    refused, failed = logged(records)
    assert (refused["status"], refused["error"]) == (400, "context_length_exceeded")
    assert refused["choices"] == [] and refused["prompt_tokens"] == 0
    assert (failed["status"], failed["error"]) == (200, "generation_failed")
    assert failed["choices"][0]["finish_reason"] == "error"


def test_the_parameters_quote_no_text_and_a_choice_without_tokens_has_no_times(records):
    texts = dict(stop=("x",), cache_salt="x", grammar="x", bad_words=((5,),))
    record = RequestRecord(id="x", method="POST", path="/", client="c")
    record.params = SamplingParams(seed=5, **texts)
    record.choices.append(FakeServer().served.metrics.request(1.0, 7))
    RequestLog()(record)
    [entry] = logged(records)
    assert entry["params"] == {"seed": 5}
    assert entry["choices"][0]["first_token_seconds"] is None
    assert entry["choices"][0]["last_token_seconds"] is None


def test_prompts_are_logged_only_if_asked_for_and_on_one_line(records):
    server = FakeServer("Hello!")
    server.app.listeners.append(RequestLog(prompts=True))
    server.post("/v1/completions", {"prompt": "two\nlines \x9b31m"})
    [entry] = logged(records)
    assert json.loads(entry["body"])["prompt"] == "two\nlines \x9b31m"
    [message] = [r.getMessage() for r in records.records if r.name == REQUESTS]
    assert message.isascii() and message.isprintable()


# Where lines go


class Stuck(logging.Handler):
    """A handler whose reader has stopped, until `go` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.go.wait(30)
        self.lines.append(record.getMessage())


def test_a_reader_that_has_stopped_stops_nothing_and_what_is_lost_is_counted():
    target = Stuck()
    handler = Background(target, max_waiting=3)
    for number in range(10):
        handler.handle(logging.LogRecord("x", 20, "f", 1, "%d", (number,), None))
    lost = handler.num_lost
    assert 6 <= lost <= 7  # one may be in the hands of the writer
    target.go.set()
    handler.close()
    (*kept,) = (line for line in target.lines if line.isdigit())
    assert len(kept) == 10 - lost
    [told] = [line for line in target.lines if not line.isdigit()]
    assert told.startswith(str(lost))


def test_a_handler_that_is_closed_while_its_reader_is_stuck_does_not_wait_for_it():
    target = Stuck()
    handler = Background(target)
    handler.handle(logging.LogRecord("x", 20, "f", 1, "line", (), None))
    handler.close()
    assert target.lines == []
    target.go.set()


def test_the_request_log_goes_to_a_file_whatever_the_level_of_others(tmp_path, caplog):
    file = tmp_path / "requests.jsonl"
    file.write_text("before\n")
    logger, handlers = logging.getLogger("llama_jax"), [*logging.getLogger().handlers]
    level = logger.level
    try:
        with logging_to("error", file):
            assert logging.getLogger().handlers == handlers, "pytest has its own"
            logging.getLogger(REQUESTS).info("%s", "one")
            logging.getLogger(REQUESTS).info("%s", "two")
            logging.getLogger("llama_jax.serve").warning("no error")
    finally:
        logger.setLevel(level)
    assert file.read_text() == "before\none\ntwo\n"
    assert logging.getLogger(REQUESTS).handlers == [] and not caplog.records


def test_a_request_log_that_logrotate_moves_goes_on_in_a_new_file(tmp_path):
    file, moved = tmp_path / "requests.jsonl", tmp_path / "requests.jsonl.1"
    with logging_to("info", file):
        logging.getLogger(REQUESTS).info("one")
        while not file.read_text():
            pass
        os.rename(file, moved)
        logging.getLogger(REQUESTS).info("two")
    assert (moved.read_text(), file.read_text()) == ("one\n", "two\n")


def test_a_full_disk_costs_the_request_log_only(caplog):
    with logging_to("info", Path("/dev/full")):
        for _ in range(3):
            logging.getLogger(REQUESTS).info("lost")
    told = [record.levelname for record in caplog.records if record.name != REQUESTS]
    assert told == ["WARNING"]


def test_a_request_log_that_cannot_be_opened_is_an_error_of_the_user(tmp_path):
    with pytest.raises(RequestLogError, match="--request-log"):
        with logging_to("info", tmp_path / "nowhere" / "log"):
            pass


# Throughput


def test_throughput_in_the_words_that_programs_search_for():
    before = Stats(prompt_tokens=100, cached_tokens=50, generation_tokens=10)
    after = Stats(
        num_running=3,
        num_waiting=2,
        pages_total=64,
        pages_free=48,
        prompt_tokens=130,
        cached_tokens=60,
        generation_tokens=35,
    )
    assert throughput_line(before, after, 5.0) == (
        "Engine 000: Avg prompt throughput: 8.0 tokens/s, Avg generation throughput: 5.0 tokens/s, "
        "Running: 3 reqs, Waiting: 2 reqs, GPU KV cache usage: 25.0%, Prefix cache hit rate: 25.0%"
    )
    assert "usage: 0.0%" in throughput_line(Stats(), Stats(), 1.0)


def test_an_idle_engine_is_silent_after_one_line(records):
    """Work in the second interval: a line for it, one that it has ended, and no more."""
    idle, busy = Stats(), Stats(generation_tokens=5)
    reports = iter([idle, idle, busy, busy, busy, busy])

    async def scenario() -> None:
        try:
            await log_throughput(lambda: next(reports), 0.001)
        except RuntimeError:  # the reports have ended
            pass

    asyncio.run(scenario())
    rates = [record.getMessage().split("generation throughput: ")[1] for record in records.records]
    assert len(rates) == 2
    assert not rates[0].startswith("0.0 ") and rates[1].startswith("0.0 ")


def test_an_engine_in_which_requests_only_wait_is_not_idle(records, monkeypatch):
    """A line per interval, each with the rate of its own interval."""
    clock = SimpleNamespace(monotonic=partial(next, itertools.count(0.0, 2.0)))
    monkeypatch.setattr("llama_jax.serve.monitoring.throughput.time", clock)
    tokens = (0, 10, 30, 30, 30)
    reports = iter([Stats(num_waiting=1, generation_tokens=count) for count in tokens])

    async def scenario() -> None:
        try:
            await log_throughput(lambda: next(reports), 0.001)
        except RuntimeError:  # the reports have ended
            pass

    asyncio.run(scenario())
    rates = [record.getMessage().split("generation throughput: ")[1] for record in records.records]
    assert [rate.split()[0] for rate in rates] == ["5.0", "10.0", "0.0", "0.0"]


def test_it_is_said_once_that_a_target_lets_requests_wait(records):
    held = Stats(num_running=4, num_waiting=2, wait_reason="target", latency=LatencyStats(0.05))
    reports = iter([Stats(), held, held, replace(held, wait_reason="slot"), held])

    async def scenario() -> None:
        try:
            await log_throughput(lambda: next(reports), 0.001)
        except RuntimeError:  # the reports have ended
            pass

    asyncio.run(scenario())
    assert [record.levelname for record in records.records].count("WARNING") == 2
