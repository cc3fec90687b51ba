"""A compiled deployment on the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from llama_jax.plan.compiled.as_json import versions
from llama_jax.plan.compiled.checks import differences, missed
from llama_jax.plan.compiled.collectives import Collective
from llama_jax.plan.compiled.deployment import CompiledDeployment
from llama_jax.plan.compiled.tick_figures import TickFigures
from llama_jax.plan.report.quantities import program_text

LARGEST = 3  # temporaries to show


def show(compiled: CompiledDeployment, console: Console) -> None:
    """Prints the memory of a GPU, what a tick does, and what does not hold."""
    deployment, sizes = compiled.deployment, compiled.programs.sizes
    of = " ".join(f"{name} {number}" for name, number in versions().items())
    console.print(
        f"\n[bold]{deployment.layout.mesh}, {deployment.gpu.name}, {deployment.weights} weights, "
        f"{deployment.kv_dtype} KV cache[/]: compiled by XLA ({of}), no GPU"
    )
    console.print(_memory(compiled))
    console.print(
        f"The KV cache of {sizes.num_pages:,} pages holds {compiled.kv_tokens:,} tokens. "
        f"{compiled.fitting_kv_tokens:,} would fit into {compiled.allowed / 1e9:.2f} GB."
    )
    console.print(_ticks(compiled.ticks))
    for tick in compiled.ticks:
        arrays = ", ".join(
            f"{buffer.shape} of {buffer.name} ({buffer.size / 1e6:.1f} MB)"
            for buffer in tick.temporaries[:LARGEST]
        )
        console.print(
            f"Largest temporaries of {program_text(*tick.bucket)}: {arrays}", markup=False
        )
    console.print(
        "Without a GPU, XLA cannot measure which tiles and splits of a product are fastest. On "
        "one, kernels and bytes of products may differ; collectives and arguments do not."
    )
    problems = missed(compiled)
    for problem in problems:
        console.print(f"MISSED: {problem}", markup=False)
    if not problems:
        console.print(
            "Collectives as the mesh needs them, no copy of weights or cache, memory as computed."
        )


def _memory(compiled: CompiledDeployment) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("on each GPU")
    for column in ("bytes, compiled", "arithmetic", "arithmetic - compiler"):
        table.add_column(column, justify="right")
    by_arithmetic = differences(compiled)
    for name, size in compiled.memory._asdict().items():
        row = [name.replace("kv_cache", "KV cache"), f"{size:,}"]
        if difference := by_arithmetic.get(name):
            row += [f"{difference.arithmetic:,}", f"{difference.bytes:+,}"]
        table.add_row(*row)
    share = sum(compiled.memory) / compiled.deployment.gpu.memory_bytes
    table.add_row(f"total, {share:.1%} of its memory", f"{sum(compiled.memory):,}")
    return table


def _ticks(ticks: list[TickFigures]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("in a tick")
    for tick in ticks:
        table.add_column(program_text(*tick.bucket), justify="right")

    def add(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    add("kernels, of them in graphs", [f"{t.kernels}, {t.kernels_in_graphs}" for t in ticks])
    add("kernels of a layer", [f"{t.kernels_per_layer:g}" for t in ticks])
    add("loops in which the host waits", [str(t.host_loops) for t in ticks])
    add("GB read and written", [f"{(t.read + t.written) / 1e9:.2f}" for t in ticks])
    add("relative to the ideal", [f"{t.ratio:.3f}" for t in ticks])
    for key in sorted({each[:2] for tick in ticks for each in tick.collectives}):
        kind, group = key
        add(f"{kind}s over {group} GPUs, MB", [_collective(t.collectives, key) for t in ticks])
    add("copies of weights or cache", [str(len(t.copies)) for t in ticks])
    return table


def _collective(collectives: list[Collective], key: tuple[str, int]) -> str:
    for each in collectives:
        if each[:2] == key:
            return f"{each.calls}, {each.payload / 1e6:.3g}"
    return "0"
