"""OpenTelemetry: a trace of each request that generates text. Needs the extra `otel`.

The spans are made when a request has ended, from the times in its record: until then tracing costs
nothing, and a thread of the SDK sends them.
"""

import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llama_jax.serve.monitoring.request_record import RequestRecord
from llama_jax.serve.monitoring.request_timer import RequestTimer
from sharding.errors import UserError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor

SERVICE_NAME = "llama-jax"
CLOSING_SECONDS = 3.0


class TracingError(UserError):
    """The packages of the extra `otel` are not installed."""


class Tracing:
    """Makes the spans of requests that have ended.

    The span of a request continues the trace of its header `traceparent`. Whether it is sampled is
    decided by that trace, or by the variables OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG. For
    each choice it has the spans `queue`, `prefill`, `decode` and `detokenize`: the last from the
    arrival of the last token to the end of its text.
    """

    def __init__(self, processor: "SpanProcessor", version: str) -> None:
        """Passes the spans to `processor`."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create()  # with OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
        resource = resource.merge(Resource({"service.version": version}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("llama_jax.serve", version)
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: RequestRecord) -> None:
        """Makes the spans of a request, if it asked to generate."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        if record.params is None:
            return
        span = self._tracer.start_span(
            f"{record.method} {record.handler}",
            context=self._propagator.extract(record.trace),
            kind=SpanKind.SERVER,
            attributes=_request_attributes(record),
            start_time=record.began_ns,
        )
        if span.is_recording():
            inside = set_span_in_context(span)
            for timer in record.choices:
                self._phases(record, timer, inside)
            if record.status >= 500 or record.error:
                span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(record.wall_ns(record.began + record.seconds))

    def close(self) -> None:
        """Sends what has not been sent, if that does not take long."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS)

    def _phases(self, record: RequestRecord, timer: RequestTimer, inside: "Context") -> None:
        began = timer.submitted + (timer.queue_seconds or 0.0)
        phases: list[tuple[str, float, float | None]] = []
        if timer.queue_seconds is not None:
            phases.append(("queue", timer.submitted, began))
        if timer.tokens:
            phases += [
                ("prefill", began, timer.first),
                ("decode", timer.first, timer.last),
                ("detokenize", timer.last, timer.ended),
            ]
        for name, start, end in phases:
            span = self._tracer.start_span(
                name, context=inside, start_time=record.wall_ns(start), attributes=_phase(timer)
            )
            span.end(record.wall_ns(max(start, end or start)))


def otlp_tracing(endpoint: str, version: str) -> Tracing:
    """Creates the tracing that sends spans to a collector, with OTLP over HTTP.

    Args:
      endpoint: the URL of the collector; without a path, that of traces is added.
      version: that of this package.

    Raises:
      TracingError: the extra `otel` is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError(
            "--otlp-traces-endpoint needs the packages of OpenTelemetry: install llama-jax[otel]."
        ) from error
    if urlsplit(endpoint).path in ("", "/"):
        endpoint = f"{endpoint.rstrip('/')}/v1/traces"
    return Tracing(BatchSpanProcessor(OTLPSpanExporter(endpoint)), version)


def _request_attributes(record: RequestRecord) -> dict[str, Any]:
    """The attributes of a request's span, by OpenTelemetry's conventions where there are any."""
    assert record.params is not None
    choices = record.choices
    prompts = choices[:: record.choices_per_prompt]
    attributes = {
        "http.request.method": record.method,
        "http.route": record.handler,
        "http.response.status_code": record.status,
        "gen_ai.request.id": record.id,
        "gen_ai.request.model": record.model,
        "gen_ai.request.max_tokens": record.params.max_tokens,
        "gen_ai.request.temperature": record.params.temperature,
        "gen_ai.request.top_p": record.params.top_p,
        "gen_ai.request.choice.count": record.choices_per_prompt,
        "gen_ai.response.finish_reasons": [timer.reason or "error" for timer in choices],
        "gen_ai.usage.input_tokens": sum(timer.prompt_tokens for timer in prompts),
        "gen_ai.usage.output_tokens": sum(timer.tokens for timer in choices),
        "gen_ai.usage.cache_read.input_tokens": sum(timer.cached_tokens for timer in prompts),
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _phase(timer: RequestTimer) -> dict[str, Any]:
    return {"gen_ai.usage.output_tokens": timer.tokens}
