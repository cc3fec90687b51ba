"""What a plan comes to, in sentences whose figures are computed. Imports no JAX."""

from collections.abc import Iterator
from dataclasses import replace

from llama_jax.costs.deployment import Layout
from llama_jax.costs.gpus import GPUS, Gpu
from llama_jax.plan.candidate import Candidate, Missed
from llama_jax.plan.figures import communication, tick_work
from llama_jax.plan.headroom import Headroom
from llama_jax.plan.layouts import HOST_GPUS, LayoutError
from llama_jax.plan.numbers import amount, number
from llama_jax.plan.plan import Plan, Question, make_plan
from llama_jax.plan.recommend import recommend
from llama_jax.plan.replica import MAX_LIVE
from llama_jax.terminal.units import bytes_text, count_text

REFERENCE_MESH = (4, 2)
MANY_TIMES = 2.0  # from where a miss reads better as a multiple than in percent
_OVERLOADS = {
    "prompts": "prompts arrive faster than they are computed",
    "sequences": "its KV cache is full",
    "limit": f"a replica decodes {MAX_LIVE:,} sequences at once, the most of a plan",
    "latency": "a latency is missed",
}
_GROWN = {
    "rate": "the rate, at",
    "prompt length": "the prompt length, at",
    "launch gap": "the launch gap, at ticks of",
    "memory": "the memory, at a cache of",
}
ONE_HOST = f"A replica runs on one host, of at most {HOST_GPUS} GPUs."
OUT_OF_SCOPE = "Not planned: disaggregated prefill, mixtures of experts (MoE), power."


def verdict(plan: Plan) -> str:
    """Whether a layout holds the targets, and what is missing if none does."""
    best, question = plan.best, plan.question
    where = f"{question.model} on {question.gpus} x {question.gpu.name}"
    if best.holds_surely:
        return f"{where}: {_keeps(best)} every target, even with the slowest ticks."
    if best.holds:
        return (
            f"{where}: {_keeps(best)} every target as expected, but not with the slowest ticks: "
            f"{_latencies(best, 'high')}."
        )
    missing = ", and ".join(map(missed_text, best.missed))
    if question.layout is not None:
        verb = "misses its" if best.layout.replicas == 1 else "miss their"
        return f"{where}: {best.layout} {verb} targets: {missing}."
    comes, keeps = ("comes", "keeps") if best.layout.replicas == 1 else ("come", "keep")
    most = best.max_rate.expected
    known = not most or any(miss.target == "rate" for miss in best.missed)
    up_to = "" if known else f" and {keeps} them up to {amount(most, 'requests/s')}"
    nearest = f"{best.layout} {comes} nearest{up_to}"
    text = f"{where}: no layout keeps every target. {nearest}: {missing}."
    if question.gpus > HOST_GPUS and not _holds_the_model(plan):
        text += f" {ONE_HOST} More GPUs hold more replicas, not a larger model."
    return text


def _keeps(candidate: Candidate) -> str:
    return f"{candidate.layout} " + ("keeps" if candidate.layout.replicas == 1 else "keep")


def missed_text(missed: Missed) -> str:
    """A target that is missed: "TPOT is 53 ms, 6 % over the target of 50 ms"."""
    value, bound = amount(missed.value, missed.unit), amount(missed.bound, missed.unit)
    if missed.target == "memory":
        return f"memory comes to {value} a GPU, of which {bound} are allowed"
    if missed.target == "KV cache":
        return (
            f"the KV cache of one request comes to {value} a device, and a server on CPUs takes "
            f"{bound} for it unless its --kv-cache-memory says more"
        )
    if missed.target == "rate":
        return f"it keeps up with {value}, not {bound}, before {_OVERLOADS[missed.overload]}"
    if missed.excess >= MANY_TIMES:
        return f"{missed.target} is {value}, {number(missed.excess)} times the target of {bound}"
    percent = number(100 * (missed.excess - 1), 2)
    return f"{missed.target} is {value}, {percent}% over the target of {bound}"


def why(plan: Plan) -> Iterator[str]:
    """Why the best layout is the best, beside the next one and the reference mesh."""
    best, *others = plan.candidates
    if not others:
        return
    if best.holds:
        alike = [c for c in plan.candidates if c.holds and c.holds_surely == best.holds_surely]
        sure = ", even with the slowest ticks" if best.holds_surely else ""
        of = count_text(len(plan.candidates), "layout")
        yield (
            f"{_keeps(best)} the targets up to {amount(best.max_rate.expected, 'requests/s')}, "
            + (
                f"the most of the {len(alike)} of {of} that keep them at this rate{sure}."
                if len(alike) > 1
                else f"alone of {of} at this rate{sure}."
            )
        )
    yield _profile(best)
    shown = others[:1] + [
        candidate
        for candidate in others[1:]
        if candidate.layout[:2] == REFERENCE_MESH and candidate.layout.replicas == 1
    ]
    for other in shown:
        yield _profile(other)


def _profile(candidate: Candidate) -> str:
    """What decides about a layout, in one sentence."""
    if not candidate.fits:
        return f"{candidate.layout}: {missed_text(candidate.missed[0])}."
    parts = [f"{candidate.layout}: {_latencies(candidate)}"]
    layout = candidate.layout
    if candidate.state().overload:
        parts = [f"{layout}: {', and '.join(map(missed_text, candidate.missed))}"]
    weights = bytes_text(sum(candidate.memory.weights.values()))
    parts.append(
        f"a token passes {count_text(layout.num_stages, 'stage')} of "
        f"{count_text(layout.num_ranks, 'GPU')}, each with {weights} of weights"
    )
    model, chunk = candidate.replica.model, candidate.chunk
    shares = (communication(model, tick_work(candidate, size)) for size in (0, chunk))
    parts.append(
        f"communication takes {' and '.join(f'{s.expected:.0%}' for s in shares)} of its ticks "
        "without and with a chunk"
    )
    if candidate.max_rate.expected:
        parts.append(f"targets kept up to {amount(candidate.max_rate.expected, 'requests/s')}")
    return "; ".join(parts) + "."


def _latencies(candidate: Candidate, level: str = "expected") -> str:
    state = candidate.state(level)
    ttft = f"TTFT {amount(state.ttft, 's')}"
    if not candidate.replica.workload.has_tpot:
        return ttft
    return f"{ttft} and TPOT {amount(state.tpot, 's')}"


def breaks_first(found: tuple[Headroom, ...]) -> Iterator[str]:
    """How far each thing may grow, the nearest limit first."""
    for place, headroom in enumerate(found):
        now, limit = (amount(value, headroom.unit) for value in (headroom.now, headroom.limit))
        yield (
            f"{'Breaks first' if place == 0 else 'Then'}: {_GROWN[headroom.what]} {limit}, "
            f"{headroom.factor:.1f} times the {now} of this plan"
            + (f"; beyond, {headroom.then} is missed." if headroom.then else ", the model's limit.")
        )


def remedies(plan: Plan) -> Iterator[str]:
    """What would make the targets hold where no layout does."""
    question = plan.question
    most = _most(plan)
    if most:
        yield f"Up to {amount(most, 'requests/s')}, the targets are kept."
    for what, other in _changes(plan):
        changed = make_plan(other)
        if changed.best.holds:
            yield f"With {what}, {_keeps(changed.best)} them."
        elif _most(changed) > most:
            nearest = max(changed.candidates, key=lambda each: each.max_rate.expected)
            rate = amount(_most(changed), "requests/s")
            yield f"With {what}, {_keeps(nearest)} the targets up to {rate}."
        elif _holds_the_model(changed) and not _holds_the_model(plan):
            missing = ", and ".join(map(missed_text, changed.best.missed))
            yield f"With {what}, the model fits {changed.best.layout}, but {missing}."
    try:
        fewest = recommend(question)
    except LayoutError as error:
        yield str(error)
        return
    if fewest.gpus is not None:
        best = fewest.plan.best
        yield f"On {fewest.gpus} x {question.gpu.name}, {_keeps(best)} them."
    else:
        missing = ", and ".join(map(missed_text, fewest.plan.best.missed))
        yield (
            f"More {question.gpu.name} do not help. {ONE_HOST} Even for a request alone, on "
            f"{fewest.plan.best.layout}, {missing}."
        )


def _most(plan: Plan) -> float:
    """The highest rate at which a layout keeps the targets."""
    return max(candidate.max_rate.expected for candidate in plan.candidates)


def _holds_the_model(plan: Plan) -> bool:
    """Whether the memory of any layout suffices."""
    return any(candidate.fits for candidate in plan.candidates)


def _changes(plan: Plan) -> Iterator[tuple[str, Question]]:
    """Other ways to store weights and cache, and if the model does not fit, larger GPUs."""
    from llama_jax.plan.model import with_weights

    question = plan.question

    if question.config.quantization is None:
        for weights in _formats(question.gpu):
            config = with_weights(question.config, weights)
            yield f"weights in {weights}", replace(question, config=config)
    if question.kv_cache_dtype in ("auto", "bf16"):
        yield "a KV cache in int8", replace(question, kv_cache_dtype="int8")
    if not _holds_the_model(plan) and (gpu := _larger_gpu(question)):
        yield (
            f"{gpu.name} instead of {question.gpu.name}",
            replace(question, gpu=gpu, calibration=None),
        )


def _larger_gpu(question: Question) -> Gpu | None:
    """The GPU with the least memory in which a layout holds the model; None if there is none."""
    for gpu in sorted(GPUS.values(), key=lambda each: each.memory_bytes):
        if gpu.platform != question.gpu.platform or gpu.memory_bytes <= question.gpu.memory_bytes:
            continue
        if question.fp8_activations and "fp8" not in gpu.flops:
            continue
        if _holds_the_model(make_plan(replace(question, gpu=gpu, calibration=None))):
            return gpu
    return None


def _formats(gpu: Gpu) -> tuple[str, ...]:
    return ("fp8", "int4") if "fp8" in gpu.flops else ("int8", "int4")


def layout_name(layout: Layout) -> str:
    """A layout in a narrow column: "4x2", "2 * 4x1"."""
    return layout.mesh if layout.replicas == 1 else f"{layout.replicas} * {layout.mesh}"
