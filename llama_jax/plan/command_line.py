"""The command line of `python -m llama_jax.plan`. Imports no JAX."""

import argparse
import math
from pathlib import Path

from llama_jax.costs.calibration import Calibration
from llama_jax.costs.deployment import Layout
from llama_jax.costs.gpus import GPUS, find_gpu
from llama_jax.plan.layouts import check_layout, mesh_argument
from llama_jax.plan.model import MODELS, WEIGHTS, find_model, local_path, with_weights
from llama_jax.plan.modes import add_modes
from llama_jax.plan.plan import Question
from llama_jax.plan.planned_load import DEFAULT_LOAD, LEAST_RATE, MOST_RATE, planned_load
from llama_jax.plan.reasons import OUT_OF_SCOPE
from llama_jax.plan.targets import Targets
from llama_jax.terminal.arguments import Parser, duration
from sharding.errors import UserError

GPUS_ASSUMED = 8
KV_DTYPES = ("auto", "bf16", "fp8", "int8")

_EPILOG = f"""\
models: {", ".join(MODELS)}, or a checkpoint
GPUs: {", ".join(GPUS)}

Every figure is a band (low, expected, high) and says how it is known. Without any argument, the
reference deployment is planned, row by row.

{OUT_OF_SCOPE}

exit codes:
  0    a layout meets every target as expected
  1    no layout does: the plan says what is missing, and by how much
  2    the question is wrong: one sentence on standard error
  70   a defect of the program, with a traceback on standard error
"""


def make_parser() -> Parser:
    """The parser, with the arguments of all modes."""
    parser = Parser(
        prog="python -m llama_jax.plan",
        description="Plans how to serve a model on GPUs, before there are any.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("deployment").add_argument
    add(
        "--model",
        default="llama3-70b",
        metavar="NAME",
        help="name or checkpoint of the model (%(default)s)",
    )
    add("--gpu", default="h100-sxm", metavar="NAME", help="one of those below (%(default)s)")
    add("--gpus", type=_count, metavar="N", help=f"number of GPUs ({GPUS_ASSUMED})")
    add("--layout", type=mesh_argument, metavar="PxR", help="plan only stages x ranks, such as 4x2")
    add("--replicas", type=_count, metavar="N", help="copies of the model, each in --layout")
    add("--weights", choices=WEIGHTS, help="format of the layers' matrices (the checkpoint's)")
    add(
        "--kv-cache-dtype",
        choices=KV_DTYPES,
        default="auto",
        help="format of the KV cache (%(default)s)",
    )
    add("--fp8-activations", action="store_true", help="multiply in fp8, with --weights fp8")
    add("--max-chunk", type=_count, metavar="TOKENS", help="most prompt tokens in a tick (chosen)")
    add("--calibration", type=Path, metavar="FILE", help="tick times that --calibrate measured")
    add = parser.add_argument_group("workload").add_argument
    default = DEFAULT_LOAD
    lengths = "of each request ({}, or the mean of what is simulated)"
    add("--prompt-tokens", type=_count, metavar="N", help=lengths.format(default.prompt_tokens))
    add("--output-tokens", type=_count, metavar="N", help=lengths.format(default.output_tokens))
    rate = f"requests/s of all replicas together ({default.rate:g}, or that of --trace)"
    add("--rate", type=_rate, metavar="R", help=rate)
    add = parser.add_argument_group("targets").add_argument
    add(
        "--ttft",
        type=_limit,
        default="500ms",
        metavar="TIME",
        help="to the first token, or none (%(default)s)",
    )
    add(
        "--tpot",
        type=_limit,
        default="50ms",
        metavar="TIME",
        help="per token after the first, or none (%(default)s)",
    )
    add(
        "--inside",
        type=_part,
        default=0.99,
        metavar="SHARE",
        help="of the requests that must keep both (%(default)g)",
    )
    add(
        "--memory",
        type=_share,
        default=0.85,
        metavar="SHARE",
        help="of each GPU's memory that may be used (%(default)g)",
    )
    add = parser.add_argument_group("answer").add_argument
    add("--recommend", action="store_true", help="find the fewest GPUs for the rate and targets")
    add(
        "--cost-per-gpu-hour",
        type=_positive,
        metavar="X",
        help="price of a GPU; adds the cost of a million output tokens",
    )
    add(
        "--frontier",
        type=Path,
        metavar="FILE",
        help="draw the frontier of all layouts (.svg or .png)",
    )
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add_modes(parser)
    return parser


def read_question(arguments: argparse.Namespace) -> Question:
    """The question that a command line asks.

    Raises:
      UserError: an unknown model or GPU, an impossible layout, or arguments that contradict each
        other.
    """
    stored = find_model(arguments.model)
    config = with_weights(stored, arguments.weights)
    layout, gpus = _layout_and_gpus(arguments)
    workload = planned_load(arguments)
    tpot = arguments.tpot if workload.has_tpot else None
    if arguments.frontier is not None and not workload.has_tpot:
        raise UserError(
            "--frontier draws the speed of the tokens after the first, and answers of one token "
            "have none: raise --output-tokens, or leave it out."
        )
    longest = workload.prompt_tokens + workload.output_tokens
    if longest > config.max_context:
        raise UserError(
            f"A request of {workload.prompt_tokens:,} + {workload.output_tokens:,} tokens is "
            f"longer than the model's context of {config.max_context:,}: lower --prompt-tokens or "
            "--output-tokens."
        )
    if layout is not None:
        check_layout(config, layout)
    gpu = find_gpu(arguments.gpu)
    if arguments.fp8_activations:
        if config.quantization is None or config.quantization.format != "fp8":
            raise UserError("--fp8-activations needs matrices in fp8: add --weights fp8.")
        if "fp8" not in gpu.flops:
            raise UserError(f"{gpu.name} does not multiply in fp8: leave --fp8-activations out.")
    return Question(
        arguments.model,
        config,
        gpu,
        gpus,
        workload,
        Targets(arguments.ttft, tpot, arguments.memory, arguments.inside),
        arguments.kv_cache_dtype,
        layout,
        arguments.max_chunk,
        arguments.calibration and Calibration.read(arguments.calibration),
        arguments.fp8_activations,
        arguments.calibration,
        stored if local_path(arguments.model).exists() else None,
    )


def _layout_and_gpus(arguments: argparse.Namespace) -> tuple[Layout | None, int]:
    gpus, replicas, mesh = arguments.gpus, arguments.replicas, arguments.layout
    if arguments.recommend and gpus is not None:
        raise UserError("--recommend finds the number of GPUs: leave --gpus out.")
    if mesh is None:
        if replicas is not None:
            raise UserError("--replicas says how often --layout is repeated: give both.")
        return None, gpus or GPUS_ASSUMED
    each = math.prod(mesh)
    if arguments.recommend:
        if replicas is not None:
            raise UserError("--recommend finds the number of replicas: leave --replicas out.")
        return Layout(*mesh), each
    if gpus is None:
        gpus = each * (replicas or 1)
    if gpus % each or gpus < each:
        raise UserError(
            f"A layout of {mesh[0]}x{mesh[1]} takes {each} GPUs for each replica, and --gpus is "
            f"{gpus}: give a multiple of {each}."
        )
    if replicas not in (None, gpus // each):
        raise UserError(
            f"{replicas} replicas of {mesh[0]}x{mesh[1]} are {replicas * each} GPUs, and --gpus "
            f"is {gpus}: leave one of them out."
        )
    return Layout(mesh[0], mesh[1], gpus // each), gpus


def _limit(text: str) -> float | None:
    return None if text.strip().lower() == "none" else duration(text)


def _count(text: str) -> int:
    try:
        number = int(text.replace(",", ""))
    except ValueError:
        number = 0
    if not 1 <= number < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 2,147,483,647")
    return number


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _rate(text: str) -> float:
    number = _positive(text)
    if not LEAST_RATE <= number <= MOST_RATE:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a rate: give requests per second from {LEAST_RATE:g} to {MOST_RATE:g}"
        )
    return number


def _share(text: str) -> float:
    percent = text.strip().endswith("%")
    number = _positive(text.strip().removesuffix("%")) / (100 if percent else 1)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: give 0.85 or 85%")
    return number


def _part(text: str) -> float:
    number = _share(text)
    if number == 1:
        raise argparse.ArgumentTypeError("no queue keeps every request: give less than 1")
    return number
