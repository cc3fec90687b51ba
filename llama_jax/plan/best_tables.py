"""The memory, the ticks and the collectives of one layout as tables on the terminal."""

from collections.abc import Iterator

from rich import box
from rich.table import Table

from llama_jax.costs.figure import Figure
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.figures import PARTS, tick_work
from llama_jax.plan.numbers import cell
from llama_jax.terminal.units import bytes_text


def best_tables(candidate: Candidate, figures: dict[str, Figure]) -> Iterator[Table]:
    """What each GPU holds, what a tick is spent on, and its collectives."""
    memory = plain_table(f"Memory of each GPU, {candidate.layout}", ("", "bytes"), 1)
    for kind in ("weights: ", "room for KV cache", "temporaries"):
        for name, figure in figures.items():
            if name.startswith(kind) and "per" not in name:
                memory.add_row(name, bytes_text(figure.value.expected))
    yield memory
    if not candidate.fits:
        return
    parts = plain_table("Its ticks, ms", ("", "decode", "with chunk", "evidence"), 1)
    for name, figure in figures.items():
        if name.startswith("decode tick"):
            other = figures["prefill" + name.removeprefix("decode")]
            values = (cell(found, 1e-3, " ") for found in (figure, other))
            what = name.removeprefix("decode tick: ").replace("decode tick", "in all")
            parts.add_row(what, *values, figure.evidence.value)
    yield parts
    if (sent := _collectives(candidate)).row_count:  # one GPU has none
        yield sent


def _collectives(candidate: Candidate) -> Table:
    columns = ("tick", "for", "collective", "count", "ranks", "each", "in all, ms")
    table = plain_table("Its collectives", columns, 3)
    for name, chunk in zip(PARTS, (0, candidate.chunk), strict=True):
        for used in candidate.replica.model.collectives(tick_work(candidate, chunk)):
            table.add_row(
                name, used.what, used.kind, str(used.count), str(used.ranks),
                bytes_text(used.bytes), f"{used.seconds.expected * 1e3:.2g}",
            )  # fmt: skip
    return table


def plain_table(title: str, columns: tuple[str, ...], texts: int) -> Table:
    """A table whose first columns are texts, and whose others are numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title=title)
    table.title_justify = "left"
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < texts else "right", no_wrap=True)
    return table
