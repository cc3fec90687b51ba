"""What breaks first when more is asked of a layout. Imports no JAX."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from llama_jax.plan.bisection import largest
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.plan import Question


class Headroom(NamedTuple):
    """How far one thing may grow, all others being equal, until a target is missed.

    Attributes:
      what: "rate", "prompt length", "launch gap" or "memory".
      now: its value, in `unit`; of the launch gap, the tick that it lengthens.
      limit: the largest with which every target holds.
      unit: "requests/s", "tokens", "s" or "tokens".
      then: the target that is missed beyond; "" if it is the model's context that ends it.
    """

    what: str
    now: float
    limit: float
    unit: str
    then: str

    @property
    def factor(self) -> float:
        """By which it may grow."""
        return self.limit / self.now if self.now else float("inf")


def headrooms(question: Question, candidate: Candidate) -> tuple[Headroom, ...]:
    """How far the load and the ticks may grow until a layout breaks, the nearest first.

    Args:
      question: that is answered.
      candidate: a layout in which every target holds.
    """
    replica, load = candidate.replica, question.workload

    def at_rate(rate: float) -> Candidate:
        return replace(candidate, rate=rate)

    def at_length(tokens: float) -> Candidate:
        workload = replace(load, prompt_tokens=int(tokens))
        return replace(candidate, replica=replica.variant(workload))

    def at_tick(seconds: float) -> Candidate:
        return replace(candidate, replica=replica.variant(gap=max(0.0, seconds - tick)))

    tick = candidate.state().chunk_tick
    longest = question.config.max_context - load.output_tokens
    rate = candidate.max_rate.expected
    length = min(_largest(at_length, load.prompt_tokens, longest), longest)
    slowest = _largest(at_tick, tick)
    return tuple(
        sorted(
            (
                Headroom("rate", load.rate, rate, "requests/s", _missed(at_rate(1.01 * rate))),
                Headroom(
                    "prompt length",
                    load.prompt_tokens,
                    int(length),
                    "tokens",
                    _missed(at_length(1.01 * length)) if length < longest else "",
                ),
                Headroom("launch gap", tick, slowest, "s", _missed(at_tick(1.01 * slowest))),
                Headroom(
                    "memory", candidate.kv_needed, candidate.memory.tokens, "tokens", "memory"
                ),
            ),
            key=lambda headroom: headroom.factor,
        )
    )


def _largest(
    candidate: Callable[[float], Candidate], now: float, most: float = float("inf")
) -> float:
    """The largest value at which the targets hold, of those up to `most`."""
    return max(now, largest(lambda value: value <= most and candidate(value).holds, now))


def _missed(candidate: Candidate) -> str:
    return candidate.missed[0].target if candidate.missed else ""
