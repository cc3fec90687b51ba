"""The modes of the planner that look at this machine: `--validate` and `--calibrate`."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.costs.gpus import CPU, find_gpu
from llama_jax.plan.machine.batches import Batch, BatchError
from llama_jax.plan.machine.expectation import Expectation
from llama_jax.plan.machine.host import weight_files
from llama_jax.plan.model import checkpoint_path
from llama_jax.terminal.arguments import duration

if TYPE_CHECKING:
    from llama_jax.plan.plan import Plan

AUTO = "auto"  # --gpu: whatever this machine has


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the modes and their options."""
    group = parser.add_argument_group("this machine")
    group.add_argument(
        "--validate",
        action="store_true",
        help="check that this host is what the plan assumes: --gpu, --layout, and --gpus if it "
        "holds more than one replica; --gpu auto is whatever there is; the exit code says what "
        "is not (docs/operations.md)",
    )
    group.add_argument(
        "--load-within",
        type=duration,
        metavar="TIME",
        help="with --validate: the time in which the disk must deliver the checkpoint (any)",
    )
    group.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="time the real ticks of --model in --layout on this machine, and write them for "
        "--calibration",
    )
    group.add_argument(
        "--batches",
        type=_batch,
        nargs="+",
        metavar="BATCH",
        help="with --calibrate: what to time, as rows@context+chunk@prefix, such as 8@512+64@0 "
        "(every program, at three contexts)",
    )


def run(arguments: argparse.Namespace, plan: "Plan | None" = None) -> int:
    """Runs the modes that were asked for; returns the exit code.

    Neither needs a plan: they ask the machine, and not whether the targets can be met. With both, a
    machine that is not what was planned is not calibrated.
    """
    code, found = _validate(arguments) if arguments.validate else (0, {})
    if arguments.calibrate is not None and code == 0:
        from llama_jax.plan.machine.calibrate import calibrate

        calibrate(arguments)
        found["written"] = str(arguments.calibrate)
    if arguments.json:
        print(json.dumps(found, indent=1))
    return code


def expectation(arguments: argparse.Namespace) -> Expectation:
    """What the command line plans for.

    Raises:
      UserError: there is no such GPU or model.
    """
    mesh = arguments.layout or _best_mesh(arguments)
    gpus = arguments.gpus or math.prod(mesh)  # other replicas may be on other hosts
    path = checkpoint_path(arguments.model)
    size = 0 if path is None else sum(weight_files(path).values())
    if arguments.gpu == AUTO:
        return Expectation(mesh, checkpoint_bytes=size, load_seconds=arguments.load_within)
    gpu = find_gpu(arguments.gpu)
    count = 0 if gpu.platform == "cpu" else gpus
    return Expectation(mesh, count, gpu, size, load_seconds=arguments.load_within)


def _validate(arguments: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The exit code, and what there is to print with `--json`; without it, shows a table."""
    from llama_jax.plan.machine.validate import show, validate

    validation = validate(expectation(arguments), checkpoint_path(arguments.model))
    if not arguments.json:
        show(validation)
    return int(validation.code), validation.to_json()


def _best_mesh(arguments: argparse.Namespace) -> tuple[int, int]:
    """The mesh that the planner would choose; 1x1 where it has nothing to choose from."""
    if arguments.gpu in (AUTO, CPU.name):
        return 1, 1
    from llama_jax.plan.command_line import read_question
    from llama_jax.plan.plan import make_plan

    layout = make_plan(read_question(arguments)).best.layout
    return layout.num_stages, layout.num_ranks


def _batch(text: str) -> Batch:
    try:
        return Batch.parse(text)
    except BatchError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error
