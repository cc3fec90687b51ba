"""The flags of logs, metrics and traces."""

import argparse

from llama_jax.serve.command_line import values
from llama_jax.serve.monitoring.logs import LEVELS
from llama_jax.serve.monitoring.metrics import PREFIXES


def add_log_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of what an operator sees."""
    logs = parser.add_argument_group("logs, metrics and traces")
    logs.add_argument(
        "--log-level",
        "--uvicorn-log-level",
        type=str.lower,
        choices=LEVELS,
        default="info",
        help="the least important level that is written to stderr (default: %(default)s)",
    )
    logs.add_argument(
        "--disable-access-log",
        "--disable-uvicorn-access-log",
        action="store_true",
        help="write no line per HTTP request",
    )
    logs.add_argument(
        "--log-stats-interval",
        type=values.seconds,
        default=10.0,
        metavar="SECONDS",
        help="time between two lines about throughput, written while there is work; 0 for none "
        "(default: %(default)g)",
    )
    logs.add_argument(
        "--disable-log-stats",
        action="store_const",
        const=0.0,
        dest="log_stats_interval",
        help="the same as --log-stats-interval 0",
    )
    logs.add_argument(
        "--request-log",
        type=values.path,
        metavar="FILE",
        help="write a JSON object per request for text: ids, model, parameters, tokens, times and "
        "finish reasons, without prompts; - is stderr (default: none)",
    )
    logs.add_argument(
        "--log-prompts",
        action="store_true",
        help="with the bodies of requests, and so their prompts, in the request log",
    )
    logs.add_argument(
        "--metrics-prefix",
        default=PREFIXES[0],
        choices=PREFIXES,
        help="prefix of the metric names; vllm fits existing dashboards (default: %(default)s)",
    )
    logs.add_argument(
        "--otlp-traces-endpoint",
        type=values.url,
        metavar="URL",
        help="send OpenTelemetry traces to this collector, by OTLP over HTTP; needs the extra "
        "llama-jax[otel] (default: none)",
    )
