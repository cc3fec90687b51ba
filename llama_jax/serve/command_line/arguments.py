"""The command line of the server."""

import argparse
import os
import sys
from pathlib import Path

from llama_jax.engine.options import OPTIONS, EngineOptions
from llama_jax.serve.command_line import values
from llama_jax.serve.command_line.config_file import ConfigFileError, read_config_file
from llama_jax.serve.command_line.foreign_flags import find_foreign_flag
from llama_jax.serve.command_line.http_flags import (
    API_KEY_VARIABLES,
    add_http_flags,
    add_security_flags,
)
from llama_jax.serve.command_line.log_flags import add_log_flags
from llama_jax.serve.command_line.model_flags import add_engine_flags, add_model_flags
from llama_jax.serve.transport.api_keys import is_key
from llama_jax.terminal.arguments import Parser
from sharding.mesh_name import MeshError, parse_mesh

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
      --tpot-slo 50ms --ttft-slo 500ms --kv-cache-memory 20GB --host 0.0.0.0 --api-key-file keys.txt
  python -m llama_jax.serve /models/Llama-3-70B-Instruct --mesh 4x2 --dry-run
  python -m llama_jax.serve --config server.yaml --port 8001

With --host 0.0.0.0 anyone who can reach this machine can use the server: give it a key in
${API_KEY_VARIABLES[0]} or with --api-key-file.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; if it is wrong, prints one sentence and exits with code 2.

    A configuration file (--config) gives the defaults of the flags that it sets.

    Returns:
      An attribute for each flag, `path`, `api_keys` of the command line or the environment, and
      the fields of `EngineOptions`. The attributes of flags without a default may be None.
    """
    parser = _parser()
    argv = [_with_hyphens(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    if foreign := find_foreign_flag(argv):
        flag, answer = foreign
        parser.error(f"there is no {flag} here: {answer}")
    configured = _configured(parser, argv)
    parser.set_defaults(**configured)
    arguments = parser.parse_args(argv)
    _resolve_path(parser, arguments)
    _resolve_mesh(parser, arguments)
    _check_together(parser, arguments)
    return arguments


def engine_options(arguments: argparse.Namespace, path: Path) -> EngineOptions:
    """The engine's options as given on the command line."""
    given = {option.name: getattr(arguments, option.name) for option in OPTIONS}
    return EngineOptions(path=str(path), **given)


def _parser() -> Parser:
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
        type=values.path,
        metavar="FILE",
        help="a YAML file whose keys are names of flags; the command line takes precedence",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the command line and the checkpoint, print what would run and the memory that "
        "it would take, and start nothing; the exit code is 0 if the server could start, else 2",
    )
    parser.add_argument(
        "--dry-run-gpu",
        metavar="NAME",
        help="the GPU to count on with --dry-run, such as h100-sxm (default: that of this machine, "
        "or the CPU)",
    )
    add_model_flags(parser)
    add_engine_flags(parser)
    add_http_flags(parser)
    add_security_flags(parser)
    add_log_flags(parser)
    return parser


def _with_hyphens(argument: str) -> str:
    """Accepts flags with underscores, as other servers do."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return f"{flag.replace('_', '-')}{equals}{value}"


def _configured(parser: Parser, argv: list[str]) -> dict[str, object]:
    """The values that the configuration file sets, by the names of their attributes."""
    finder = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=values.path)
    file = finder.parse_known_args(argv)[0].config
    if file is None:
        return {}
    try:
        given = read_config_file(parser, file)
    except ConfigFileError as error:
        parser.error(str(error).rstrip("."))
    parser.source = f"--config {file}"
    parsed = vars(parser.parse_args(given))
    parser.source = ""
    flags = {argument.partition("=")[0] for argument in given}
    dests = {action.dest for action in parser._actions if flags.intersection(action.option_strings)}
    return {name: parsed[name] for name in dests}


def _resolve_path(parser: Parser, arguments: argparse.Namespace) -> None:
    given = [path for path in (arguments.path, arguments.model_path) if path is not None]
    if len(set(given)) > 1:
        parser.error(f"PATH is {arguments.path}, and --model is {arguments.model_path}: give one")
    arguments.path = given[0] if given else None
    for flag, names in (
        ("--served-model-name", arguments.served_model_name or []),
        ("--api-key", arguments.api_keys),
    ):
        if arguments.path is None and len(names) > 1 and os.path.exists(names[-1]):
            parser.error(f"{flag} takes all values after it: give PATH before it")


def _resolve_mesh(parser: Parser, arguments: argparse.Namespace) -> None:
    stages, ranks = arguments.pipeline_parallel_size, arguments.tensor_parallel_size
    given = None
    if arguments.mesh is not None:
        try:
            given = parse_mesh(arguments.mesh)
        except MeshError as error:
            parser.error(f"argument --mesh: {str(error).rstrip('.')}")
    if stages is None and ranks is None:
        default = next(option.default for option in OPTIONS if option.name == "mesh")
        arguments.mesh = arguments.mesh or default
        return
    mesh = stages or 1, ranks or 1
    if given not in (None, mesh):
        sizes = {"--pipeline-parallel-size": stages, "--tensor-parallel-size": ranks}
        named = " and ".join(f"{flag} {size}" for flag, size in sizes.items() if size)
        parser.error(f"--mesh {arguments.mesh} and {named} contradict each other: give one")
    arguments.mesh = f"{mesh[0]}x{mesh[1]}"


def _check_together(parser: Parser, arguments: argparse.Namespace) -> None:
    """Checks flags against each other, and reads the keys of the environment."""
    if arguments.allow_credentials and (
        not arguments.allowed_origins or "*" in arguments.allowed_origins
    ):
        parser.error("--allow-credentials needs --allowed-origins that name each origin")
    for flag in ("ssl_keyfile", "ssl_keyfile_password", "ssl_ca_certs"):
        if getattr(arguments, flag) is not None and arguments.ssl_certfile is None:
            parser.error(f"--{flag.replace('_', '-')} needs --ssl-certfile")
    if arguments.dry_run_gpu is not None and not arguments.dry_run:
        parser.error("--dry-run-gpu needs --dry-run")
    if arguments.log_prompts and arguments.request_log is None:
        parser.error("--log-prompts needs --request-log")
    if arguments.uds is not None and arguments.port != parser.get_default("port"):
        parser.error("--uds and --port exclude each other")
    if not arguments.api_keys and arguments.api_key_file is None:
        arguments.api_keys = _keys_of_environment(parser)
    if arguments.metrics_open and not arguments.api_keys and arguments.api_key_file is None:
        parser.error("--metrics-open needs a key: without one, everything is open")


def _keys_of_environment(parser: Parser) -> list[str]:
    for variable in API_KEY_VARIABLES:
        if key := os.environ.get(variable):
            if not is_key(key):
                parser.error(f"${variable} may contain only printable ASCII characters")
            return [key]
    return []
