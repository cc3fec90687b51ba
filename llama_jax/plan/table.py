"""A plan on the terminal."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from llama_jax.costs.figure import Figure
from llama_jax.plan.best_tables import best_tables, plain_table
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.figures import figures
from llama_jax.plan.headroom import headrooms
from llama_jax.plan.numbers import amount, cell
from llama_jax.plan.plan import Plan
from llama_jax.plan.reasons import (
    OUT_OF_SCOPE,
    breaks_first,
    layout_name,
    remedies,
    verdict,
    why,
)
from llama_jax.plan.recommend import Recommendation, recommendation_text
from llama_jax.plan.serving import Serving

# Column → the figure in it, and how large one of it is.
_MEMORY = {
    "weights\nGB": ("weights", 1e9),
    "KV cache\nk tokens": ("KV capacity of a replica", 1e3),
    "decode\ntick, ms": ("decode tick", 1e-3),
    "tick with\nchunk, ms": ("prefill tick", 1e-3),
    "commun-\nication, %": ("communication share of a decode tick", 1e-2),
    "layers\nused, %": ("share of layer positions in use", 1e-2),
}
_LOAD = {
    "TTFT\nms": ("TTFT", 1e-3),
    "TPOT\nms": ("TPOT", 1e-3),
    "mean\nTPOT, ms": ("mean TPOT", 1e-3),
    "tokens/s\na GPU": ("output rate of a GPU", 1),
    "requests/s\nat most": ("highest rate inside the targets", 1),
}
_PRICES = {
    "at this\nrate": ("cost of a million output tokens", 1),
    "at the\nhighest": ("cost at the highest rate inside the targets", 1),
}


def show_plan(
    plan: Plan,
    server: Serving | None,
    price: float | None = None,
    fewest: Recommendation | None = None,
) -> None:
    """Prints a plan: the verdict, the layouts, why the best is the best, and what breaks first.

    Args:
      plan: to show.
      server: of its best layout; None if it does not hold.
      price: of one GPU for one hour.
      fewest: whose plan it is, if the fewest GPUs were asked for.
    """
    console = Console(highlight=False)
    question = plan.question
    load = question.workload
    rate = fewest.rate if fewest is not None else load.rate
    asked = replace(load, rate=rate)
    _say(console, f"{question.model}, {asked}; {_targets(plan)}", "")
    if fewest is not None:
        _say(console, recommendation_text(fewest))
    _say(console, verdict(plan), "")
    shown = {candidate: figures(candidate, price) for candidate in plan.candidates}
    console.print(_layouts(shown, _MEMORY, "Each GPU, and the ticks of its ring", _chunk), "")
    title = f"At {rate:g} requests/s" if rate == load.rate else "One request alone"
    console.print(_layouts(shown, _LOAD, title, _held), "")
    if price is not None:
        console.print(_layouts(shown, _PRICES, "Cost of 1M output tokens"), "")
    _say(console, *why(plan), "")
    if server is not None:
        _say(console, *breaks_first(headrooms(question, plan.best)), "")
        console.print(
            "The server of this plan:", server.wrapped, sep="\n", soft_wrap=True, markup=False
        )
        _say(console, *server.notes, "")
    else:
        _say(console, *remedies(plan), "")
    for table in best_tables(plan.best, shown[plan.best]):
        console.print(table, "")
    console.print(_evidence(shown[plan.best]))
    _say(console, "", OUT_OF_SCOPE)


def _targets(plan: Plan) -> str:
    targets = plan.question.targets
    bounds = [
        f"{name} of {amount(value, 's')}"
        for name, value in (("TTFT", targets.ttft), ("TPOT", targets.tpot))
        if value is not None
    ]
    texts = []
    if bounds:
        texts.append(f"{100 * targets.inside:g}% of the requests inside {' and '.join(bounds)}")
    if targets.memory_share is not None:
        texts.append(f"{100 * targets.memory_share:g}% of the memory")
    return ", ".join(texts)


def _layouts(
    shown: dict[Candidate, dict[str, Figure]],
    columns: Mapping[str, tuple[str, float]],
    title: str,
    last: Callable[[Candidate], str] | None = None,
) -> Table:
    """One row for each layout, the best first; a band has its ends in a second line."""
    table = plain_table(title, ("layout", *columns), 1)
    if last is not None:
        table.add_column("targets" if last is _held else "chunk,\ntokens")
    for candidate, found in shown.items():
        cells = [cell(found.get(name), factor) for name, factor in columns.values()]
        if last is not None:
            cells.append(last(candidate))
        table.add_row(layout_name(candidate.layout), *cells)
    return table


def _chunk(candidate: Candidate) -> str:
    return str(candidate.chunk) if candidate.fits else "-"


def _held(candidate: Candidate) -> str:
    if candidate.holds:
        return "kept" if candidate.holds_surely else "likely kept"
    return "misses " + ", ".join(missed.target for missed in candidate.missed)


def _evidence(found: dict[str, Figure]) -> Table:
    """How the figures are known, those with the same origin together."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title="How this is known")
    table.title_justify = "left"
    for column in ("evidence", "source", "figures"):
        table.add_column(column)
    origins: dict[tuple[str, str], list[str]] = {}
    for name, figure in found.items():
        origins.setdefault((figure.evidence.value, figure.source), []).append(name)
    for (evidence, source), names in origins.items():
        plain = [name for name in names if ":" not in name]
        table.add_row(evidence, source, ", ".join(plain or names))
    return table


def _say(console: Console, *lines: str | Iterable[str]) -> None:
    for line in lines:
        console.print(line, markup=False, soft_wrap=False)
