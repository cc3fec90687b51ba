"""Counts and times of HTTP requests, under the names of FastAPI's instrumentator.

Their labels take few values, whatever clients send: an unknown path is "none", and an unknown
method "other".
"""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from llama_jax.serve.monitoring.request_record import RequestRecord

METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})
DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class HttpMetrics:
    """`http_requests_total` and `http_request_duration_seconds`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Registers both."""
        self._requests = Counter(
            "http_requests",
            "Requests by route, method and class of status.",
            ["handler", "method", "status"],
            registry=registry,
        )
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Time from the headers of a request to the end of its answer.",
            ["handler", "method"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )

    def observe(self, record: RequestRecord) -> None:
        """Measures a request that has ended."""
        method = record.method if record.method in METHODS else "other"
        status = f"{record.status // 100}xx"
        self._requests.labels(record.handler, method, status).inc()
        self._seconds.labels(record.handler, method).observe(record.seconds)


def handler_finder(routes: Sequence[BaseRoute]) -> Callable[[Scope], str]:
    """Returns a function that names the route of a request, or "none"."""

    def find(scope: Scope) -> str:
        for route in routes:
            if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE:
                return route.path
        return "none"

    return find
