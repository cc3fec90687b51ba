"""What was required and claimed of a deployment, against what is found. Imports no JAX."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.costs.figure import Band, Figure
from llama_jax.plan.report.document import Cell, Table
from llama_jax.plan.report.judgement import Limit, Verdict, overall
from llama_jax.plan.report.quantities import band_text

HOW_TO_READ = (
    "`found` is by arithmetic, with its band in parentheses; `simulated` is what the engine's "
    "scheduler does with the expected times of ticks. A verdict counts both: `holds` and `fails` "
    "are certain within the band, `likely` and `unlikely` follow the expected value. The "
    "percentage is the room that is left, and `floor` is what no program can beat."
)


@dataclass(frozen=True)
class Claim:
    """One row of the targets.

    Attributes:
      what: its name.
      found: the figure.
      required: what it must keep; None for nothing.
      claimed: what was claimed of it; None for nothing.
      floor: what no program can beat; None where there is no such limit.
      simulated: the same by simulation; None without one. Both must keep a limit.
    """

    what: str
    found: Figure
    required: Limit | None = None
    claimed: Limit | None = None
    floor: Figure | None = None
    simulated: Figure | None = None

    @property
    def required_verdict(self) -> Verdict | None:
        """Whether the requirement is kept; None without one."""
        return self._verdict(self.required)

    @property
    def claimed_verdict(self) -> Verdict | None:
        """Whether the claim holds; None without one."""
        return self._verdict(self.claimed)

    def _verdict(self, limit: Limit | None) -> Verdict | None:
        if limit is None:
            return None
        figures = [figure for figure in (self.found, self.simulated) if figure is not None]
        return overall([limit.judge(figure) for figure in figures])

    def verdict_text(self, limit: Limit | None) -> str:
        """The verdict on a limit, and the room that the expected values leave, as a share of it.

        "" for no limit. Negative room is missing.
        """
        verdict = self._verdict(limit)
        if limit is None or verdict is None:
            return ""
        figures = [figure for figure in (self.found, self.simulated) if figure is not None]
        return f"{verdict}{_room(limit, figures)}"


def claim_table(claims: Sequence[Claim], caption: str = "") -> Table:
    """Every claim in a row; columns without content are left out."""
    columns: dict[str, list[Cell]] = {
        "target": [claim.what for claim in claims],
        "found": [claim.found for claim in claims],
        "simulated": [claim.simulated or "" for claim in claims],
        "kept?": [claim.verdict_text(claim.required) for claim in claims],
        "required": [limit_text(claim.required, claim.found) for claim in claims],
        "claim holds?": [claim.verdict_text(claim.claimed) for claim in claims],
        "claimed": [limit_text(claim.claimed, claim.found) for claim in claims],
        "floor": [claim.floor or "" for claim in claims],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    rows: list[tuple[Cell, ...]] = list(zip(*kept.values(), strict=True))
    return Table("targets", tuple(kept), tuple(rows), caption)


def limit_text(limit: Limit | None, figure: Figure) -> str:
    """A limit with its unit: "≤ 500 ms"; "" for none."""
    if limit is None:
        return ""
    sign = "≥" if limit.at_least else "≤"
    return f"{sign} {band_text(Band.exactly(limit.bound), figure.unit)}"


def verdict_text(limit: Limit, figure: Figure) -> str:
    """What the figure says of a limit, and the room that its expected value leaves, as a share."""
    return f"{limit.judge(figure)}{_room(limit, [figure])}"


def _room(limit: Limit, figures: Sequence[Figure]) -> str:
    """The least room of some figures, as a share of the limit: ": +24 %"."""
    if not limit.bound:
        return ""
    margin = min(limit.margin(figure.value.expected) for figure in figures)
    if not math.isfinite(margin):
        return ": overloaded"
    digits = 0 if abs(margin) >= 0.0095 else 1
    return f": {100 * margin:+.{digits}f} %"


def names_text(names: Sequence[str]) -> str:
    """A list in a sentence: "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
