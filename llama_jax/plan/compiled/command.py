"""`python -m llama_jax.plan --compile`: what XLA's GPU compiler says. Needs no GPU.

The module imports no JAX; `run` does.
"""

import argparse
import json
import os
from typing import TYPE_CHECKING

from llama_jax.costs.deployment import Layout
from llama_jax.engine.options import EngineOptions
from llama_jax.plan.compiled.described_gpus import find_description
from llama_jax.plan.layouts import check_layout, mesh_argument

if TYPE_CHECKING:
    from llama_jax.plan.plan import Plan, Question

HOLDS, MISSED = 0, 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--compile`."""
    group = parser.add_argument_group("compiler")
    group.add_argument(
        "--compile",
        nargs="*",
        type=_layout,
        metavar="PxR",
        help="build the server's programs with XLA's GPU compiler, for these layouts (the best), "
        "and read memory, collectives, copies and kernels from them; needs no GPU, but the "
        "package's extra cuda12",
    )


def run(arguments: argparse.Namespace, plan: "Plan") -> int:
    """Compiles and prints; returns 1 if anything does not hold.

    Raises:
      UserError: the compiler is missing, or the model does not fit into a layout.
    """
    question = plan.question
    find_description(question.gpu)
    layouts = arguments.compile or [plan.best.layout]
    for layout in layouts:
        check_layout(question.config, layout)

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA says that autotuning needs a GPU
    from rich.console import Console

    from llama_jax.plan.compiled.described_mesh import prepare_jax

    prepare_jax()
    from llama_jax.plan.compiled.as_json import as_json
    from llama_jax.plan.compiled.checks import missed
    from llama_jax.plan.compiled.deployment import compile_deployment
    from llama_jax.plan.compiled.table import show

    console = Console(highlight=False)
    found, holds = [], True
    for layout in layouts:
        compiled = compile_deployment(question.deployment(layout), server_options(question, layout))
        holds = holds and not missed(compiled)
        if arguments.json:
            found.append(as_json(compiled))
        else:
            show(compiled, console)
    if arguments.json:
        print(json.dumps({"compiled": found}, indent=1))
    return HOLDS if holds else MISSED


def server_options(question: "Question", layout: Layout) -> EngineOptions:
    """The options of the server that a plan prints for a layout, as far as programs depend on them.

    As many replicas as the GPUs hold share the rate. Its sequences may be as long as the model's
    context, so that the KV cache takes the room that there is.
    """
    alone = layout._replace(replicas=1)
    candidate = question.candidate(alone._replace(replicas=max(1, question.gpus // alone.gpus)))
    return EngineOptions(
        path=question.model,
        max_num_seqs=candidate.max_num_seqs,
        max_chunk=candidate.max_chunk,
        gpu_memory_utilization=question.targets.memory_share,
    )


def _layout(text: str) -> Layout:
    return Layout(*mesh_argument(text))
