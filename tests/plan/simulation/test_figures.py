"""The figures of simulations, computed by hand."""

from dataclasses import replace

import numpy as np
import pytest
from pytest import approx

from llama_jax.engine.interface import ProgramStats
from llama_jax.plan.simulation.figures import Spread, figures, is_inside, percentile
from llama_jax.plan.simulation.replicas import merged
from llama_jax.plan.simulation.simulated import Moment, Sample, Simulated
from llama_jax.plan.targets import Targets

TARGETS = Targets(ttft=0.5, tpot=0.05)


def sample(at=0.0, first=0.4, last=1.0, n=11, queued=0.1, outcome="completed") -> Sample:
    return Sample(at, queued, first, last, 100, n, 0, outcome)


def simulated(*samples: Sample) -> Simulated:
    return Simulated(
        samples=samples,
        replicas=1,
        seconds=10.0,
        num_stages=4,
        ticks=100,
        busy_seconds=8.0,
        communication_seconds=2.0,
        stage_ticks_busy=300,
        token_slots=1000,
        token_slots_used=700,
        prompt_tokens=900,
        cached_tokens=100,
        generated_tokens=50,
        preemptions=3,
        pages=20,
        page_seconds=50.0,
        programs=(ProgramStats(8, 0, 100, 8.0),),
        moments=(Moment(0.0, 1, 0, 5), Moment(1.0, 2, 1, 16)),
    )


def test_percentiles_are_nearest_ranks():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [percentile(values, p) for p in (1, 20, 21, 50, 60, 61, 99, 100)] == [
        1.0, 1.0, 2.0, 3.0, 3.0, 4.0, 5.0, 5.0,
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    for size in (1, 2, 99, 100, 101):
        drawn = rng.random(size).tolist()
        for percent in (50, 90, 99):
            found = percentile(drawn, percent)
            # By brute force: the least value with at least so many percent not above it.
            fitting = [v for v in drawn if sum(w <= v for w in drawn) * 100 >= percent * size]
            assert found == min(fitting)


def test_the_latencies_of_a_request():
    one = sample(at=2.0, first=2.5, last=4.5, n=5)
    assert (one.ttft, one.tpot, one.e2e) == (0.5, 0.5, 2.5)
    assert sample(n=1).tpot is None
    refused = Sample(1.0, None, None, 1.0, 100, 0, 0, "rejected")
    assert (refused.ttft, refused.tpot, refused.e2e) == (None, None, 0.0)


@pytest.mark.parametrize(
    ("one", "inside"),
    [
        (sample(first=0.5, last=1.0, n=11), True),  # exactly on both targets
        (sample(first=0.51, last=1.0), False),
        (sample(first=0.4, last=1.0, n=12), False),
        (sample(first=0.4, last=9.0, n=1), True),  # one token has no time per token after it
        (sample(outcome="failed"), False),
        (Sample(0.0, None, None, 0.0, 1, 0, 0, "rejected"), False),
    ],
)
def test_a_request_is_inside_both_targets_or_not(one, inside):
    assert is_inside(one, TARGETS) is inside


def test_no_target_is_no_limit():
    assert is_inside(sample(first=100.0, last=1000.0), Targets())


def test_figures_by_hand():
    f = figures(
        simulated(
            sample(at=0.0, first=0.1, last=0.3, n=5, queued=0.05),
            sample(at=1.0, first=1.3, last=1.5, n=5, queued=0.25),
            sample(at=2.0, first=2.9, last=3.3, n=5, queued=0.85),
            Sample(3.0, None, None, 3.0, 100, 0, 0, "rejected"),
            Sample(4.0, 0.1, 4.2, 4.3, 100, 2, 0, "failed"),
        ),
        TARGETS,
    )
    assert (f.requests, f.completed, f.rejected, f.failed, f.gone) == (5, 3, 1, 1, 0)
    assert (f.inside, f.goodput, f.availability) == (approx(2 / 5), approx(0.2), approx(3 / 5))
    assert f.ttft == Spread(approx(1.3 / 3), approx(0.3), approx(0.9), approx(0.9), approx(0.9))
    assert f.tpot is not None and (f.tpot.p50, f.tpot.p99) == (approx(0.05), approx(0.1))
    assert f.e2e is not None and f.e2e.p50 == approx(0.5)
    assert f.queueing is not None and f.queueing.p90 == approx(0.85)
    assert (f.bubble, f.idle, f.slots_used) == (approx(0.25), approx(0.2), approx(0.7))
    assert (f.pool, f.pool_peak) == (approx(50 / 200), approx(16 / 20))
    assert (f.communication, f.cached, f.preemptions) == (approx(0.25), approx(0.1), 3)
    assert f.requests_per_second == approx(0.3) and f.output_tokens_per_second == approx(1.5)


def test_what_replicas_did_is_added_up():
    first, second = simulated(sample(at=1.0)), replace(simulated(sample()), seconds=12.0)
    both = merged(
        [first, replace(second, programs=(ProgramStats(4, 0, 50, 2.0), *second.programs))]
    )
    assert [s.at for s in both.samples] == [0.0, 1.0] and both.seconds == 12.0
    assert {*both.programs} == {ProgramStats(8, 0, 200, 16.0), ProgramStats(4, 0, 50, 2.0)}
    alike = {"num_stages", "pages", "moments"}
    for name in vars(first).keys() - alike - {"samples", "seconds", "programs"}:
        assert getattr(both, name) == 2 * getattr(first, name), name
    assert all(getattr(both, name) == getattr(first, name) for name in alike)


def test_an_engine_that_is_down_is_neither_idle_nor_full():
    """Two engines, of which one was down for 4 of the 10 seconds."""
    f = figures(replace(simulated(), replicas=2, down_seconds=4.0), TARGETS)
    assert (f.idle, f.pool) == (approx(1 - 8 / 16), approx(50 / (20 * 16)))


def test_nothing_has_no_percentiles():
    f = figures(replace(simulated(), ticks=0, stage_ticks_busy=0), TARGETS)
    assert f.ttft is None and f.tpot is None and f.requests == 0 and f.goodput == 0
    assert (f.inside, f.availability, f.bubble) == (1, 1, 0)  # nothing is outside, and none waits
