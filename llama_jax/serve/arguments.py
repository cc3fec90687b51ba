"""The command line of the server. Imports no JAX."""

import argparse
import math
import os
from pathlib import Path

from llama_jax.engine.options import EngineOptions
from llama_jax.serve.metrics import PREFIXES
from llama_jax.terminal.arguments import Parser, size

API_KEY_VARIABLE = "LLAMA_JAX_API_KEY"
DEMO_CHECKPOINT = Path(__file__).parents[2] / "demo" / "checkpoint"
DEMO_NAME = "llama-jax-demo"

_EXAMPLES = f"""\
examples:
  python -m llama_jax.serve
      the demo checkpoint on one device
  python -m llama_jax.serve --mesh 4x2
      the same through a pipeline of 4 stages x 2 tensor-parallel ranks; without GPUs,
      virtual CPU devices stand in for the 8
  python -m llama_jax.serve /models/Llama-3-70B-Instruct --mesh 4x2 --max-model-len 8192 \\
      --max-num-seqs 64 --kv-cache-memory 20GB --host 0.0.0.0

With --host 0.0.0.0 everyone who reaches this machine can use the server: set {API_KEY_VARIABLE}.
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends the process with exit code 2 and one sentence if it is wrong.

    Returns:
      path, served_model_name, host, port, api_key, metrics_prefix, shutdown_timeout (seconds), and
      the fields of `EngineOptions` that can be set; path and served_model_name may be None.
    """
    parser = Parser(
        prog="python -m llama_jax.serve",
        usage="%(prog)s [PATH] [options]",
        description="Serves a Llama 3 over HTTP, with the protocol of OpenAI.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_engine(parser)
    _add_http(parser)
    return parser.parse_args(argv)


def engine_options(arguments: argparse.Namespace, path: Path) -> EngineOptions:
    """What the engine is to be started with."""
    given = {name: getattr(arguments, name) for name in _ENGINE_ARGUMENTS}
    return EngineOptions(path=str(path), **given)


_ENGINE_ARGUMENTS = (
    "mesh",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_queue",
    "page_size",
    "kv_cache_memory",
    "max_chunk",
)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    default = EngineOptions(path="")
    model = parser.add_argument_group("model")
    model.add_argument(
        "path",
        nargs="?",
        metavar="PATH",
        type=Path,
        help="checkpoint directory, in Hugging Face layout or as `python -m convert` writes it "
        "(default: the demo checkpoint that comes with the repository)",
    )
    model.add_argument(
        "--mesh",
        default=default.mesh,
        metavar="SxT",
        help="pipeline stages x tensor-parallel ranks, on S*T devices (default: %(default)s)",
    )
    model.add_argument(
        "--dtype",
        default=default.dtype,
        choices=("auto", "float32", "bfloat16"),
        help="of weights, activations and KV cache; auto is float32 on CPU and the checkpoint's "
        "own on a GPU (default: %(default)s)",
    )
    model.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="what requests call the model (default: the name of PATH)",
    )
    memory = parser.add_argument_group("memory and batching")
    memory.add_argument(
        "--max-model-len",
        type=_count,
        metavar="TOKENS",
        help="most tokens of prompt and answer together (default: the model's own limit, or what "
        "the KV cache holds)",
    )
    memory.add_argument(
        "--max-num-seqs",
        type=_count,
        default=default.max_num_seqs,
        metavar="N",
        help="most answers that are generated at once (default: %(default)s)",
    )
    memory.add_argument(
        "--max-queue",
        type=_count,
        default=default.max_queue,
        metavar="N",
        help="most requests that wait for a place; one more is told to come back, with status 429 "
        "(default: %(default)s)",
    )
    memory.add_argument(
        "--kv-cache-memory",
        type=size,
        metavar="BYTES",
        help="of KV cache on each device, such as 2GiB or 500MB (default: what a GPU has left; on "
        "CPU 1GiB for all devices together)",
    )
    memory.add_argument(
        "--page-size",
        type=_count,
        default=default.page_size,
        metavar="TOKENS",
        help="in a page of the KV cache (default: %(default)s)",
    )
    memory.add_argument(
        "--max-chunk",
        type=_count,
        default=default.max_chunk,
        metavar="TOKENS",
        help="most prompt tokens that enter the pipeline in one tick: more makes first tokens "
        "faster and the streams of others slower (default: %(default)s)",
    )


def _add_http(parser: argparse.ArgumentParser) -> None:
    http = parser.add_argument_group("HTTP")
    http.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="to listen on; 0.0.0.0 is every network of this machine (default: %(default)s)",
    )
    http.add_argument(
        "--port",
        type=_port,
        default=8000,
        metavar="PORT",
        help="to listen on; 0 takes any that is free (default: %(default)s)",
    )
    http.add_argument(
        "--api-key",
        type=_key,
        default=os.environ.get(API_KEY_VARIABLE) or None,
        metavar="KEY",
        help="that every request but GET /health must bring; other users of this machine can see "
        f"it here, and not in the variable {API_KEY_VARIABLE} (default: none is needed)",
    )
    http.add_argument(
        "--metrics-prefix",
        default=PREFIXES[0],
        choices=PREFIXES,
        help="of the names in /metrics; vllm fits existing dashboards (default: %(default)s)",
    )
    http.add_argument(
        "--shutdown-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="that running requests have to finish after SIGTERM or Ctrl-C; a second signal ends "
        "them at once (default: %(default)g)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


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
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 on")
    return seconds


def _key(text: str) -> str:
    if not text.isascii() or not text.isprintable() or not text.strip():
        raise argparse.ArgumentTypeError("a key is made of printable ASCII characters")
    return text
