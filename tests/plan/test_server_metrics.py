"""Reading a server's metrics, against the server's own code."""

import math
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from llama_jax.costs.figure import Band
from llama_jax.engine.interface import EngineInfo, MemoryStats, ProgramStats, StageStats, Stats
from llama_jax.plan.server_metrics import ComparisonError, metrics_url, observe, quantile
from llama_jax.ring.sizes import Bucket
from llama_jax.serve.monitoring.metrics import Metrics
from tests.support.fake_client import make_info


class Served:
    """The metrics of a server that answered some requests."""

    def __init__(self, prefix: str = "llama_jax") -> None:
        self.now = 0.0
        self.stats = Stats(
            num_running=6,
            pages_total=100,
            pages_free=75,
            ticks=30,
            stage_ticks=60,
            stage_ticks_busy=45,
            token_slots=200,
            token_slots_used=50,
            programs=(ProgramStats(4, 0, 20, 0.2), ProgramStats(4, 64, 10, 0.4)),
            stages=(StageStats(1, 0), StageStats(2, 0)),
            memory=(MemoryStats(5, 6),) * 4,
        )
        self.metrics = Metrics(
            "m", lambda: self.stats, lambda: True, prefix, lambda: self.now, make_info()
        )

    def answer(self, ttft: float, gap: float, tokens: int, prompt: int = 100) -> None:
        with self.metrics.request(self.now, prompt) as timer:
            for token in range(tokens):
                self.now += gap if token else ttft
                timer.token()
            timer.finish("length")

    def text(self) -> bytes:
        return self.metrics.text()


@contextmanager
def serving(answer, status: int = 200, key: str | None = None):
    """An HTTP server at whose every path are these bytes; yields its address and its requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            refused = key is not None and self.headers["Authorization"] != f"Bearer {key}"
            self.send_response(401 if refused else status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(answer())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("prefix", ["llama_jax", "vllm"])
def test_everything_since_the_start_is_read(prefix):
    server = Served(prefix)
    server.answer(0.3, 0.02, tokens=11)
    server.answer(0.4, 0.04, tokens=21, prompt=300)
    server.metrics.finished("abort")  # its client went away: it was not answered
    with serving(server.text) as (url, asked):
        seen = observe(url)
    assert asked == ["/metrics"]
    assert (seen.requests, seen.prompt_tokens, seen.output_tokens) == (2, 200, 16)
    assert seen.ttft.count == 2 and seen.ttft.mean == pytest.approx(0.35)
    assert seen.tpot.mean == pytest.approx(0.03)
    assert (seen.ttft.p50.low, seen.ttft.p50.high) == (0.25, 0.5)
    assert (seen.running, seen.pool, seen.slots_used, seen.stages_busy) == (6, 0.25, 0.25, 0.75)
    assert seen.ticks == {
        Bucket(4, 0): (20, pytest.approx(0.01)),
        Bucket(4, 64): (10, pytest.approx(0.04)),
    }
    assert (seen.num_stages, seen.num_devices, seen.model) == (2, 4, "m")
    info: EngineInfo = make_info()
    assert seen.pool_tokens == info.page_size * info.num_pages
    assert 0 < seen.seconds < 86400 * 365


def test_a_window_counts_only_what_happens_in_it():
    server = Served()
    server.answer(9.0, 9.0, tokens=5)

    def sleep(seconds: float) -> None:
        assert seconds == 1.0
        server.answer(0.3, 0.02, tokens=11)
        server.stats = Stats(
            num_running=8,
            ticks=server.stats.ticks + 1,
            programs=(ProgramStats(4, 0, 20, 0.2), ProgramStats(4, 64, server.stats.ticks, 0.6)),
        )

    with serving(server.text) as (url, _):
        seen = observe(url, window=10, sleep=sleep)
    assert (seen.requests, seen.seconds, seen.rate) == (10, 10, 1.0)
    assert seen.ttft.mean == pytest.approx(0.3) and seen.tpot.mean == pytest.approx(0.02)
    assert list(seen.ticks) == [Bucket(4, 64)]
    assert 6 < seen.running < 8


def test_a_server_without_traffic_has_no_latencies():
    with serving(Served().text) as (url, _):
        seen = observe(url)
    assert seen.requests == 0 and seen.ttft is None and math.isnan(seen.prompt_tokens)


def test_a_key_is_sent_to_the_server_alone():
    with serving(Served().text, key="secret") as (url, _):
        assert observe(url, api_key="secret").requests == 0
        for key in ("wrong", None):
            with pytest.raises(ComparisonError):
                observe(url, api_key=key)
    with serving(lambda: b"", status=302) as (url, asked), pytest.raises(ComparisonError):
        observe(url, api_key="secret")
    assert asked == ["/metrics"]  # the redirect was not followed


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"<html>", 200),
        (b"\xff\xfe", 200),
        (b"", 200),
        (b"go_goroutines 3\n", 200),
        (b'vllm:num_requests_running{model_name="m"} 0\n', 200),
        (b"", 404),
        (b"", 503),
    ],
)
def test_what_is_not_our_server_is_refused(body, status):
    with serving(lambda: body, status) as (url, _), pytest.raises(ComparisonError):
        observe(url)


def test_a_server_that_is_not_there_or_does_not_answer_is_refused():
    with pytest.raises(ComparisonError):
        observe("http://127.0.0.1:9")
    with pytest.raises(ComparisonError):
        observe("http://host.invalid:8000", timeout=5)
    with (
        serving(lambda: time.sleep(0.2) or b"") as (url, _),
        pytest.raises(ComparisonError),
    ):
        observe(url, timeout=0.05)


def test_a_restart_in_the_window_is_seen():
    server = Served()

    def sleep(_: float) -> None:
        server.stats = Stats()

    with serving(server.text) as (url, _), pytest.raises(ComparisonError):
        observe(url, window=1, sleep=sleep)


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("http://h:8000", "http://h:8000/metrics"),
        ("h:8000/", "http://h:8000/metrics"),
        ("http://h:8000/v1/", "http://h:8000/metrics"),
        ("https://h/llama/metrics", "https://h/llama/metrics"),
    ],
)
def test_the_address_of_the_metrics_follows_from_that_of_the_server(given, address):
    assert metrics_url(given) == address


@pytest.mark.parametrize("given", ["", "http://", "ftp://h/metrics", "http://h:99999", "file:///x"])
def test_what_is_no_address_is_refused(given):
    with pytest.raises(ComparisonError):
        metrics_url(given)


def test_quantiles_are_those_of_the_bucket_they_are_in():
    bounds, below = [0.1, 0.2, 0.4, math.inf], [0, 50, 90, 100]
    assert quantile(bounds, below, 0.25) == Band(0.1, pytest.approx(0.15), 0.2)
    assert quantile(bounds, below, 0.7) == Band(0.2, pytest.approx(0.3), 0.4)
    assert quantile(bounds, below, 0.99) == Band(0.4, 0.4, 0.4)
    assert quantile(bounds, below, 0.5) == Band(0.1, 0.2, 0.2)  # as many as its bound has
    assert quantile(bounds, [20, 50, 90, 100], 0.1) == Band(0.0, pytest.approx(0.05), 0.1)
