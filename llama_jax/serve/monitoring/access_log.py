"""The access log: one line per HTTP request."""

import logging

from llama_jax.serve.monitoring.request_record import RequestRecord

# What probes and scrapers ask every few seconds; written at the level "debug".
QUIET_PATHS = frozenset({"/live", "/health", "/metrics"})

log = logging.getLogger("llama_jax.serve.access")


def write_access(record: RequestRecord) -> None:
    """Writes the line of a request that has ended: client, request, status, duration, ids."""
    # During the start, a record has no handler, and probes get 503.
    quiet = bool(QUIET_PATHS & {record.handler, record.path}) and record.status in (200, 503)
    level = logging.DEBUG if quiet else logging.INFO
    log.log(
        level,
        '%s "%s %s HTTP/%s" %d %.3f s, request %s%s',
        record.client,
        record.method,
        record.path.replace('"', "%22"),
        record.http_version,
        record.status,
        record.seconds,
        record.id,
        f", key {record.key_id}" if record.key_id else "",
    )
