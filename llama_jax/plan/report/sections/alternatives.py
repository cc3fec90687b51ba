"""Why this layout: the others with their numbers, the headroom, and the frontier.

Imports no JAX.
"""

from llama_jax.costs.figure import Figure
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.figures import figures
from llama_jax.plan.frontier import frontier, points
from llama_jax.plan.headroom import headrooms
from llama_jax.plan.json_text import point_json
from llama_jax.plan.numbers import amount
from llama_jax.plan.plan import Plan
from llama_jax.plan.reasons import breaks_first, layout_name, remedies, why
from llama_jax.plan.report import drawing
from llama_jax.plan.report.document import Cell, Plot, Section, Table
from llama_jax.terminal.units import count_text

MOST_GROUPS = 5  # that a plot can tell apart
_COLUMNS = {
    "weights per GPU": "weights",
    "decode tick": "decode tick",
    "TTFT": "TTFT",
    "TPOT": "TPOT",
    "highest rate": "highest rate inside the targets",
}


def why_section(plan: Plan) -> Section:
    """Every layout with its figures, the best first."""
    rows = tuple(_row(candidate) for candidate in plan.candidates)
    text = tuple(why(plan)) or ("Only this layout was asked for.",)
    columns = ("layout", "targets", "chunk", *_COLUMNS)
    return Section("why", "Why this layout", text, (Table("layouts", columns, rows),))


def headroom_section(plan: Plan) -> Section:
    """How far load and machine may change before a target is missed."""
    if not plan.best.holds:
        return Section("headroom", "What would help", tuple(remedies(plan)) or ("Nothing here.",))
    found = headrooms(plan.question, plan.best)
    rows = tuple(
        (
            "tick" if each.what == "launch gap" else each.what,
            amount(each.now, each.unit),
            amount(each.limit, each.unit),
            f"× {each.factor:.1f}",
            each.then or "-",
        )
        for each in found
    )
    columns = ("what", "now", "may grow to", "factor", "then missed")
    return Section(
        "headroom",
        "Headroom",
        (next(iter(breaks_first(found))),),
        (Table("headroom", columns, rows),),
    )


def frontier_section(plan: Plan) -> Section:
    """Speed for each user against throughput of each GPU, over all layouts and rates."""
    found = points(plan)
    best = frontier(found)
    if not found:
        text = "No layout can hold the model."
        if not plan.question.workload.has_tpot:
            text = "Answers of one token have no speed after the first token."
        return Section("frontier", "Frontier of all layouts", (text,))
    layouts = [candidate.layout for candidate in plan.candidates]
    groups = {
        layout_name(layout): [(p.user, p.gpu, "") for p in found if p.layout == layout]
        for layout in layouts[:MOST_GROUPS]
    }
    drawn = {name: members for name, members in groups.items() if members}
    line = sorted((p.user, p.gpu) for p in best)
    plot = Plot(
        "frontier",
        "Output tokens/s for each user and of each GPU, by layout and rate",
        {
            "points": [point_json(point) for point in found],
            "frontier": [point_json(point) for point in best],
        },
        drawing.draw(
            "frontier of all layouts",
            lambda: drawing.points(
                drawn, line, "tokens/s for each user (1 / TPOT)", "tokens/s of each GPU"
            ),
        ),
    )
    point = (
        "Each point is a layout at one rate, with the chunk that makes tokens fastest and still "
        "keeps the TTFT."
    )
    rest = len(layouts) - MOST_GROUPS
    if plot.svg is None:
        lines: tuple[str, ...] = (
            f"{point} The JSON has {count_text(len(found), 'point')} of "
            f"{count_text(len(layouts), 'layout')}; no other beats the {len(best)} of the frontier "
            "in both speeds.",
        )
    else:
        lines = (f"{point} No point beats one on the line in both.",)
        if rest > 0:
            lines += (f"The plot shows {MOST_GROUPS} layouts; the JSON has {rest} more.",)
    return Section("frontier", "Frontier of all layouts", lines, (), (plot,))


def _row(candidate: Candidate) -> tuple[Cell, ...]:
    found: dict[str, Figure] = figures(candidate)
    held = "holds" if candidate.holds_surely else "likely"
    if not candidate.holds:
        held = "fails: " + ", ".join(missed.target for missed in candidate.missed)
    return (
        layout_name(candidate.layout),
        held,
        f"{candidate.chunk}" if candidate.fits else "-",
        *(found.get(name, "-") for name in _COLUMNS.values()),
    )
