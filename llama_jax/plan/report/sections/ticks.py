"""Where the time goes: ticks by part, communication, latency against batch and context.

Imports no JAX.
"""

from llama_jax.costs.figure import Evidence, Figure
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.figures import communication, tick_work
from llama_jax.plan.report.document import Cell, Plot, Section, Table
from llama_jax.plan.report.drawing import bands, draw
from llama_jax.plan.report.quantities import band_text, program_text
from llama_jax.terminal.units import bytes_text, count_text

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # sequences of the whole ring
CONTEXTS = (512, 2048, 8192)
PARTS = {
    "products": "matrix products of the layers",
    "small": "small kernels of the layers",
    "head": "LM head and sampling",
    "launch": "waiting for the host",
}
PURPOSES = {
    "layers": "partial sums of the layers",
    "embedding": "embeddings of the entering packet",
    "stages": "activations to the next stage",
    "finished": "activations of the leaving packet",
    "tokens": "the likeliest token of each GPU",
}


def tick_section(candidate: Candidate) -> Section:
    """The parts of a tick without and with a chunk, with as many rows as live on average."""
    model, works = candidate.replica.model, _works(candidate)
    decode = tick_work(candidate, 0)
    context = round(candidate.replica.context)
    live = round(decode.row_keys / context)
    parts = [model.figures(work) for work in works.values()]
    table: list[tuple[Cell, ...]] = [
        (PARTS.get(name, name), *(found[name] for found in parts)) for name in parts[0]
    ]
    num_stages = model.deployment.layout.num_stages
    of_token = count_text(num_stages, "tick")
    for name, factor in (("whole tick", 1), (f"per token: {of_token}", num_stages)):
        sums = (model.seconds(work) * factor for work in works.values())
        table.append(
            (name, *(Figure(band, "s", Evidence.ARITHMETIC, "sum of the parts") for band in sums))
        )
    return Section(
        "ticks",
        "Where the time of a tick goes",
        (
            f"A packet has {count_text(live, 'live row')} with a context of {context:,} tokens, in "
            f"a program for {decode.rows}. All stages run in lockstep, so every tick lasts as long "
            f"as its slowest stage, and each token takes {of_token}.",
        ),
        (Table("parts", ("", *works), tuple(table)),),
        (_latency_plot(model),),
    )


def communication_section(candidate: Candidate) -> Section:
    """The collectives of a tick: how many, how large, and their share of the time."""
    model, works = candidate.replica.model, _works(candidate)
    gpu = model.deployment.gpu
    shares = " and ".join(
        f"{band_text(communication(model, work), '')} of a tick with {name}"
        for name, work in works.items()
    )
    table: list[tuple[Cell, ...]] = []
    for few, many in zip(*map(model.collectives, works.values()), strict=True):
        table.append(
            (
                PURPOSES.get(few.what, few.what),
                few.kind,
                f"{few.count}",
                f"{few.ranks}",
                *(bytes_text(each.bytes) for each in (few, many)),
                *(Figure(c.seconds, "s", c.evidence, c.source) for c in (few, many)),
            )
        )
    columns = (
        *("for", "collective", "a tick", "GPUs"),
        *(f"bytes, {name}" for name in works),
        *(f"time, {name}" for name in works),
    )
    if not table:
        return Section("communication", "Communication", ("One GPU has nothing to send.",))
    return Section(
        "communication",
        "Communication",
        (
            f"Data moves for {shares}. The links carry {gpu.link_bandwidth / 1e9:,.0f} GB/s in "
            f"each direction ({gpu.source_of('link_bandwidth')}). Bytes are those of each "
            "collective, times those of all together.",
        ),
        (Table("collectives", columns, tuple(table)),),
    )


def _works(candidate: Candidate) -> dict[str, Work]:
    """The work of both kinds of ticks, by what to call them."""
    works = (tick_work(candidate, chunk) for chunk in (0, candidate.chunk))
    return {program_text(work.rows, work.chunk): work for work in works}


def _latency_plot(model: TickModel) -> Plot:
    num_stages = model.deployment.layout.num_stages
    curves = {}
    for context in CONTEXTS:
        points = []
        for batch in BATCHES:
            band = model.seconds(Work.of(-(-batch // num_stages), context)) * (1e3 * num_stages)
            points.append((round(band.low, 4), round(band.expected, 4), round(band.high, 4)))
        curves[f"context {context:,}"] = points
    data = {
        "sequences": list(BATCHES),
        "milliseconds_low_expected_high": {k: list(map(list, v)) for k, v in curves.items()},
    }
    return Plot(
        "latency",
        "Time per output token by the number of sequences and their context, without prompts",
        data,
        draw(
            "latency by batch and context",
            lambda: bands(BATCHES, curves, "sequences that decode", "ms per token", {}),
        ),
    )
