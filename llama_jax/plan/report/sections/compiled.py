"""What XLA's GPU compiler says of the layout. JAX is imported when it compiles."""

import os

from llama_jax.costs.deployment import Layout
from llama_jax.costs.figure import Band, Evidence, Figure
from llama_jax.plan.plan import Plan
from llama_jax.plan.report.document import Cell, Section, Table
from llama_jax.plan.report.quantities import program_text
from llama_jax.plan.report.sections.memory import counted

ARITHMETIC = "shapes (llama_jax/costs/memory.py)"
COMPILED = "XLA's GPU compiler, without a GPU"


def compiled_section(plan: Plan, layout: Layout) -> Section:
    """Compiles the programs of a layout, and lists bytes, collectives and kernels.

    Raises:
      UserError: the compiler is missing, or the model does not fit.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA says that autotuning needs a GPU
    from llama_jax.plan.compiled.described_mesh import prepare_jax

    prepare_jax()
    from llama_jax.plan.compiled.checks import differences, missed
    from llama_jax.plan.compiled.command import server_options
    from llama_jax.plan.compiled.deployment import compile_deployment

    question = plan.question
    found = compile_deployment(question.deployment(layout), server_options(question, layout))
    memory: list[tuple[Cell, ...]] = [
        (what.replace("_", " "), _compiled(each.compiled, "bytes"),
         counted(each.arithmetic, "bytes", ARITHMETIC), f"{each.bytes:+,} bytes")
        for what, each in differences(found).items()
    ]  # fmt: skip
    ticks: list[tuple[Cell, ...]] = [
        (
            program_text(*tick.bucket),
            _compiled(tick.kernels, "kernels"),
            f"{len(tick.copies)}",
            ", ".join(f"{c.calls} {c.kind} over {c.group}" for c in tick.collectives) or "none",
        )
        for tick in found.ticks
    ]
    problems = missed(found)
    text = (
        f"{found.fitting_kv_tokens:,} tokens of KV cache fit beside everything else.",
        *(problems or ["Nothing is amiss: no copy of weights or cache, no other collectives."]),
    )
    return Section(
        f"compiled_{layout.mesh}",
        f"What the compiler says of {layout.mesh}",
        text,
        (
            Table("memory", ("on each GPU", "compiled", "arithmetic", "difference"), tuple(memory)),
            Table(
                "ticks",
                ("program", "launched", "copies of weights or cache", "collectives"),
                tuple(ticks),
            ),
        ),
    )


def _compiled(value: float, unit: str) -> Figure:
    return Figure(Band.exactly(value), unit, Evidence.COMPILED, COMPILED)
