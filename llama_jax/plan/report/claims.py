"""What was required and claimed of a deployment, against what is found. Imports no JAX."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.costs.figure import Band, Figure
from llama_jax.plan.report.document import Cell, Table
from llama_jax.plan.report.judgement import Limit, Verdict
from llama_jax.plan.report.quantities import band_text


@dataclass(frozen=True)
class Claim:
    """One row of the targets.

    Attributes:
      what: its name.
      found: the figure.
      required: what it must keep; None for nothing.
      claimed: what was claimed of it; None for nothing.
      floor: what no program can beat; None where there is no such limit.
    """

    what: str
    found: Figure
    required: Limit | None = None
    claimed: Limit | None = None
    floor: Figure | None = None

    @property
    def required_verdict(self) -> Verdict | None:
        """Whether the requirement is kept; None without one."""
        return self.required.judge(self.found) if self.required else None

    @property
    def claimed_verdict(self) -> Verdict | None:
        """Whether the claim holds; None without one."""
        return self.claimed.judge(self.found) if self.claimed else None


def claim_table(claims: Sequence[Claim], caption: str = "") -> Table:
    """Every claim in a row; columns without content are left out."""
    columns: dict[str, list[Cell]] = {
        "target": [claim.what for claim in claims],
        "found": [claim.found for claim in claims],
        "kept?": [verdict_text(claim.required, claim.found) for claim in claims],
        "required": [limit_text(claim.required, claim.found) for claim in claims],
        "claim holds?": [verdict_text(claim.claimed, claim.found) for claim in claims],
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


def verdict_text(limit: Limit | None, figure: Figure) -> str:
    """What the figure says of a limit, and the room that its expected value leaves, as a share.

    "" for no limit. Negative room is missing.
    """
    if limit is None:
        return ""
    verdict, margin = limit.judge(figure), limit.margin(figure.value.expected)
    if not limit.bound:
        return str(verdict)
    if not math.isfinite(margin):
        return f"{verdict}: overloaded"
    digits = 0 if abs(margin) >= 0.0095 else 1
    return f"{verdict}: {100 * margin:+.{digits}f} %"


def names_text(names: Sequence[str]) -> str:
    """A list in a sentence: "a, b and c"."""
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
