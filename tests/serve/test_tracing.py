"""OpenTelemetry: the spans of requests, in memory and at a collector."""

import gzip
import http.server
import subprocess
import sys
import threading

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from llama_jax.serve.monitoring.request_record import RequestRecord
from llama_jax.serve.monitoring.tracing import Tracing, otlp_tracing
from tests.support.fake_client import FakeServer
from tests.support.paths import ROOT

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def traced():
    """A server whose spans are kept in memory, and the exporter that has them."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter), "1.2.3")
    server = FakeServer("Hello!")
    generate = server.engine.generate

    async def queued(prompt, params, **options):
        async for output in generate(prompt, params, **options):
            yield output._replace(queue_seconds=0.0)

    server.engine.generate = queued
    server.app.listeners.append(tracing)
    yield server, exporter
    tracing.close()


def by_name(exporter) -> dict[str, list]:
    found: dict[str, list] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_a_span_with_the_phases_of_its_choices(traced, stream):
    server, exporter = traced
    body = {"prompt": "Hi", "n": 2, "max_tokens": 3, "temperature": 0, "stream": stream}
    server.post("/v1/completions", body, headers={"X-Request-Id": "mine"})
    found = by_name(exporter)
    [request] = found.pop("POST /v1/completions")
    assert set(found) == {"queue", "prefill", "decode", "detokenize"}
    assert request.kind is SpanKind.SERVER and request.parent is None
    assert request.attributes["gen_ai.request.id"] == "mine"
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["gen_ai.usage.output_tokens"] == 6
    [(prompt, _), _] = server.engine.requests
    assert request.attributes["gen_ai.usage.input_tokens"] == len(prompt)
    assert request.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    assert request.resource.attributes["service.name"] == "llama-jax"
    for spans in found.values():
        assert len(spans) == 2
        for span in spans:
            assert span.parent.span_id == request.context.span_id
            assert request.start_time <= span.start_time <= span.end_time <= request.end_time
    for before, after in (("queue", "prefill"), ("prefill", "decode"), ("decode", "detokenize")):
        assert found[before][0].end_time == found[after][0].start_time


def test_moments_become_nanoseconds():
    record = RequestRecord(id="x", method="POST", path="/", client="c", began=2.0, began_ns=7)
    assert record.wall_ns(5.5) == 3_500_000_007


def test_the_name_of_the_service_can_be_set(traced, monkeypatch):
    server, _ = traced
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    exporter = InMemorySpanExporter()
    server.app.listeners.append(Tracing(SimpleSpanProcessor(exporter), "1.2.3"))
    server.post("/v1/completions", {"prompt": "Hi"})
    [request] = by_name(exporter)["POST /v1/completions"]
    assert request.resource.attributes["service.name"] == "mine"


def test_the_trace_of_the_client_goes_on(traced):
    server, exporter = traced
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    server.post("/v1/completions", {"prompt": "Hi"}, headers=headers)
    spans = exporter.get_finished_spans()
    assert len(spans) == 5
    assert {f"{span.context.trace_id:032x}" for span in spans} == {TRACE}
    [request] = by_name(exporter)["POST /v1/completions"]
    assert f"{request.parent.span_id:016x}" == PARENT
    assert request.context.trace_state["vendor"] == "1"


@pytest.mark.parametrize("given", ["", "junk", f"00-{'0' * 32}-{PARENT}-01", "\xff" * 99])
def test_a_trace_parent_that_is_none_is_ignored(traced, given):
    server, exporter = traced
    server.post(
        "/v1/completions", {"prompt": "Hi"}, headers={"traceparent": given.encode("latin-1")}
    )
    [request] = by_name(exporter)["POST /v1/completions"]
    assert request.parent is None


def test_a_client_that_does_not_sample_gets_no_spans(traced):
    server, exporter = traced
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    server.post("/v1/completions", {"prompt": "Hi"}, headers=headers)
    assert exporter.get_finished_spans() == ()


def test_only_requests_for_text_are_traced_and_errors_are_marked(traced):
    server, exporter = traced
    server.get("/v1/models")
    server.post("/v1/completions", {"prompt": 5})
    assert exporter.get_finished_spans() == ()
    server.engine.fail_after = 1
    server.post("/v1/completions", {"prompt": "Hi"})
    [request] = by_name(exporter)["POST /v1/completions"]
    assert request.status.status_code is StatusCode.ERROR
    assert request.attributes["http.response.status_code"] == 500


class Collector(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted, as (path, content type, body)."""

    received: list[tuple[str, str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.received.append((self.path, self.headers["content-type"], body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def test_spans_arrive_at_a_collector():
    Local = type("Local", (Collector,), {"received": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Local) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        tracing = otlp_tracing(f"http://127.0.0.1:{collector.server_port}", "1.2.3")
        server = FakeServer("Hello!")
        server.app.listeners.append(tracing)
        server.complete()
        tracing.close()
        collector.shutdown()
    [(path, kind, body)] = Local.received
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    request = ExportTraceServiceRequest.FromString(body)
    [resource] = request.resource_spans
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["POST /v1/completions", "decode", "detokenize", "prefill"]
    attributes = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert attributes["service.name"] == "llama-jax" and attributes["service.version"] == "1.2.3"


def test_without_the_flag_nothing_is_imported_and_without_the_packages_it_is_named():
    program = """
import sys
import llama_jax.serve.site
assert not any(name.startswith("opentelemetry") for name in sys.modules)
sys.modules["opentelemetry"] = None
from llama_jax.serve.monitoring.tracing import TracingError, otlp_tracing
try:
    otlp_tracing("http://localhost", "1")
except TracingError as error:
    assert "llama-jax[otel]" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
