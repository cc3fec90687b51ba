"""The tick loop with a device whose tokens can be computed by hand."""

import itertools
import math
from collections import Counter, defaultdict, deque
from dataclasses import replace

import numpy as np
import pytest

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.chunk_choice import ChunkChoice
from llama_jax.engine.interface import PACKET_TOKENS, StageStats
from llama_jax.engine.prefill import Prefill
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.tick_loop import TickLoop
from llama_jax.engine.tick_times import TickTimes
from llama_jax.ring.sizes import Bucket, RingSizes
from tests.support.mock_executor import VOCAB_SIZE, MockExecutor, generate

STAGES = (1, 2, 4)
LATE = (0, 1, 3, 7)


def make_sizes(stages: int) -> RingSizes:
    return RingSizes(
        num_slots=4 * stages,
        num_pages=60,
        page_size=4,
        pages_per_sequence=16,
        row_buckets=(1, 2, 4),
        chunk_buckets=(0, 4, 8, 16),
        tile=4,
    )


def make_loop(stages: int, late: int) -> TickLoop:
    sizes = make_sizes(stages)
    scheduler = Scheduler(sizes, stages)
    return TickLoop(scheduler, MockExecutor(sizes, stages), late)  # type: ignore[arg-type]


def make_requests(count: int, seed: int):
    """(id, tick of arrival, prompt, params, seed); every other request is sampled."""
    rng = np.random.default_rng(seed)
    for request_id in range(count):
        prompt = rng.integers(14, VOCAB_SIZE, rng.integers(1, 30)).tolist()
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 20)), temperature=float(request_id % 2)
        )
        yield request_id, int(rng.integers(0, 40)), prompt, params, request_id - 5


def run(loop: TickLoop, requests, before_each_tick=lambda: None) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = defaultdict(list)
    waiting = sorted(requests, key=lambda request: request[1])
    tick = 0
    while waiting or loop.has_work:
        while waiting and waiting[0][1] <= tick:
            request_id, _, prompt, params, seed = waiting.pop(0)
            loop.scheduler.add(
                request_id, prompt, params, max_model_len=64, seed=seed, stop_ids=frozenset()
            )
        before_each_tick()
        for output in loop.step():
            tokens[output.request_id].append(output.token)
        tick += 1
        assert tick < 5000
    return tokens


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("late", LATE)
def test_every_result_goes_to_its_request(stages, late):
    """Slots change owners while results are in flight; some requests are sampled, with seeds."""
    loop = make_loop(stages, late)
    requests = list(make_requests(25, seed=stages))
    tokens = run(loop, requests)
    assert loop.scheduler.num_running == 0 and loop.scheduler.pool.num_free == 60
    assert loop.scheduler.num_special == 0
    for request_id, _, prompt, params, seed in requests:
        length = len(prompt) + params.max_tokens
        expected, _ = generate(prompt, length, seed=None if params.greedy else seed)
        assert tokens[request_id] == expected


@pytest.mark.parametrize("late", LATE)
def test_results_are_read_as_late_as_allowed_and_no_later(late):
    loop = make_loop(2, late)
    loop.scheduler.add(
        0, [20] * 3, SamplingParams(max_tokens=1), max_model_len=64, seed=0, stop_ids=frozenset()
    )
    ticks = 0
    while not loop.step():
        ticks += 1
    # It leaves the last of two stages in the second tick. When there is nothing left to dispatch,
    # the remaining results are read.
    assert ticks == (1 if late == 0 else 2)
    assert not loop.has_work and loop.ticks == 2


@pytest.mark.parametrize("late", LATE)
def test_so_many_results_are_unread_while_there_is_work(late):
    loop = make_loop(2, late)
    loop.scheduler.add(
        0, [20] * 3, SamplingParams(max_tokens=40), max_model_len=64, seed=0, stop_ids=frozenset()
    )
    ticks = 1
    while not loop.step():
        ticks += 1
    assert ticks == 2 + late and loop.has_work


@pytest.mark.parametrize("stages", STAGES)
def test_the_program_fits_the_largest_packet_in_any_stage(stages):
    loop = make_loop(stages, late=2)
    packets = []
    original = loop.scheduler.schedule

    def schedule(now):
        packets.append(original(now))
        return packets[-1]

    loop.scheduler.schedule = schedule  # type: ignore[method-assign]
    run(loop, make_requests(25, seed=7))
    buckets = loop.executor.buckets
    assert len(buckets) == len(packets) == loop.ticks
    for tick, bucket in enumerate(buckets):
        in_flight = packets[max(0, tick - stages + 1) : tick + 1]
        rows = max(max(len(p.rows) for p in in_flight), 1)
        chunk = max(len(p.tiles) for p in in_flight) * 4
        assert bucket == Bucket(
            min(size for size in (1, 2, 4) if size >= rows),
            min(size for size in (0, 4, 8, 16) if size >= chunk),
        )
    assert len(set(buckets)) > 4, "too few programs ran"


@pytest.mark.parametrize("stages", STAGES)
def test_counters_count_what_was_dispatched(stages):
    loop = make_loop(stages, late=1)
    packets = []
    original = loop.scheduler.schedule

    def schedule(now):
        packets.append(original(now))
        return packets[-1]

    loop.scheduler.schedule = schedule  # type: ignore[method-assign]
    counted = []

    def count():
        counted.append((loop.stage_ticks_busy, loop.token_slots, loop.token_slots_used))

    run(loop, make_requests(25, seed=9), count)
    count()
    busy = slots = used = 0
    expected = [(0, 0, 0)]
    for tick, bucket in enumerate(loop.executor.buckets):
        for stage in range(stages):
            slots += bucket.rows + bucket.chunk
            if tick >= stage:
                packet = packets[tick - stage]
                tokens = len(packet.rows) + sum(len(tile.tokens) for tile in packet.tiles)
                used += tokens
                busy += tokens > 0
        expected.append((busy, slots, used))
    # A step that only reads a late result is not a tick.
    assert list(dict.fromkeys(counted)) == expected
    assert 0 < used < slots and 0 < busy <= loop.ticks * stages
    sizes = [packet.num_tokens for packet in packets if packet]
    classes = itertools.pairwise((0, *PACKET_TOKENS, math.inf))
    by_tokens = [sum(low < size <= high for size in sizes) for low, high in classes]
    assert (loop.packet_tokens, loop.packets_by_tokens) == (sum(sizes), by_tokens)
    assert sum(count > 0 for count in by_tokens) > 2, "the packets are too much alike"


class Clock:
    """A clock that stands still unless it is advanced."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class SlowTokens:
    """Tokens that are still on their way from the device: reading them takes some seconds."""

    def __init__(self, tokens: np.ndarray, clock: Clock, seconds: float) -> None:
        self.tokens, self.clock, self.seconds = tokens, clock, seconds

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        self.clock.now += self.seconds
        return self.tokens


@pytest.mark.parametrize("late", [0, 2])
def test_time_is_split_into_host_work_calls_and_waits(late, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("llama_jax.engine.tick_loop.time", clock)
    loop = make_loop(2, late)
    schedule, run_tick = loop.scheduler.schedule, loop.executor.run

    def slow_schedule(now):
        clock.now += 1.0
        return schedule(now)

    def slow_run(bucket, packed, controls):
        clock.now += 10.0
        loop.executor.call_seconds += 10.0
        result = run_tick(bucket, packed, controls)
        return result._replace(tokens=SlowTokens(result.tokens, clock, 100.0))

    monkeypatch.setattr(loop.scheduler, "schedule", slow_schedule)
    monkeypatch.setattr(loop.executor, "run", slow_run)
    seconds = []
    loop.on_tick.append(lambda tick: seconds.append(tick.seconds))
    tokens = run(loop, [(0, 0, [20] * 3, SamplingParams(max_tokens=4, temperature=0), 0)])
    assert len(tokens[0]) == 4 and loop.ticks == 8  # four turns of a ring of two stages
    assert loop.host_seconds == 8 * 1.0
    assert loop.wait_seconds == 4 * 100.0  # the packets that held tokens
    assert loop.seconds == clock.now == 8 * 11.0 + 4 * 100.0
    if late == 0:
        assert seconds == [11.0, 111.0] * 4
    else:
        assert seconds == [11.0, 11.0, 11.0, 111.0, 11.0, 111.0, 11.0, 111.0]


def test_an_output_says_how_long_its_request_waited(monkeypatch):
    """Until its first chunk enters the ring, one second per tick; the same in every output."""
    clock = Clock()
    monkeypatch.setattr("llama_jax.engine.tick_loop.time", clock)
    loop, entered = make_loop(1, 0), {}
    schedule = loop.scheduler.schedule

    def noted_schedule(now):
        packet = schedule(now)
        for tile in packet.tiles:
            entered.setdefault(tile.sequence.request_id, clock.now)
        return packet

    monkeypatch.setattr(loop.scheduler, "schedule", noted_schedule)
    for request_id in range(6):  # two more than there are slots
        loop.scheduler.add(
            request_id,
            [20] * 9,
            SamplingParams(max_tokens=3),
            max_model_len=64,
            seed=0,
            stop_ids=frozenset(),
        )
        loop.scheduler.waiting[-1].arrived_at = clock.now
    waited = defaultdict(set)
    while loop.has_work:
        for output in loop.step():
            waited[output.request_id].add(output.queue_seconds)
        clock.now += 1.0
    assert waited == {request_id: {seconds} for request_id, seconds in entered.items()}
    assert entered[0] == 0 < entered[5]


def test_an_idle_loop_dispatches_nothing():
    loop = make_loop(4, late=2)
    assert not loop.has_work and loop.step() == [] and loop.ticks == 0


def test_the_ring_runs_until_the_last_packet_has_left():
    loop = make_loop(4, late=0)
    loop.scheduler.add(
        0, [20], SamplingParams(max_tokens=1), max_model_len=64, seed=0, stop_ids=frozenset()
    )
    outputs = [loop.step() for _ in range(4)]
    assert [len(o) for o in outputs] == [0, 0, 0, 1] and not loop.has_work


def test_an_aborted_request_leaves_no_work_behind():
    loop = make_loop(4, late=3)
    loop.scheduler.add(
        0, [20] * 9, SamplingParams(), max_model_len=64, seed=0, stop_ids=frozenset()
    )
    for _ in range(6):
        loop.step()
    loop.scheduler.abort(0)
    ticks = 0
    while loop.has_work:
        assert loop.step() == []
        ticks += 1
    assert ticks <= 8


def test_ticks_are_counted_by_program_and_packets_by_stage():
    loop = make_loop(4, late=2)
    packets = deque([(0, 0)] * 4, maxlen=4)
    loop.on_tick.append(
        lambda tick: packets.appendleft(
            (len(tick.in_flight[-1].rows), sum(t.length for t in tick.in_flight[-1].tiles))
        )
    )
    seen = []

    def note() -> None:
        if loop.has_work:
            seen.append((loop.stage_stats, [*packets]))

    run(loop, make_requests(25, seed=7), note)
    assert loop.stage_stats == (StageStats(0, 0),) * 4  # at rest, though a packet was the last
    seen = [([(s.rows, s.chunk_tokens) for s in stats], by_hand) for stats, by_hand in seen]
    assert all(stats == by_hand for stats, by_hand in seen)
    assert {rows > 0 for stats, _ in seen for rows, _ in stats} == {True, False}
    by_program = Counter(loop.executor.buckets)
    assert {(rows, chunk): n for rows, chunk, n, _ in loop.program_stats if n} == dict(by_program)
    seconds = sum(program.seconds for program in loop.program_stats)
    assert 0 < seconds <= loop.seconds


def test_the_reason_of_waiting():
    sizes = make_sizes(1)
    scheduler = Scheduler(sizes, 1)
    params = SamplingParams(max_tokens=4)

    def reason_after(length: int) -> str | None:
        number = scheduler.num_unfinished
        scheduler.add(
            number, [20 + number] * length, params, max_model_len=64, seed=0, stop_ids=frozenset()
        )
        scheduler.schedule()
        return scheduler.prefill.wait_reason()

    assert scheduler.prefill.wait_reason() is None
    assert [reason_after(58) for _ in range(3)] == [None, "prefill", "prefill"]
    assert scheduler.num_queued_tokens == 116
    for _ in range(20):
        scheduler.schedule()
    assert scheduler.prefill.wait_reason() is None


def test_the_reasons_of_waiting_for_more_than_prefill():
    def wait_for(num_pages: int, lengths: list[int]) -> Prefill:
        scheduler = Scheduler(replace(make_sizes(1), num_pages=num_pages), 1)
        for number, length in enumerate(lengths):
            scheduler.add(
                number,
                [20 + number] * length,
                SamplingParams(max_tokens=30),
                max_model_len=64,
                seed=0,
                stop_ids=frozenset(),
            )
            for _ in range(3):  # until its prompt is sent
                scheduler.schedule()
        return scheduler.prefill

    assert wait_for(60, [2] * 5).wait_reason() == "slot"
    prefill = wait_for(20, [30] * 3)  # eight pages each, and more for the answers
    assert prefill.wait_reason() == "pages"
    prefill.most_running = 2
    assert prefill.wait_reason() == "target"


def test_the_ticks_of_a_loop_are_timed_and_its_idle_time_is_not():
    """Three requests, one after the other, with a pause between them that is longer than all."""
    sizes, now = make_sizes(2), [0.0]
    chunks = ChunkChoice(sizes, TickTimes(lambda work: 1.0, sizes))
    seen: list[tuple[Bucket, float]] = []
    chunks.times.observe = lambda bucket, context, prefix, seconds: seen.append((bucket, seconds))
    executor = MockExecutor(sizes, 2)
    run_tick = executor.run

    def slow_run(bucket, packed, choice):
        now[0] += 1.0 + bucket.chunk
        return run_tick(bucket, packed, choice)

    executor.run = slow_run
    scheduler = Scheduler(sizes, 2, chunks=chunks)
    loop = TickLoop(scheduler, executor, 0, clock=lambda: now[0])  # type: ignore[arg-type]
    for number in range(3):
        params = SamplingParams(max_tokens=8, temperature=0)
        scheduler.add(
            number, [20] * 9, params, max_model_len=64, seed=0, stop_ids=frozenset()
        )  # fmt: skip
        while loop.has_work:
            loop.step()
        now[0] += 1000.0
    assert len(seen) > 12 and {bucket.chunk for bucket, _ in seen} > {0}
    assert all(seconds == 1.0 + bucket.chunk for bucket, seconds in seen)
