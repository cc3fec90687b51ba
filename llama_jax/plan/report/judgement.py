"""Whether a figure keeps a limit, when the figure is a band. Imports no JAX."""

from dataclasses import dataclass
from enum import StrEnum

from llama_jax.costs.figure import Figure


class Verdict(StrEnum):
    """What a band says of a limit."""

    HOLDS = "holds"  # the whole band keeps it
    LIKELY = "likely"  # the expected value keeps it, one end does not
    UNLIKELY = "unlikely"  # the expected value breaks it, one end keeps it
    FAILS = "fails"  # no part of the band keeps it


@dataclass(frozen=True)
class Limit:
    """A bound in the unit of the figure that it is for.

    Attributes:
      bound: the last value that keeps it.
      at_least: whether larger values keep it; else smaller ones do.
    """

    bound: float
    at_least: bool = False

    def judge(self, figure: Figure) -> Verdict:
        """What the figure says of this limit."""
        low, expected, high = (
            self.margin(value) >= 0
            for value in (figure.value.low, figure.value.expected, figure.value.high)
        )
        if low and high:
            return Verdict.HOLDS
        if expected:
            return Verdict.LIKELY
        return Verdict.UNLIKELY if low or high else Verdict.FAILS

    def margin(self, value: float) -> float:
        """How much room a value leaves, as a share of the bound; negative if it breaks it."""
        room = value - self.bound if self.at_least else self.bound - value
        return room / self.bound if self.bound else room


def overall(verdicts: list[Verdict]) -> Verdict:
    """The weakest of several verdicts."""
    order = list(Verdict)
    return max(verdicts, key=order.index, default=Verdict.HOLDS)
