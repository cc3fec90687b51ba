"""The layouts of a model in order: what is promised of them, whatever the times of the ticks."""

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Layout
from llama_jax.costs.gpus import GPUS, find_gpu
from llama_jax.plan.candidate import FIRST_SEQUENCES, Candidate
from llama_jax.plan.frontier import frontier, points
from llama_jax.plan.headroom import headrooms
from llama_jax.plan.plan import Plan, Question, make_plan
from llama_jax.plan.price import cost_per_million
from llama_jax.plan.reasons import ONE_HOST, remedies, verdict, why
from llama_jax.plan.recommend import recommend
from llama_jax.plan.replica import LEVELS
from llama_jax.plan.targets import Targets, Workload

TARGETS = Targets(ttft=0.5, tpot=0.05, memory_share=0.85)


def question(gpus: int = 8, rate: float = 8.0, **more) -> Question:
    asked = Question(
        "llama3-70b",
        LlamaConfig.llama3_70b(),
        find_gpu("h100-sxm"),
        gpus,
        Workload(1024, 256, rate),
        TARGETS,
    )
    return replace(asked, **more)


@cache
def reference() -> Plan:
    """The plan of the question, made once."""
    return make_plan(question())


@pytest.mark.parametrize("rate", [8.0, 11.0])
def test_the_best_comes_first(rate):
    """At 11 requests/s, 4x2 keeps up with the most as expected, but not with the slowest ticks."""
    plan = reference() if rate == 8.0 else make_plan(question(rate=rate))
    held = [candidate.holds for candidate in plan.candidates]
    assert held == sorted(held, reverse=True) and held[0]
    surely = [candidate.holds_surely for candidate in plan.candidates if candidate.holds]
    assert surely == sorted(surely, reverse=True)
    for candidate in plan.candidates:
        assert candidate.holds_surely == (candidate.rate <= candidate.max_rate.low)
    assert (plan.best.layout == Layout(4, 2)) == (rate == 8.0)
    rates = [c.max_rate.expected for c in plan.candidates if c.holds_surely]
    assert rates == sorted(rates, reverse=True)


def test_the_nearest_is_the_one_that_keeps_the_targets_at_the_highest_rate():
    """8x1 keeps up with more requests than the others, but never keeps the TPOT."""
    found = [c for c in make_plan(question(rate=100.0)).candidates if c.fits]
    rates = [candidate.max_rate.expected for candidate in found]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1] == 0
    assert not any(candidate.holds for candidate in found)
    hopeless = [candidate for candidate in found if not candidate.max_rate.expected]
    excess = [candidate.missed[0].excess for candidate in hopeless]
    assert len(excess) > 1 and excess == sorted(excess)


def test_a_rate_that_no_number_of_gpus_keeps_has_remedies():
    assert list(remedies(make_plan(question(rate=1e9))))


@pytest.mark.parametrize("gpus", [8, 16])
def test_a_model_that_no_host_holds_gets_formats_and_gpus_that_do(gpus):
    config = LlamaConfig.llama3_1_405b()
    plan = make_plan(question(gpus=gpus, rate=1.0, config=config))
    assert not any(candidate.fits for candidate in plan.candidates)
    excess = [candidate.missed[0].excess for candidate in plan.candidates]
    assert excess == sorted(excess)
    found = " ".join(remedies(plan))
    assert "fp8" in found and "h200" in found and recommend(plan.question).gpus is None
    # The smallest GPU that will do, and it does.
    assert make_plan(replace(plan.question, gpu=find_gpu("h200"))).best.fits
    smaller = [g for g in GPUS.values() if g.memory_bytes < find_gpu("h200").memory_bytes]
    held = [make_plan(replace(plan.question, gpu=g)) for g in smaller if g.platform == "gpu"]
    assert held and not any(c.fits for other in held for c in other.candidates)
    assert (ONE_HOST in verdict(plan)) == (gpus == 16)


def test_the_reasons_are_those_of_the_best_the_next_and_the_reference():
    plan = make_plan(question(targets=Targets(ttft=0.5, tpot=0.03, memory_share=0.85)))
    assert plan.best.layout != Layout(4, 2)
    told = " ".join(why(plan))
    for layout in (plan.best.layout, plan.candidates[1].layout, Layout(4, 2)):
        assert f"{layout}: " in told


def test_the_highest_rate_is_where_the_targets_end():
    for candidate in reference().candidates:
        most = candidate.max_rate
        assert most.low <= most.expected <= most.high
        for level, rate in (("high", most.low), ("expected", most.expected), ("low", most.high)):
            each = rate / candidate.layout.replicas
            if rate:
                assert candidate.replica.holds(each, level)
            assert not candidate.replica.holds(1.02 * each + 1e-2, level)


def test_a_candidate_misses_nothing_exactly_if_it_is_within_its_targets():
    for rate in (2.0, 16.0):
        for candidate in make_plan(question(rate=rate)).candidates:
            state = candidate.state()
            within = state.ttft <= TARGETS.ttft and state.tpot <= TARGETS.tpot
            assert candidate.holds == (candidate.fits and within)
            assert all(missed.excess > 1 for missed in candidate.missed)


def test_there_is_room_for_as_many_sequences_as_may_live():
    for candidate in reference().candidates:
        for level in LEVELS:
            state = candidate.state(level)
            assert state.overload or candidate.max_num_seqs >= state.most_live
        if candidate.holds:
            replica, peak = candidate.replica, candidate.peak_rate / candidate.layout.replicas
            assert candidate.rate <= candidate.peak_rate <= candidate.max_rate.expected
            live = replica.state(peak, replica.best_chunk(peak)).most_live
            assert candidate.max_num_seqs >= live
        assert candidate.max_num_seqs <= max(1, candidate.replica.max_live)
        count = candidate.max_num_seqs
        assert count.bit_count() == 1 or count == candidate.replica.max_live
    assert question(rate=1e-3).candidate(Layout(4, 2)).max_num_seqs == FIRST_SEQUENCES


@pytest.mark.parametrize("targets", [TARGETS, Targets(0.01, 0.01, 0.85)])
def test_replicas_keep_up_with_as_many_times_the_rate_of_one(targets):
    one, two = (
        question(gpus=gpus, rate=rate, targets=targets).candidate(layout).missed[0]
        for gpus, rate, layout in ((4, 500.0, Layout(2, 2)), (8, 1000.0, Layout(2, 2, 2)))
    )
    assert (one.target, two.target, two.overload) == ("rate", "rate", one.overload)
    assert two.value == pytest.approx(2 * one.value) and one.value > 0 and one.overload
    assert one.excess == pytest.approx(500 / one.value)
    alone, shared = (
        question(rate=rate).candidate(layout).state()
        for rate, layout in ((2.0, Layout(2, 2)), (4.0, Layout(2, 2, 2)))
    )
    assert alone == shared


def test_the_worst_miss_comes_first():
    for ttft, tpot, worst in ((0.01, 0.03, "TTFT"), (0.1, 0.003, "TPOT")):
        asked = question(targets=Targets(ttft, tpot, 0.85))
        missed = asked.candidate(Layout(4, 2)).missed
        assert len(missed) == 2 and missed[0].target == worst
        assert missed[0].excess > missed[1].excess
        # What falls behind as well misses them even with a request that is alone.
        behind = replace(asked, workload=Workload(1024, 256, 1e3)).candidate(Layout(4, 2)).missed
        assert {"rate", worst} <= {each.target for each in behind}
        assert all(each.value < float("inf") for each in behind)


def test_weights_and_cache_are_divided_by_stages_and_ranks():
    """Every GPU of 8 holds an eighth, however they are laid out; replicas divide nothing."""
    plan = reference()
    whole = make_plan(question(gpus=1, gpu=GPUS["b200"])).best.memory
    for candidate in plan.candidates:
        memory, layout = candidate.memory, candidate.layout
        mesh = layout.num_stages * layout.num_ranks
        assert memory.token * mesh == whole.token
        matrices = memory.weights["matrices"] * mesh
        assert matrices == whole.weights["matrices"]
        assert memory.allowed == int(0.85 * candidate.deployment.gpu.memory_bytes)
        used = sum(memory.weights.values()) + memory.cache + memory.temporaries
        assert used <= memory.allowed or memory.cache == 0
        assert memory.tokens * memory.token <= memory.cache


FASTER = {
    "bandwidth": lambda gpu, k: replace(gpu, bandwidth=k * gpu.bandwidth),
    "flops": lambda gpu, k: replace(gpu, flops={n: k * f for n, f in gpu.flops.items()}),
    "memory": lambda gpu, k: replace(gpu, memory_bytes=int(k * gpu.memory_bytes)),
    "links": lambda gpu, k: replace(gpu, link_bandwidth=k * gpu.link_bandwidth),
}


@given(
    what=st.sampled_from(sorted(FASTER)),
    factor=st.floats(1.0, 3.0),
    kind=st.sampled_from(["a100-80", "l40s", "b200"]),
)
def test_a_better_gpu_never_slows_a_plan(what, factor, kind):
    layout, config = Layout(2, 2), LlamaConfig.llama3_1_8b()
    asked = question(4, gpu=GPUS[kind], config=config, layout=layout)
    better = replace(asked, gpu=FASTER[what](asked.gpu, factor))
    before, after = asked.candidate(layout).replica, better.candidate(layout).replica
    assert after.max_rate() >= before.max_rate() * (1 - 2e-3)
    assert after.memory.tokens >= before.memory.tokens


def test_the_fewest_gpus_are_enough_and_one_fewer_are_not():
    fewest = recommend(question(rate=20.0))
    assert fewest.gpus is not None and fewest.gpus_surely >= fewest.gpus
    assert fewest.plan.best.holds and fewest.plan.question.gpus == fewest.gpus
    for gpus in range(fewest.gpus // 2, fewest.gpus):
        assert not make_plan(question(gpus, rate=20.0)).best.holds


def test_no_number_of_gpus_makes_a_token_faster_than_a_tick():
    fewest = recommend(question(targets=Targets(ttft=0.5, tpot=0.002)))
    assert fewest.gpus is None
    assert fewest.plan.best.missed[0].target == "TPOT"


def test_a_layout_that_is_fixed_is_only_repeated():
    fewest = recommend(question(rate=40.0, layout=Layout(4, 2)))
    assert fewest.plan.best.layout == Layout(4, 2, fewest.gpus // 8) and fewest.gpus > 8


def test_the_limits_are_where_the_plan_breaks():
    asked = question()
    best = reference().best
    limits = headrooms(asked, best)
    found = {headroom.what: headroom for headroom in limits}
    assert set(found) == {"rate", "prompt length", "launch gap", "memory"}
    factors = [headroom.factor for headroom in limits]
    assert factors == sorted(factors) and factors[0] >= 1

    def holds(**workload) -> bool:
        changed = replace(asked, workload=replace(asked.workload, **workload))
        return changed.candidate(best.layout).holds

    length, rate = found["prompt length"].limit, found["rate"].limit
    assert holds(prompt_tokens=length) and not holds(prompt_tokens=int(1.02 * length) + 64)
    assert holds(rate=rate) and not holds(rate=1.02 * rate)
    gap = found["launch gap"].limit - found["launch gap"].now
    assert Candidate(best.replica.variant(gap=0.98 * gap), 8.0).holds
    assert not Candidate(best.replica.variant(gap=1.1 * gap), 8.0).holds


def test_the_frontier_is_what_no_other_point_beats():
    """Brute force over all points."""
    found = points(reference())
    best = frontier(found)
    assert best and {point.layout for point in found} > {Layout(8, 1)}
    for point in found:
        beaten = any(
            other.user >= point.user and other.gpu >= point.gpu
            and (other.user, other.gpu) != (point.user, point.gpu)
            for other in found
        )  # fmt: skip
        assert beaten != any((b.user, b.gpu) == (point.user, point.gpu) for b in best)


def test_a_price_is_shared_by_the_tokens():
    """8 GPUs at 2 an hour cost 16 for 3,600 x 8 x 256 tokens."""
    candidate = reference().best
    assert cost_per_million(candidate, 2.0, 8.0) == pytest.approx(16 / (3600 * 8 * 256) * 1e6)
    assert cost_per_million(candidate, 2.0, 16.0) == cost_per_million(candidate, 1.0, 8.0)
