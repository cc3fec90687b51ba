"""The reference deployment: every promised figure is there, and verdicts follow from the tables."""

from dataclasses import replace

import pytest
from pytest import approx

from llama_jax.costs.figure import Evidence
from llama_jax.costs.gpus import GPUS
from llama_jax.plan.__main__ import main
from llama_jax.plan.report import reference
from llama_jax.plan.report.judgement import Verdict
from llama_jax.plan.report.outlook import MOST_INSIDE, Outlook
from llama_jax.plan.report.reference import typical_claims
from llama_jax.plan.report.reference_conditions import alone_section, bandwidth_needed
from llama_jax.plan.report.reference_question import CLAIMED, LAYOUT, LENGTHS, outlook, question
from llama_jax.plan.targets import Targets

TTFT, TPOT, RATE = "time to first token", "time per output token", "highest rate within 500 / 50 ms"


def with_bandwidth(monkeypatch, factor):
    gpu = GPUS["h100-sxm"]
    monkeypatch.setitem(GPUS, "h100-sxm", replace(gpu, bandwidth=factor * gpu.bandwidth))


def claims():
    return {claim.what: claim for claim in typical_claims()}


def test_every_deployment_target_is_a_row():
    found = claims()
    assert len(found) == 15
    assert {found[name].required.bound for name in (TTFT, TPOT, RATE)} == {0.5, 0.05, 8}
    assert {found[name].claimed.bound for name in (TTFT, TPOT, RATE)} == {0.25, 0.025, 10}
    weights = found["weights per GPU"]
    assert weights.found.value.expected == pytest.approx(17.64e9, rel=1e-3)
    assert weights.claimed_verdict is Verdict.FAILS  # 17.5 GB: by 0.8 %
    assert found["communication share"].found.value.expected > 0.02


def test_the_claimed_time_per_token_fails_in_bf16_at_the_bandwidth_of_the_data_sheet():
    assert claims()[TPOT].claimed_verdict is Verdict.FAILS
    assert claims()[TPOT].required_verdict is Verdict.HOLDS
    alone, beside, late = bandwidth_needed("bf16")
    assert 0.82 < alone < 0.84 and 0.88 <= beside <= 0.90 and late > 0.95
    assert bandwidth_needed("fp8")[1] == pytest.approx(0.45, abs=0.01)


@pytest.mark.parametrize(
    ("factor", "required", "claimed"),
    [(0.5, Verdict.FAILS, Verdict.FAILS), (4, Verdict.HOLDS, Verdict.HOLDS)],
)
def test_another_bandwidth_in_the_table_changes_the_verdicts(
    monkeypatch, factor, required, claimed
):
    before = bandwidth_needed("bf16")[0]
    with_bandwidth(monkeypatch, factor)
    assert claims()[TPOT].required_verdict is required
    assert claims()[TPOT].claimed_verdict is claimed
    assert bandwidth_needed("bf16")[0] == pytest.approx(before / factor)


def test_no_figure_is_better_than_its_floor():
    for claim in typical_claims():
        if claim.floor is not None:
            assert claim.floor.value.expected < claim.found.value.low
    for row in alone_section().tables[0].rows:
        assert row[1].value.expected < row[2].value.low
        assert row[4].value.expected < row[5].value.low


def test_a_request_alone_has_the_chunk_that_suits_it():
    seen = outlook()
    replica = seen.replica
    times = [replica.tick(1, size).expected * (-(-1024 // size) + 3) for size in replica.chunks]
    assert seen.alone_ttft.value.expected == min(times) < max(times)


def test_the_share_inside_is_that_of_each_replica():
    """TTFT of 200 ms at 10 requests/s, which the wait of some prompts exceeds."""
    asked = question(rate=10.0, targets=Targets(0.2, 0.05, 0.85))
    found = asked.candidate(LAYOUT)
    inside = Outlook(found).inside.value
    assert 0.5 < inside.expected < 0.99 and inside.low < inside.expected < inside.high
    assert inside == Outlook(replace(found, rate=20.0, replicas=2)).inside.value
    # A steady state says nothing of what is rarer than one of 10,000.
    assert Outlook(replace(found, rate=1e-3)).inside.value.high == MOST_INSIDE < 1


@pytest.mark.parametrize("tokens", [1024, 2048])
def test_the_floor_of_a_prompt_is_that_of_chunks_of_whatever_sizes(tokens):
    """By hand: 68.452 G parameters in the layers, 8,192 numbers in the queries of each."""
    flop = 2 * 68.452e9 * tokens + 4 * 8192 * 80 * tokens**2 / 2
    read = (17.1128e9 + 0.2627e9 + tokens * 40960) / 3.35e12  # weights of a stage, head and keys
    found = outlook((tokens, 128)).floor_ttft
    assert found == approx(flop / 8 / 989e12 + 3 * read, rel=0.01)


def test_what_arithmetic_cannot_say_is_simulated(monkeypatch):
    """A tail and a goodput depend on who meets whom: the scheduler decides that."""
    monkeypatch.setattr(reference, "SIMULATED_SECONDS", 6.0)
    slow = [reference.simulated(10, CLAIMED) for _ in range(2)]
    assert slow[0] == slow[1]
    found = {c.what: c for c in typical_claims(None, None, slow[0])}
    kept, broken = (
        found[f"goodput within {latencies} ms, of 10 requests/s"]
        for latencies in ("500 / 50", "250 / 25")
    )
    assert broken.claimed_verdict is Verdict.FAILS and broken.simulated.value.expected == 0
    assert broken.simulated.evidence is Evidence.SIMULATED
    assert kept.claimed_verdict is not Verdict.FAILS and kept.claimed.bound == approx(9.9)


def test_without_arguments_the_reference_deployment_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(reference, "SIMULATED_SECONDS", 3.0)
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "simulated" in printed
    for title in ("Targets", "One request alone", "Under load", "Utilization", "Assumptions"):
        assert f"\n{title}" in printed
    for lengths in LENGTHS:
        assert f"{lengths[0]}/{lengths[1]}, 10/s" in printed
