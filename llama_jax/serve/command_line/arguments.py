"""The command line of the server."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from llama_jax.engine.options import OPTIONS, EngineOptions, Option, OptionError
from llama_jax.serve.command_line.foreign_flags import find_foreign_flag
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
    """Parses the command line; if it is wrong, prints one sentence and exits with code 2.

    Returns:
      path, served_model_name, host, port, api_key, max_body_size (bytes), metrics_prefix,
      shutdown_timeout and write_timeout (seconds), and the fields of `EngineOptions`. path and
      served_model_name may be None.
    """
    parser = Parser(
        prog="python -m llama_jax.serve",
        usage="%(prog)s [PATH] [options]",
        description="Serves a Llama 3 model over HTTP with the OpenAI API.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_engine(parser)
    _add_http(parser)
    if foreign := find_foreign_flag(sys.argv[1:] if argv is None else argv):
        flag, answer = foreign
        parser.error(f"there is no {flag} here: {answer}")
    return parser.parse_args(argv)


def engine_options(arguments: argparse.Namespace, path: Path) -> EngineOptions:
    """The engine's options as given on the command line."""
    given = {option.name: getattr(arguments, option.name) for option in OPTIONS}
    return EngineOptions(path=str(path), **given)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        type=Path,
        help="checkpoint directory, in Hugging Face layout or as written by `python -m convert`, "
        "or a GGUF file (default: the demo checkpoint of the repository)",
    )
    model.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="model name that requests use (default: the name of PATH)",
    )
    engine = parser.add_argument_group("engine")
    for option in OPTIONS:
        flag = f"--{option.name.replace('_', '-')}"
        if option.type is bool and option.default:
            negated, help = flag.replace("--", "--no-"), f"turn off {flag[2:].replace('-', ' ')}"
            engine.add_argument(negated, action="store_false", dest=option.name, help=help)
            continue
        if option.type is bool:
            engine.add_argument(flag, action="store_true", help=option.help)
            continue
        example = ", such as 2GB" if option.unit == "BYTES" else ""
        engine.add_argument(
            flag,
            type=_parser_of(option),
            default=option.default,
            choices=option.choices,
            metavar=None if option.choices else option.unit,
            help=f"{option.help}{example} (default: {option.default_text})",
        )


def _parser_of(option: Option) -> Callable[[str], object]:
    """Converts the text of an argument to a valid value of its option."""

    def parse(text: str) -> object:
        value: object = text
        if option.unit == "BYTES":
            value = size(text)
        elif option.minimum is not None:
            value = int(text)  # argparse reports the ValueError
        if option.choices is None:  # else argparse checks them
            try:
                option.check(value)
            except OptionError as error:
                raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None
        return value

    parse.__name__ = "integer"  # argparse quotes it: "invalid integer value: 'x'"
    return parse


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
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="time for running requests to finish after SIGTERM or Ctrl-C; a second signal ends "
        "them at once (default: %(default)g)",
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


def _key(text: str) -> str:
    if not text.isascii() or not text.isprintable() or not text.strip():
        raise argparse.ArgumentTypeError("a key may contain only printable ASCII characters")
    return text
