"""A plan as JSON: the same question gives the same text, byte for byte. Imports no JAX."""

import math
from typing import Any

from llama_jax.costs.collectives import Collective
from llama_jax.costs.deployment import Layout
from llama_jax.costs.figure import Figure
from llama_jax.plan.candidate import Candidate
from llama_jax.plan.figures import PARTS, PER_TOKEN, figures, tick_work
from llama_jax.plan.frontier import Point, frontier, points
from llama_jax.plan.headroom import headrooms
from llama_jax.plan.plan import Plan, Question
from llama_jax.plan.reasons import OUT_OF_SCOPE, breaks_first, remedies, verdict, why
from llama_jax.plan.recommend import Recommendation
from llama_jax.plan.serving import Serving

DIGITS = 9  # of a number that is not whole


def plan_json(
    plan: Plan,
    server: Serving | None,
    price: float | None = None,
    fewest: Recommendation | None = None,
) -> dict[str, Any]:
    """The content of a plan's JSON; infinite figures are null, units are in the names or beside.

    Args:
      plan, server, price, fewest: as of `llama_jax.plan.table.show_plan`.
    """
    best = plan.best
    found = headrooms(plan.question, best) if best.holds else ()
    content: dict[str, Any] = {
        "question": question_json(plan.question),
        "met": best.holds,
        "met_with_slowest_ticks": best.holds_surely,
        "verdict": verdict(plan),
        "why": list(why(plan)),
        "breaks_first": [
            {**headroom._asdict(), "factor": headroom.factor, "text": text}
            for headroom, text in zip(found, breaks_first(found), strict=True)
        ],
        "server": None if server is None else {"command": server.command, "notes": server.notes},
        "remedies": [] if best.holds else list(remedies(plan)),
        "layouts": [candidate_json(candidate, price) for candidate in plan.candidates],
        "frontier": [point_json(point) for point in frontier(points(plan))],
        "out_of_scope": OUT_OF_SCOPE,
    }
    if fewest is not None:
        content["question"]["requests_per_second"] = fewest.rate
        content["recommendation"] = {
            "layouts_at_requests_per_second": plan.question.workload.rate,
            "gpus": fewest.gpus,
            "gpus_with_slowest_ticks": fewest.gpus_surely,
        }
    finite: dict[str, Any] = _finite(content)
    return finite


def question_json(question: Question) -> dict[str, Any]:
    """What was asked."""
    workload, targets = question.workload, question.targets
    return {
        "model": question.model,
        "weights": question.deployment(Layout(1, 1)).weights,
        "kv_cache_dtype": question.kv_cache_dtype,
        "gpu": question.gpu.name,
        "gpus": question.gpus,
        "prompt_tokens": workload.prompt_tokens,
        "output_tokens": workload.output_tokens,
        "requests_per_second": workload.rate,
        "ttft_seconds": targets.ttft,
        "tpot_seconds": targets.tpot,
        "memory_share": targets.memory_share,
        "share_inside": targets.inside,
    }


def candidate_json(candidate: Candidate, price: float | None = None) -> dict[str, Any]:
    """A layout and its figures."""
    layout, model = candidate.layout, candidate.replica.model
    used = {
        name: model.collectives(tick_work(candidate, chunk))
        for name, chunk in zip(PARTS, (0, candidate.chunk), strict=True)
    }
    found: dict[str, Any] = {
        name: figure_json(figure) for name, figure in figures(candidate, price).items()
    }
    if not candidate.replica.workload.has_tpot:
        found |= dict.fromkeys(PER_TOKEN)
    return {
        "layout": str(layout),
        "stages": layout.num_stages,
        "ranks": layout.num_ranks,
        "replicas": layout.replicas,
        "gpus": layout.gpus,
        "holds": candidate.holds,
        "holds_with_slowest_ticks": candidate.holds_surely,
        "missed": [{**missed._asdict(), "excess": missed.excess} for missed in candidate.missed],
        "max_chunk_tokens": candidate.max_chunk,
        "max_num_seqs": candidate.max_num_seqs,
        "figures": found,
        "collectives": {
            f"{name} tick": [collective_json(entry) for entry in found]
            for name, found in used.items()
            if candidate.fits
        },
    }


def figure_json(figure: Figure) -> dict[str, Any]:
    """A figure, its unit and how it is known."""
    band = figure.value
    return {
        "low": band.low,
        "expected": band.expected,
        "high": band.high,
        "unit": figure.unit,
        "evidence": figure.evidence.value,
        "source": figure.source,
    }


def collective_json(used: Collective) -> dict[str, Any]:
    """The collectives of one kind in a tick."""
    return {
        "for": used.what,
        "kind": used.kind,
        "count": used.count,
        "ranks": used.ranks,
        "bytes_each": used.bytes,
        "in_all": figure_json(Figure(used.seconds, "s", used.evidence, used.source)),
    }


def point_json(point: Point) -> dict[str, Any]:
    """A point of the frontier."""
    return {
        "layout": str(point.layout),
        "chunk_tokens": point.chunk,
        "requests_per_second": point.rate,
        "live_sequences": point.live,
        "output_tokens_per_second_per_user": point.user,
        "output_tokens_per_second_per_gpu": point.gpu,
        "mean_ttft_seconds": point.ttft,
    }


def _finite(value: Any) -> Any:
    """The same content to `DIGITS`, with null for numbers that JSON does not have.

    The last bits of a sum differ between versions of Python.
    """
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
