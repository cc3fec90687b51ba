"""Simulated engines: what they do with loads that can be followed by hand."""

from dataclasses import replace
from itertools import pairwise

import pytest
from pytest import approx

from llama_jax.engine.chunk_choice import ChunkChoice
from llama_jax.engine.tick_times import TickTimes
from llama_jax.plan.simulation.failure import failure
from llama_jax.plan.simulation.figures import figures
from llama_jax.plan.simulation.highest_rate import HighestRate, highest_rate
from llama_jax.plan.simulation.lengths import Lengths
from llama_jax.plan.simulation.load import Draw, Load, Request, Run
from llama_jax.plan.simulation.replicas import simulate
from llama_jax.plan.simulation.server import Server, TickTime
from llama_jax.plan.simulation.simulation import Outage, Simulation
from llama_jax.plan.targets import Targets
from llama_jax.ring.sizes import RingSizes

TICK, CHUNK_TICK = 0.25, 0.5  # exact in binary


def tick_time(work) -> TickTime:
    return TickTime(CHUNK_TICK if work.chunk else TICK, TICK / 8)


def make_server(stages: int = 2, slots: int = 4, pages: int = 64, **more) -> Server:
    sizes = RingSizes(
        num_slots=slots,
        num_pages=pages,
        page_size=16,
        pages_per_sequence=16,
        row_buckets=(1, 2, 4),
        chunk_buckets=(0, 64),
        tile=64,
    )
    chosen = {"host_seconds": 0.0, "results_late": 0, "tick_time": tick_time} | more
    return Server(num_stages=stages, sizes=sizes, max_model_len=256, **chosen)


def test_a_single_request_by_hand():
    """Two chunks enter in ticks 0 and 1; the last leaves two stages in tick 2."""
    result = simulate(make_server(), Load([Request(10.0, 100, 3)]))
    (sample,) = result.samples
    assert result.seconds == sample.last
    assert sample.queued == 0 and sample.first == 10 + 3 * CHUNK_TICK
    assert sample.last - sample.first == 4 * TICK  # each token takes as many ticks as stages
    assert sample.tpot == 2 * TICK and sample.outcome == "completed"


def test_a_tick_lasts_as_long_as_the_slowest_stage():
    """The keys of a packet count in every stage that it passes."""

    def by_keys(work) -> TickTime:
        return TickTime(1.0 if work.row_keys > 50 else 0.125)

    server = make_server(stages=2, tick_time=by_keys)
    load = Load([Request(0.0, 10, 9), Request(0.0, 60, 9)])
    long, _ = sorted(simulate(server, load).samples, key=lambda s: -s.prompt_tokens)
    # Its packet is always in one of the two stages, so that no tick of its answer is short.
    assert long.tpot == 2.0


def test_a_stage_attends_to_the_keys_of_its_packet():
    """A prompt of 100 tokens in two chunks, and a row; numbers are rounded by less than 1 %."""
    works = []

    def seen(work) -> TickTime:
        works.append(work)
        return tick_time(work)

    simulate(make_server(stages=1, tick_time=seen), Load([Request(0.0, 100, 2)]))
    first, second, row = ((w.row_keys, w.chunk_pairs, w.chunk_keys) for w in works)
    assert first == approx((0, 64 * 65 / 2, 64), rel=0.01)
    assert second == approx((0, 36 * 64 + 36 * 37 / 2, 100), rel=0.004)
    assert row == approx((101, 0, 0), rel=0.01)


def test_stages_that_share_their_cores_add_up():
    """Eight keys take a second if all four stages have them, and in one stage a quarter of it."""

    def by_keys(work) -> TickTime:
        return TickTime(work.row_keys / 8, work.row_keys / 16)

    load = Load([Request(0.0, 10, 2)])
    shared, alone = (
        simulate(make_server(stages=4, tick_time=by_keys, shares_cores=shares), load)
        for shares in (True, False)
    )
    # The row has 11 keys, and passes four stages, one after the other.
    assert shared.samples[0].tpot == 4 * (11 / 8) / 4
    assert alone.samples[0].tpot == 4 * (11 / 8)
    assert shared.communication_seconds == approx(alone.communication_seconds / 4)


@pytest.mark.parametrize("late", [0, 1, 3])
def test_the_host_works_while_the_devices_run(late):
    """Results are read late, but answers take no longer while the host keeps ahead."""
    server = make_server(results_late=late, host_seconds=TICK / 4)
    (sample,) = simulate(server, Load([Request(0.0, 10, 20)])).samples
    if late:
        assert sample.tpot == approx(2 * TICK)
    else:  # it begins a tick only when the one before has been read
        assert sample.tpot > 2 * TICK


def test_a_device_that_is_waited_for_adds_the_hosts_time():
    """As a CPU does."""
    server = make_server(host_seconds=TICK / 4, waits=True)
    (sample,) = simulate(server, Load([Request(0.0, 10, 20)])).samples
    assert sample.tpot == approx(2 * (TICK + TICK / 4))


def test_the_host_takes_longer_for_each_token_and_each_request():
    """By hand: with two stages, an answer's token leaves in every second tick."""
    per_token, per_request = TICK / 8, TICK / 2
    server = make_server(
        waits=True, host_seconds_per_token=per_token, host_seconds_per_request=per_request
    )
    (sample,) = simulate(server, Load([Request(0.0, 10, 20)])).samples
    assert sample.tpot == approx(2 * TICK + per_token)
    # The prompt is in both stages, one after the other; its token leaves with it.
    assert sample.first == approx(2 * CHUNK_TICK + per_request + per_token)
    first, _ = simulate(server, Load([Request(0.0, 10, 20)] * 2)).samples
    assert first.first == approx(2 * CHUNK_TICK + 2 * per_request + per_token)


def test_the_front_delays_the_first_token_and_nothing_else():
    load = Load([Request(1.0, 100, 9)])
    (without,), (sample,) = (
        simulate(make_server(front_seconds=front), load).samples for front in (0.0, 0.25)
    )
    assert sample.ttft == without.ttft + 0.25 and sample.queued == without.queued + 0.25
    assert sample.tpot == without.tpot and sample.at == 1.0


def test_communication_is_a_share_of_the_devices_time():
    result = simulate(make_server(), Load([Request(0.0, 10, 50)]))
    assert result.communication_seconds == result.ticks * TICK / 8
    assert result.busy_seconds == sum(p.seconds for p in result.programs)
    assert result.ticks == sum(p.ticks for p in result.programs)


def by_rows(work) -> TickTime:
    """Every row of a packet takes a TICK, and a chunk nothing."""
    return TickTime(TICK * work.rows)


def limited(**targets) -> Server:
    """Eight slots in two packets, whose scheduler knows these targets and the times of ticks."""
    server = make_server(slots=8, tick_time=by_rows, **{"results_late": 1})

    def chunks():
        times = TickTimes(lambda work: by_rows(work).seconds, server.sizes)
        return ChunkChoice(server.sizes, times, **targets)

    return replace(server, chunks=chunks)


def most_running(server: Server, requests: int) -> int:
    simulation = Simulation(server, Load([Request(0.0, 10, 40)] * requests))
    loop = simulation.engine.loop
    found: list[int] = []
    loop.on_tick.append(lambda tick: found.append(loop.scheduler.num_running))
    assert all(sample.outcome == "completed" for sample in simulation.run().samples)
    return max(found)


def test_no_more_run_than_keep_the_target_for_output_tokens():
    """Two stages: 3 rows in a packet of 4 take 8 TICKs a token, and 2 rows take 4."""
    assert most_running(limited(), 8) == 8
    assert most_running(limited(tpot=8 * TICK), 8) == 8
    assert most_running(limited(tpot=5 * TICK), 8) == 4
    assert most_running(limited(tpot=2 * TICK), 8) == 2
    assert most_running(limited(tpot=TICK), 8) == 8  # which not even one row keeps
    found = simulate(limited(tpot=5 * TICK), Load([Request(0.0, 10, 40)] * 8)).samples
    assert max(s.tpot for s in found) <= 5 * TICK


def test_the_limit_yields_to_a_prompt_that_would_be_late():
    assert most_running(limited(tpot=5 * TICK, ttft=1e6), 8) == 4
    assert most_running(limited(tpot=5 * TICK, ttft=4.0), 8) == 8


def test_prompts_that_begin_alike_are_found():
    shared = Run(7, 100)
    requests = [Request(100.0 * i, 120, 2, (shared,)) for i in range(3)]
    found = [s.cached_tokens for s in simulate(make_server(), Load(requests)).samples]
    assert found == [0, 96, 96]  # whole pages of 16
    others = [Request(100.0 * i, 120, 2, (Run(i, 100),)) for i in range(3)]
    assert simulate(make_server(), Load(others)).cached_tokens == 0
    unshared = make_server(prefix_caching=False)
    assert simulate(unshared, Load(requests)).cached_tokens == 0


def test_a_full_queue_refuses():
    """Four slots, and two may wait."""
    server = make_server(max_queue=2)
    outcomes = [s.outcome for s in simulate(server, Load([Request(0.0, 20, 5)] * 9)).samples]
    assert outcomes.count("completed") == 6 and outcomes.count("rejected") == 3
    server = make_server(max_queue_tokens=50)
    outcomes = [s.outcome for s in simulate(server, Load([Request(0.0, 20, 5)] * 9)).samples]
    assert outcomes.count("completed") == 2


def test_no_sequence_is_longer_than_the_server_allows():
    refused, cut = simulate(make_server(), Load([Request(0.0, n, 20) for n in (256, 250)])).samples
    assert (refused.outcome, refused.output_tokens) == ("rejected", 0)
    assert (cut.outcome, cut.output_tokens) == ("completed", 256 - 250)


def test_a_simulation_ends_as_soon_as_it_has_seen_enough():
    load = Load([Request(10.0 * i, 20, 5) for i in range(9)])
    simulation = Simulation(make_server(), load, goes_on=lambda sample: sample.at < 30)
    assert [sample.at for sample in simulation.run().samples] == [0, 10, 20, 30]


def test_pages_that_run_out_preempt():
    server = make_server(pages=16, prefix_caching=False)
    result = simulate(server, Load([Request(0.0, 60, 60)] * 4))
    assert result.preemptions > 0
    assert {s.outcome for s in result.samples} == {"completed"}
    assert max(moment.pages for moment in result.moments) <= 16
    times = [moment.at for moment in result.moments]
    assert all(1 <= after - before < 1 + CHUNK_TICK for before, after in pairwise(times))


def test_users_ask_when_they_have_their_answer():
    load = Load([Request(0.0, 10, 5)] * 100, users=2, think=1.0, until=30.0)
    samples = simulate(make_server(), load).samples
    assert max(s.at for s in samples) < 30 and 5 < len(samples) < 100
    for sample in samples:
        others = [s for s in samples if s.at < sample.last and s.last > sample.at]
        assert len(others) <= 2
    ends = {s.last for s in samples}
    assert all(s.at == 0 or s.at - 1.0 in ends for s in samples)


def test_an_outage_loses_or_delays_what_the_engine_held():
    load = Load([Request(0.5 * i, 20, 8) for i in range(40)])
    lost = simulate(make_server(max_queue=99), load, outage=Outage(5.0, 3.0, retry=False))
    failed = [s for s in lost.samples if s.outcome == "failed"]
    assert all(s.at < 8 for s in failed)
    assert {s.at for s in lost.samples if 5 < s.at < 8} <= {s.at for s in failed}
    assert any(s.at < 5 for s in failed), "it held some"
    # What the engine that died has done counts.
    assert any(s.output_tokens and s.first < 5 for s in failed)
    assert lost.generated_tokens == sum(s.output_tokens for s in lost.samples)
    assert lost.communication_seconds == lost.ticks * TICK / 8 and lost.down_seconds == 3.0
    again = simulate(make_server(max_queue=99), load, outage=Outage(5.0, 3.0, retry=True))
    assert {s.outcome for s in again.samples} == {"completed"}
    assert {s.at for s in again.samples if s.attempts == 2} == {s.at for s in failed}
    assert all(s.first >= 8 for s in again.samples if s.attempts == 2)


def test_a_failure_is_what_the_same_run_without_it_lacks():
    """Brute force, by the time of arrival."""
    load = Load([Request(float(i), 20, 8) for i in range(50)])
    server, targets = make_server(slots=8, max_queue=99), Targets(ttft=2.0)
    without = simulate(server, load)
    for retry in (False, True):
        outage = Outage(10.0, 5.0, retry)
        found = failure(server, load, 1, targets, outage, without)
        before = {s.at for s in without.samples if s.ttft <= 2.0}
        after = {s.at: s for s in found.simulated.samples}
        gone = {at for at, s in after.items() if s.outcome == "failed"}
        late = {at for at in before - gone if after[at].ttft > 2.0}
        assert (found.lost, found.late) == (len(gone), len(late))
        assert found.settled == max(gone | late) - 10.0 < max(after) - 10.0
        assert bool(gone) != retry and bool(late) == retry
        month = 50 / 49 * 30 * 86400
        assert found.availability == approx(1 - found.lost / month, rel=1e-9)
        allowed = int(0.001 * month / found.lost) if gone else None
        assert found.outages_allowed == allowed


def test_other_replicas_take_the_requests_of_one_that_died():
    load = Load([Request(0.5 * i, 20, 8) for i in range(40)])
    lost, again = (
        simulate(make_server(slots=8, max_queue=99), load, 2, Outage(5.0, 3.0, retry=retry))
        for retry in (False, True)
    )
    failed = {s.at for s in lost.samples if s.outcome == "failed"}
    assert failed and max(failed) < 5, "what comes later goes to the other"
    for found in (lost, again):
        assert [s.at for s in found.samples] == [request.at for request in load.requests]
        assert found.replicas == 2 and found.seconds == max(s.last for s in found.samples)
    assert {s.outcome for s in again.samples} == {"completed"}
    assert {s.at for s in again.samples if s.attempts == 2} == failed
    assert 5 < min(s.first for s in again.samples if s.attempts == 2) < 8, "at once"


def test_what_a_dead_replica_lost_is_dealt_to_the_others_in_turn():
    """Each of the others has one prompt to compute, and each request keeps its length."""
    load = Load([Request(0.0, 60, tokens) for tokens in (90, 1, 1, 80)])
    found = simulate(make_server(), load, 3, Outage(5.0, 3.0, retry=True)).samples
    again = [sample for sample in found if sample.attempts == 2]
    assert [sample.first for sample in again] == [5 + 2 * CHUNK_TICK] * 2
    assert {sample.output_tokens for sample in again} == {80, 90}


def test_requests_and_users_are_dealt_in_turn():
    load = Load([Request(float(i), 20, 8) for i in range(8)], users=8)
    hands = load.deal(3)
    assert [[r.at for r in hand.requests] for hand in hands] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert [hand.users for hand in hands] == [3, 3, 2]


def test_replicas_share_the_load():
    load = Load([Request(0.25 * i, 20, 8) for i in range(60)])
    one, two = (simulate(make_server(max_queue=99), load, n) for n in (1, 2))
    assert len(one.samples) == len(two.samples) == 60
    assert two.generated_tokens == one.generated_tokens == 60 * 8
    targets = Targets(ttft=2.0)
    assert figures(two, targets).inside > figures(one, targets).inside


def test_the_highest_rate_keeps_the_targets_and_more_does_not():
    server, targets = make_server(max_queue=99), Targets(ttft=3.0, inside=0.9)
    draw = Draw(rate=1.0, num_requests=60, prompt=Lengths.parse("20"), answer=Lengths.parse("4-12"))
    found = highest_rate(server, draw, targets)
    assert len(found.rates) == 3 and min(found.rates) <= found.middle <= max(found.rates)

    def inside(rate: float, seed: int) -> float:
        drawn = replace(draw, rate=rate, seed=seed)
        return figures(simulate(server, Load(drawn.requests())), targets).inside

    for seed, rate in enumerate(found.rates):
        assert inside(rate, seed) >= 0.9 > inside(1.1 * rate, seed)
    assert highest_rate(server, draw, Targets(ttft=1e-9)).rates == (0.0, 0.0, 0.0)


def test_a_rate_at_which_exactly_enough_are_inside_is_kept():
    """What is longer than the server allows is outside at any rate, so that the most is found."""
    draw = Draw(
        rate=1.0, num_requests=10, prompt=Lengths.parse("20-270"), answer=Lengths.parse("4")
    )
    refused = [
        sum(request.prompt_tokens >= 256 for request in replace(draw, seed=seed).requests())
        for seed in range(3)
    ]
    targets = Targets(inside=(10 - max(refused)) / 10)
    found = highest_rate(make_server(max_queue=99), draw, targets, replicas=2)
    assert max(refused) > 0 and found.rates == (2 * 2**13,) * 3


def test_the_rates_of_the_seeds_have_a_middle_and_a_spread():
    found = HighestRate((8.0, 2.0, 4.0), 9)
    assert (found.middle, found.spread) == (4.0, 6 / 4)
