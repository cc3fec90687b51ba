"""The command line of the server."""

import argparse
import math
import os
import sys
from pathlib import Path

from llama_jax.serve.command_line.config_file import parse_config_file
from llama_jax.serve.command_line.engine_arguments import (
    add_engine_arguments,
    check_mesh,
    sets_mesh,
    without_mesh,
)
from llama_jax.serve.command_line.foreign_flags import find_foreign_flag
from llama_jax.serve.command_line.model_arguments import add_model_arguments, check_path
from llama_jax.serve.generation.admission import MAX_QUEUE_TOKENS
from llama_jax.serve.monitoring.metrics import PREFIXES
from llama_jax.serve.transport.door import MAX_BODY_BYTES
from llama_jax.terminal.arguments import Parser, size

API_KEY_VARIABLE = "LLAMA_JAX_API_KEY"
DEMO_CHECKPOINT = Path(__file__).parents[3] / "demo" / "checkpoint"
DEMO_NAME = "llama-jax-demo"

_EXAMPLES = f"""\
examples:
  python -m llama_jax.serve
      the demo checkpoint on one device
  python -m llama_jax.serve --mesh 4x2
      the same as a pipeline of 4 stages x 2 tensor-parallel ranks; without GPUs, on 8 virtual
      CPU devices
  python -m llama_jax.serve /models/Llama-3-70B-Instruct --mesh 4x2 --max-model-len 8192 \\
      --max-num-seqs 64 --kv-cache-memory 20GB --host 0.0.0.0

With --host 0.0.0.0 anyone who can reach this machine can use the server: set {API_KEY_VARIABLE}.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line and --config; if one is wrong, prints a sentence and exits with 2.

    Returns:
      path, served_model_name, host, port, api_key, max_body_size (bytes), metrics_prefix,
      max_queue_tokens, request_timeout, shutdown_timeout, write_timeout and
      sse_keep_alive_interval (seconds), those of `add_model_arguments`, and for `engine_options`
      what is given of the engine's. path, served_model_name and request_timeout may be None.
    """
    parser = Parser(
        prog="python -m llama_jax.serve",
        usage="%(prog)s [PATH] [options]",
        description="Serves a Llama 3 model over HTTP with the OpenAI API.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file of flags and their values, such as `max-num-seqs: 64`; those on the "
        "command line win",
    )
    add_model_arguments(parser)
    add_engine_arguments(parser)
    _add_http(parser)
    argv = sys.argv[1:] if argv is None else argv
    if foreign := find_foreign_flag(argv):
        flag, answer = foreign
        parser.error(f"there is no {flag} here: {answer}")
    arguments = parser.parse_args(argv)
    if arguments.config is not None:
        from_file = vars(parse_config_file(parser, arguments.config))
        if sets_mesh(arguments):
            without_mesh(from_file)
        if arguments.path or arguments.model:
            from_file["path"] = from_file["model"] = None
        parser.set_defaults(**from_file)
        arguments = parser.parse_args(argv)
    check_path(parser, arguments)
    check_mesh(parser, arguments)
    return arguments


def _add_http(parser: argparse.ArgumentParser) -> None:
    http = parser.add_argument_group("HTTP")
    http.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 means all networks, and :: those of IPv4 and IPv6 "
        "(default: %(default)s)",
    )
    http.add_argument(
        "--port",
        type=_port,
        default=8000,
        metavar="PORT",
        help="port to listen on; 0 picks a free one (default: %(default)s)",
    )
    http.add_argument(
        "--api-key",
        type=_key,
        default=os.environ.get(API_KEY_VARIABLE) or None,
        metavar="KEY",
        help="key required by every request except GET /health; other users of this machine can "
        f"see it on the command line, but not in ${API_KEY_VARIABLE} (default: no key)",
    )
    http.add_argument(
        "--metrics-prefix",
        default=PREFIXES[0],
        choices=PREFIXES,
        help="prefix of the metric names; vllm fits existing dashboards (default: %(default)s)",
    )
    http.add_argument(
        "--max-body-size",
        type=size,
        default=MAX_BODY_BYTES,
        metavar="BYTES",
        help="maximum size of a request's body, such as 8MB (default: 2MB)",
    )
    http.add_argument(
        "--max-queue-tokens",
        type=_positive_integer,
        default=MAX_QUEUE_TOKENS,
        metavar="TOKENS",
        help="maximum number of tokens in prompts that wait for their first token; more are "
        "refused, with HTTP status 429 (default: %(default)s)",
    )
    http.add_argument(
        "--request-timeout",
        type=_positive_seconds,
        metavar="SECONDS",
        help="time after which a request that sets no timeout is aborted, with HTTP status 504 "
        "(default: no limit)",
    )
    http.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for running requests to finish after SIGTERM or Ctrl-C; a second signal ends "
        "them at once (default: %(default)g)",
    )
    http.add_argument(
        "--sse-keep-alive-interval",
        type=_seconds,
        default=15.0,
        metavar="SECONDS",
        help="a stream that has sent nothing for this long, also while its request waits, sends a "
        "comment, so that no proxy takes it for dead; 0 sends none (default: %(default)g)",
    )
    http.add_argument(
        "--write-timeout",
        type=_positive_seconds,
        default=60.0,
        metavar="SECONDS",
        help="a client that reads nothing for this long, while part of its response waits, is "
        "disconnected (default: %(default)g)",
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds (0 or more)")
    return seconds


def _positive_seconds(text: str) -> float:
    seconds = _seconds(text)
    if seconds == 0:
        raise argparse.ArgumentTypeError("it must be more than 0 seconds")
    return seconds


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _key(text: str) -> str:
    if not text.isascii() or not text.isprintable() or not text.strip():
        raise argparse.ArgumentTypeError("a key may contain only printable ASCII characters")
    return text
