"""The command line of `python -m convert`. Imports no JAX."""

import argparse
from pathlib import Path

from convert.conversion import Options
from llama_jax.config.llama_config import DTYPES
from llama_jax.quantization import FORMATS
from llama_jax.terminal.arguments import Parser, size

_EXAMPLES = """\
examples:
  python -m convert hf /models/Meta-Llama-3-70B-Instruct /models/llama-3-70b
  python -m convert hf meta-llama/Llama-3.1-8B-Instruct /models/llama-3.1-8b --quantize int8 --check
  python -m convert inspect /models/llama-3-70b --mesh 4x2
  python -m convert verify /models/Meta-Llama-3-70B-Instruct /models/llama-3-70b

What a conversion wrote is served like any checkpoint: python -m llama_jax.serve DST. One that was
interrupted, by whatever, goes on when the same command runs again with --resume.

exit codes:
  0    done
  1    an error: one sentence on standard error
  2    wrong usage of the command line
  3    verify found differences
  130  interrupted by Ctrl-C: run the same command again with --resume

With --json standard output is one JSON object, {"error": "..."} where the exit code is 1 or 130:
  hf, meta, quantize, export
    source, destination, dtype, quantization (null, int8, fp8 or int4), source_bytes and bytes (of
    weights), resumed_bytes (written by an earlier run), seconds, verify_seconds (null: not asked
    for), quantization_error (relative, by kind of matrix), divergence (null, or tokens, mean and
    largest in nats, agreement from 0 to 1)
  verify
    source, destination, differences (sentences; empty where there are none), seconds
  inspect
    path, layout (orbax, huggingface, meta), formats (with their versions, or null), num_files,
    config (as in config.json), quantization (null, or format and group_size), quantized_by,
    quantization_error, num_parameters, bytes, bytes_by_dtype, devices (of --mesh: stage, rank,
    layers, padding_layers, heads, kv_heads, bytes, bytes_by_group)
"""
_SOURCE = "directory of a checkpoint, or the name of a model on the Hugging Face Hub"
_CHECK = """\
measure how far the output distribution of the quantised model is from that of SRC, on a sample of
text (default: one that comes with this program): the Kullback-Leibler divergence, in nats, and how
often both find the same token the most likely; computed on the CPU, in float32, a layer at a time,
which takes half as much memory again as a layer does (5 GB for 70B). Write it after DST
"""
_JSON = "print one JSON object on standard output instead of a report: see python -m convert --help"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; ends the process with exit code 2 and one sentence if it is wrong.

    Returns:
      command, json, and, by command,
        hf, meta, quantize, export: source, destination, dtype, quantize, max_memory (bytes),
          resume, verify, check (None, True or a file)
        verify: source, destination
        inspect: path, mesh (None or "4x2")
    """
    parser = Parser(
        prog="python -m convert",
        description="Converts, quantises, describes and verifies checkpoints of Llama 3.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary, description in _CONVERSIONS:
        conversion = commands.add_parser(
            name, help=summary, description=description, allow_abbrev=False
        )
        _add_conversion(conversion, name)
    verify = commands.add_parser(
        "verify",
        help="compare a converted checkpoint with its source",
        description="Reads every weight of DST and compares it with SRC: bit for bit, cast to the "
        "dtype of DST, or, where DST is quantised, within the bound of its format. The checksums "
        "of DST are verified, too.",
        allow_abbrev=False,
    )
    verify.add_argument("source", metavar="SRC", help=_SOURCE)
    verify.add_argument("destination", metavar="DST", type=Path, help="what was made of it")
    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint holds, and what lies where on a mesh",
        description="Says what a checkpoint holds: its architecture, layout, dtypes, bytes and "
        "quantisation, and what each device of a mesh would hold. No weight is read and no device "
        "is needed.",
        allow_abbrev=False,
    )
    inspect.add_argument("path", metavar="PATH", type=Path, help="directory of a checkpoint")
    inspect.add_argument(
        "--mesh", metavar="SxT", help="pipeline stages x tensor-parallel ranks, such as 4x2"
    )
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help=_JSON)
    arguments = parser.parse_args(argv)
    _check(commands.choices[arguments.command], arguments)
    return arguments


def conversion_options(arguments: argparse.Namespace) -> Options:
    """What the arguments of a converting command ask for."""
    export = arguments.command == "export"
    return Options(
        layout="huggingface" if export else "orbax",
        dtype=arguments.dtype,
        quantize="plain" if export else arguments.quantize,
        max_memory=arguments.max_memory,
        resume=arguments.resume,
        verify=arguments.verify,
    )


_CONVERSIONS = (
    (
        "hf",
        "convert a checkpoint in Hugging Face layout",
        "Converts a checkpoint in Hugging Face layout (config.json, safetensors, tokenizer files) "
        "to the Orbax layout, which any mesh loads its own parts of. Unless told otherwise, every "
        "bit stays as it is. Weights that GPTQ, AWQ or others have quantised stay quantised.",
    ),
    (
        "meta",
        "convert Meta's original release",
        "Converts Meta's original release (consolidated.*.pth, params.json, tokenizer.model) to "
        "the Orbax layout. The tokenizer comes along, in Hugging Face's form.",
    ),
    (
        "quantize",
        "convert a checkpoint to quantised weights",
        "Quantises the matrices of all layers of a checkpoint, and writes it in the Orbax layout. "
        "Embedding, norms and the head stay as they are.",
    ),
    (
        "export",
        "write a checkpoint in Hugging Face layout",
        "Writes a checkpoint in Hugging Face layout, which transformers opens, with plain weights: "
        "what is quantised is dequantised.",
    ),
)


def _add_conversion(parser: argparse.ArgumentParser, command: str) -> None:
    default = Options()
    parser.add_argument("source", metavar="SRC", help=_SOURCE)
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="new or empty directory, on a disk with room for the weights",
    )
    if command == "export":
        parser.set_defaults(quantize=None, check=None)
    else:
        parser.add_argument(
            "--quantize",
            choices=FORMATS,
            required=command == "quantize",
            help="the matrices of the layers, weights only: int8 and fp8 with a scale for each "
            "output channel, int4 with a scale for each 128 columns of one",
        )
        parser.add_argument(
            "--check", nargs="?", type=Path, const=True, metavar="TEXTFILE", help=_CHECK
        )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights that are not quantised (default: each keeps its own)",
    )
    parser.add_argument(
        "--max-memory",
        type=size,
        default=default.max_memory,
        metavar="SIZE",
        help="most memory that the work may take beside the program itself, such as 256MiB "
        "(default: 1GiB)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with what an earlier run left in DST"
    )
    parser.add_argument(
        "--no-verify",
        action="store_false",
        dest="verify",
        help="do not read the result again to compare it with SRC",
    )


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if getattr(arguments, "check", None) is not None and arguments.quantize is None:
        parser.error("--check compares quantised weights with the original: add --quantize")
