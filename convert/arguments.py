"""The command line of `python -m convert`. Imports no JAX."""

import argparse
from pathlib import Path

from convert.conversion import Options
from llama_jax.config.llama_config import DTYPES
from llama_jax.quantization import QUANTIZERS
from llama_jax.terminal.arguments import Parser, size

_EXAMPLES = """\
examples:
  python -m convert hf /models/Meta-Llama-3-70B-Instruct /models/llama-3-70b
  python -m convert hf meta-llama/Llama-3.1-8B-Instruct /models/llama-3.1-8b --quantize int8 --check
  python -m convert hf /models/Llama-3.1-8B-Instruct /models/mine --adapter /adapters/mine
  python -m convert gguf Llama-3.2-1B-Instruct-Q4_K_M.gguf /models/llama-3.2-1b
  python -m convert inspect /models/llama-3-70b --mesh 4x2
  python -m convert verify /models/Meta-Llama-3-70B-Instruct /models/llama-3-70b

Serve a converted checkpoint like any other: python -m llama_jax.serve DST. To continue an
interrupted conversion, run the same command again with --resume.

exit codes:
  0    done
  1    an error: one sentence on standard error
  2    wrong usage of the command line
  3    verify found differences
  70   a defect of the program, with a traceback on standard error
  130  interrupted by Ctrl-C: run the same command again with --resume

With --json, standard output is one JSON object, {"error": "..."} if the exit code is 1, 70 or 130:
  hf, meta, gguf, quantize, export
    source, adapter (or null), destination, dtype, quantization (null, or its format),
    source_bytes and bytes (of weights), resumed_bytes (written by an earlier run), seconds,
    verify_seconds (null: not verified), quantization_error (relative, by kind of matrix),
    divergence (null, or tokens, mean and largest in nats, agreement from 0 to 1)
  verify
    source, adapter (or null), destination, differences (list of sentences), seconds
  inspect
    path, layout (orbax, huggingface, meta, gguf), formats (with their versions, or null),
    num_files, config (as in config.json), quantization (null, or format, group_size and plain),
    quantized_by, quantization_error, num_parameters, bytes, bytes_by_dtype, devices (of --mesh:
    stage, rank, layers, padding_layers, heads, kv_heads, bytes, bytes_by_group)
"""
_SOURCE = "checkpoint directory, GGUF file, or name of a model on the Hugging Face Hub"
_ADAPTER = """\
merge a LoRA adapter into the weights: the directory that PEFT has written, or its name on the
Hugging Face Hub. If it has a tokenizer, DST gets that one
"""
_CHECK = """\
compare the next-token distributions of the quantized model and SRC on a text (default: a built-in
sample): Kullback-Leibler divergence in nats, and how often both rank the same token first. Runs on
the CPU in float32, one layer at a time, and needs 1.5 times the memory of a layer (5 GB for 70B).
Put this option after DST
"""
_JSON = "print one JSON object instead of a report (see python -m convert --help)"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; if it is wrong, exits with code 2 and one sentence.

    Returns:
      command, json, and, by command,
        hf, meta, gguf, quantize, export: source, destination, dtype, quantize, max_memory (bytes),
          resume, verify, adapter (None or a string), check (None, True or a file), strict_config
          (not for meta)
        verify: source, destination, adapter
        inspect: path, mesh (None or "4x2")
    """
    parser = Parser(
        prog="python -m convert",
        description="Converts, quantizes, inspects and verifies Llama 3 checkpoints.",
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
        description="Compares every weight of DST with SRC: bit for bit after a cast to the dtype "
        "of DST, or, for quantized weights, within the error bound of the format. Also verifies "
        "the checksums of DST.",
        allow_abbrev=False,
    )
    verify.add_argument("source", metavar="SRC", help=_SOURCE)
    verify.add_argument("destination", metavar="DST", type=Path, help="converted checkpoint")
    verify.add_argument("--adapter", metavar="DIR", help="LoRA adapter that was merged into DST")
    inspect = commands.add_parser(
        "inspect",
        help="describe a checkpoint and its distribution over a mesh",
        description="Describes a checkpoint: its architecture, layout, dtypes, bytes and "
        "quantization, and what each device of a mesh would hold. Reads no weights and needs no "
        "devices.",
        allow_abbrev=False,
    )
    inspect.add_argument(
        "path", metavar="PATH", type=Path, help="checkpoint directory or GGUF file"
    )
    inspect.add_argument(
        "--mesh", metavar="SxT", help="pipeline stages x tensor-parallel ranks, such as 4x2"
    )
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help=_JSON)
    arguments = parser.parse_args(argv)
    _check(commands.choices[arguments.command], arguments)
    return arguments


def conversion_options(arguments: argparse.Namespace) -> Options:
    """Returns the options of a conversion command."""
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
        "to the Orbax layout, of which each device of a mesh can load its own part. By default, "
        "values do not change, and weights quantized by GPTQ, AWQ or other tools stay quantized.",
    ),
    (
        "meta",
        "convert Meta's original release",
        "Converts Meta's original release (consolidated.*.pth, params.json, tokenizer.model) to "
        "the Orbax layout, and its tokenizer to Hugging Face's format.",
    ),
    (
        "gguf",
        "convert a model in GGUF, the format of llama.cpp",
        "Converts a GGUF file, or a directory that holds one model in GGUF, to the Orbax layout, "
        "and its tokenizer to Hugging Face's format. Quantized weights are dequantized: to "
        "bfloat16, or exactly with --dtype float32.",
    ),
    (
        "quantize",
        "quantize a checkpoint",
        "Quantizes the matrices of all layers and writes the checkpoint in Orbax layout. The "
        "embedding, the norms and the head are not quantized.",
    ),
    (
        "export",
        "write a checkpoint in Hugging Face layout",
        "Writes a checkpoint in Hugging Face layout, which transformers can open. Quantized "
        "weights are dequantized.",
    ),
)


def _add_conversion(parser: argparse.ArgumentParser, command: str) -> None:
    default = Options()
    parser.add_argument("source", metavar="SRC", help=_SOURCE)
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="new or empty directory, on a disk with enough space for the weights",
    )
    if command == "export":
        parser.set_defaults(quantize=None, check=None)
    else:
        parser.add_argument(
            "--quantize",
            choices=QUANTIZERS,
            required=command == "quantize",
            help="weight-only format for the matrices of the layers: int8 and fp8 with one scale "
            "per output channel, int4 with one scale per 128 columns of an output channel",
        )
        parser.add_argument(
            "--check", nargs="?", type=Path, const=True, metavar="TEXTFILE", help=_CHECK
        )
    parser.add_argument("--adapter", metavar="DIR", help=_ADAPTER)
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights that are not quantized (default: unchanged)",
    )
    if command != "meta":
        parser.add_argument(
            "--strict-config",
            action="store_true",
            help="refuse a source whose config.json or generation_config.json has unknown keys, "
            "instead of warning",
        )
    parser.add_argument(
        "--max-memory",
        type=size,
        default=default.max_memory,
        metavar="SIZE",
        help="maximum memory for the conversion, beyond the program itself, such as 256MiB "
        "(default: 1GiB)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue an interrupted conversion in DST"
    )
    parser.add_argument(
        "--no-verify",
        action="store_false",
        dest="verify",
        help="do not compare the result with SRC",
    )


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if getattr(arguments, "check", None) is not None and arguments.quantize is None:
        parser.error("--check compares quantized weights with the original: add --quantize")
