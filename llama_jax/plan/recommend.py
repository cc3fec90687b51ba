"""The fewest GPUs for a rate and targets. Imports no JAX."""

import math
from dataclasses import dataclass, replace

from llama_jax.costs.deployment import Layout
from llama_jax.plan.candidate import ALONE
from llama_jax.plan.layouts import LayoutError, check_layout, meshes
from llama_jax.plan.plan import Plan, Question, make_plan


@dataclass(frozen=True)
class Recommendation:
    """How many GPUs to take.

    Attributes:
      plan: of that many; if no number is enough, of those of the mesh that comes nearest, with
        requests that are alone.
      rate: requests/s that were asked for.
      gpus: their number as expected; None if none is enough.
      gpus_surely: the number if ticks are as long as they may be; None if none is enough.
    """

    plan: Plan
    rate: float
    gpus: int | None
    gpus_surely: int | None


def recommend(question: Question) -> Recommendation:
    """Finds the fewest GPUs on which a layout holds every target at the rate.

    Raises:
      LayoutError: the model cannot be laid out at all, or only on more GPUs than a plan has.
    """
    only = question.layout
    found = [only._replace(replicas=1)] if only else list(meshes(question.config))
    if not found:
        raise LayoutError("The model cannot be laid out on the GPUs of one host.")
    expected = _fewest(question, found, "expected")
    if expected is None:
        alone = replace(question, workload=replace(question.workload, rate=ALONE))
        nearest = min(found, key=lambda mesh: alone.candidate(mesh).order)
        return Recommendation(
            make_plan(_on(alone, nearest, only)), question.workload.rate, None, None
        )
    check_layout(question.config, expected)
    surely = _fewest(question, found, "high")
    plan = make_plan(_on(question, expected, only))
    return Recommendation(plan, question.workload.rate, expected.gpus, surely and surely.gpus)


def recommendation_text(fewest: Recommendation) -> str:
    """How many GPUs to take."""
    gpu = fewest.plan.question.gpu.name
    if fewest.gpus is None:
        return f"No number of {gpu} keeps the targets, even for a request alone."
    text = f"The fewest {gpu} that keep the targets: {fewest.gpus}"
    if fewest.gpus_surely == fewest.gpus:
        return f"{text}, even with the slowest ticks."
    if fewest.gpus_surely is None:
        return f"{text} as expected; with the slowest ticks, no number does."
    return f"{text} as expected, {fewest.gpus_surely} with the slowest ticks."


def _fewest(question: Question, found: list[Layout], level: str) -> Layout | None:
    """The layout that holds the targets with the fewest GPUs; of two, the one with fewer replicas.

    A replica holds the targets at up to some rate, and the rate is shared by as many as that takes.
    """
    enough = []
    for mesh in found:
        most = question.candidate(mesh).replica.max_rate(level)
        if most > 0:
            enough.append(mesh._replace(replicas=math.ceil(question.workload.rate / most)))
    return min(enough, key=lambda layout: (layout.gpus, layout.replicas), default=None)


def _on(question: Question, layout: Layout, only: Layout | None) -> Question:
    """The question for the GPUs of a layout."""
    return replace(question, gpus=layout.gpus, layout=layout if only else None)
