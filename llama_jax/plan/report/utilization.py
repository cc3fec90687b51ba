"""Utilization by four definitions, and which of them a promise can mean. Imports no JAX."""

from llama_jax.costs.figure import Figure
from llama_jax.plan.report.claims import names_text
from llama_jax.plan.report.document import Cell, Section, Table
from llama_jax.plan.report.outlook import Outlook

MEANING = {
    "stages busy": "ticks in which a stage holds a token; what a pipeline bubble lowers",
    "slots used": "tokens computed, of those that the compiled programs have room for",
    "HBM bandwidth": "bytes that must be read, of those that the memory could read",
    "matrix peak": "FLOP for tokens, of those that the matrix units could do",
}


def utilization_section(seen: Outlook, promised: tuple[float, float] | None) -> Section:
    """The four shares at the rate, and at the highest rate that keeps the targets.

    Args:
      seen: the replica at its rate.
      promised: the range that was promised; None for none.
    """
    most = seen.max_rate.value.expected
    full = seen.at_rate(most) if most > 0 else seen
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            meaning,
            seen.utilization.get(name, "overloaded"),
            full.utilization.get(name, "overloaded"),
        )
        for name, meaning in MEANING.items()
    ]
    columns = (
        *("definition", "meaning", f"at {seen.candidate.rate:.3g} requests/s"),
        f"at {most:.3g} requests/s",
    )
    text = [f"The highest rate within the targets is {most:.3g} requests/s."]
    if promised is not None:
        text.append(_promise_text(seen, full, promised))
    return Section(
        "utilization", "Utilization", tuple(text), (Table("shares", columns, tuple(rows)),)
    )


def _promise_text(seen: Outlook, full: Outlook, promised: tuple[float, float]) -> str:
    low, high = promised
    found = []
    for outlook in (seen, full):
        names = [name for name, figure in outlook.utilization.items() if _meets(figure, promised)]
        at = f"at {outlook.candidate.rate:.3g} requests/s"
        found.append(f"{_named(names)} {at}" if names else f"none of the four {at}")
    return (
        f"A GPU utilization of {100 * low:g} to {100 * high:g} % can mean {found[0]}, and "
        f"{found[1]}."
    )


def _meets(figure: Figure, promised: tuple[float, float]) -> bool:
    """Whether the band reaches into the promised range."""
    return figure.value.low <= promised[1] and figure.value.high >= promised[0]


def _named(names: list[str]) -> str:
    return names_text([f"“{name}”" for name in names])
