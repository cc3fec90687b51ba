"""A recording of a run, compared with a ring that is kept by hand."""

from itertools import count
from types import SimpleNamespace

import pytest

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.packets import Packet
from llama_jax.engine.recording import PacketRecord, Recording, record
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.tick_loop import TickLoop
from llama_jax.ring.sizes import RingSizes
from sharding.errors import UserError
from tests.engine.test_tick_loop import STAGES, make_loop, make_requests, make_sizes, run
from tests.support.mock_executor import MockExecutor
from tests.support.scheduler_trial import Request, Trial

SIZES = RingSizes(
    num_slots=4,
    num_pages=13,
    page_size=4,
    pages_per_sequence=12,
    row_buckets=(2,),
    chunk_buckets=(0, 8),
    tile=4,
)


def plain(packet: Packet) -> PacketRecord:
    """The contents of a packet when it enters, read segment by segment."""
    rows, tiles = [], []
    for segment in packet.rows + packet.tiles:
        if segment.tokens is None:
            rows.append(segment.sequence.request_id)
        else:
            tiles.append((segment.sequence.request_id, len(segment.tokens)))
    return PacketRecord(tuple(rows), tuple(tiles))


def spy(loop: TickLoop) -> list[PacketRecord]:
    """A list to which every packet of the scheduler is appended."""
    entered: list[PacketRecord] = []
    original = loop.scheduler.schedule

    def schedule(now: float) -> Packet:
        packet = original(now)
        entered.append(plain(packet))
        return packet

    loop.scheduler.schedule = schedule  # type: ignore[method-assign]
    return entered


def ring_by_hand(entered: list[PacketRecord], stages: int) -> list[list[PacketRecord]]:
    """The packet at each stage in each tick: packets move on by one stage, then one enters."""
    at = [PacketRecord()] * stages
    history = []
    for packet in entered:
        for stage in reversed(range(1, stages)):
            at[stage] = at[stage - 1]
        at[0] = packet
        history.append(list(at))
    return history


def as_table(recording: Recording) -> list[list[PacketRecord]]:
    stages = range(recording.num_stages)
    return [[recording.holds(s, t) for s in stages] for t in range(len(recording.ticks))]


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("stages", STAGES)
def test_every_stage_holds_the_packet_of_a_ring_kept_by_hand(stages, late):
    loop = make_loop(stages, late)
    entered = spy(loop)
    with record(loop) as recording:
        run(loop, make_requests(25, seed=stages))
    table = ring_by_hand(entered, stages)
    assert as_table(recording) == table and len(table) == loop.ticks
    busy = sum(bool(packet) for at in table for packet in at)
    assert recording.busy_share() == busy / (loop.ticks * stages)
    assert busy == loop.stage_ticks_busy
    first = table[3:9]
    part = sum(bool(packet) for at in first for packet in at) / (6 * stages)
    assert recording.busy_share(slice(3, 9)) == part
    assert sorted(recording.request_ids) == list(range(25))
    tokens = sum(tick.packet.chunk_tokens + len(tick.packet.rows) for tick in recording.ticks)
    assert loop.token_slots_used == sum(
        sum(packet.tokens_by_request.values()) for at in table for packet in at
    )
    assert tokens == sum(sum(packet.tokens_by_request.values()) for packet in entered)


@pytest.mark.parametrize("stages", STAGES)
def test_it_agrees_with_a_scheduler_driven_by_hand(stages):
    """`Trial` has its own ring; the same requests go through both."""
    sizes = make_sizes(stages)
    trial = Trial(sizes, stages)
    scheduler = Scheduler(sizes, stages)
    loop = TickLoop(scheduler, MockExecutor(sizes, stages), 0)  # type: ignore[arg-type]
    with record(loop) as recording:
        for request_id, _, prompt, params, _ in make_requests(12, seed=3):
            trial.add(request_id, Request(prompt, params.max_tokens), max_model_len=64)
            params = SamplingParams(temperature=0, max_tokens=params.max_tokens)
            scheduler.add(
                request_id, prompt, params, max_model_len=64, seed=0, stop_ids=frozenset()
            )
            trial.step(), loop.step()
            ring = [plain(packet) for packet in reversed(trial.ring)]  # the last entered first
            assert as_table(recording)[-1] == ring


@pytest.mark.parametrize("stages", STAGES)
def test_a_recording_may_begin_and_end_while_requests_run(stages):
    loop = make_loop(stages, late=1)
    entered = spy(loop)
    parts: list = []

    def step_in():
        if loop.ticks == 11 and not parts:
            parts.append(record(loop))
            parts.append(parts[0].__enter__())
        elif loop.ticks == 30 and len(parts) == 2:
            parts.append(parts[0].__exit__(None, None, None))

    run(loop, make_requests(25, seed=5), step_in)
    recording = parts[1]
    table = ring_by_hand(entered, stages)
    assert [tick.number for tick in recording.ticks] == list(range(11, 30))
    assert as_table(recording) == table[11:30] and loop.ticks > 30
    assert any(table[11][stages - 1 :])  # packets from before the recording are there, too
    assert len(recording.before) == stages - 1
    for index, tick in enumerate(range(11, 30)):
        for stage in range(stages):
            assert recording.microbatch(stage, index) == (tick - stage) % stages


def test_pages_and_queue_are_those_of_the_scheduler_after_each_step():
    """The pool is so small that requests wait and are preempted."""
    scheduler = Scheduler(SIZES, 2)
    loop = TickLoop(scheduler, MockExecutor(SIZES, 2), 0)  # type: ignore[arg-type]
    for request_id in range(8):
        params = SamplingParams(temperature=0, max_tokens=12)
        prompt = [20 + request_id] * 14
        scheduler.add(request_id, prompt, params, max_model_len=40, seed=0, stop_ids=frozenset())
    with record(loop) as recording:
        while loop.has_work:
            loop.step()
            # A live sequence has the pages of the tokens that it has sent, and no more; a prompt
            # that waits for a row may have those of its next chunk.
            live = list(scheduler.roster.live)
            tick = recording.ticks[-1]
            for s in live:
                ahead = min(8, max(0, s.prefill_until - s.next_position))
                sent, more = -(-s.next_position // 4), -(-(s.next_position + ahead) // 4)
                assert tick.pages[s.request_id] in (sent, more)
            assert set(tick.pages) == {s.request_id for s in live if s.pages}
            assert (tick.pages_free, tick.pages_total) == (scheduler.pool.num_free, 13)
            assert tick.num_waiting == len(scheduler.waiting)
    assert scheduler.num_preemptions > 0
    for tick in recording.ticks:
        assert sum(tick.pages.values()) + tick.pages_free == 13
    assert min(tick.pages_free for tick in recording.ticks) <= 1
    assert recording.ticks[-1].pages == {}
    assert recording.ticks[0].num_waiting > recording.ticks[-1].num_waiting == 0


def test_the_times_of_ticks(monkeypatch):
    """With a clock that advances by one second whenever it is read."""
    seconds = count(100.0)
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr("llama_jax.engine.recording.time", clock)
    monkeypatch.setattr("llama_jax.engine.tick_loop.time", clock)
    loop = make_loop(2, late=0)
    loop.scheduler.add(
        0, [20], SamplingParams(max_tokens=2), max_model_len=64, seed=0, stop_ids=frozenset()
    )
    with record(loop) as recording:
        while loop.has_work:
            loop.step()
    # The clock is read at the start and end of a step, and around the wait for a result.
    waits = [False, True, False, True]  # the prompt and the row leave in the second and fourth
    assert [tick.seconds for tick in recording.ticks] == [3.0 if wait else 1.0 for wait in waits]
    assert [tick.start for tick in recording.ticks] == [1.0, 3.0, 7.0, 9.0]
    assert loop.seconds == 8.0 and loop.wait_seconds == 2.0


def test_two_recordings_at_once_and_none_afterwards():
    loop = make_loop(2, late=0)
    with record(SimpleNamespace(loop=loop)) as outer:  # an Engine
        run(loop, make_requests(3, seed=1))
        half = len(outer.ticks)
        with record(SimpleNamespace(engine=SimpleNamespace(loop=loop))) as inner:  # an LLM
            run(loop, [(9, 0, [20], SamplingParams(max_tokens=4), 0)])
    assert outer.ticks[half].number == inner.ticks[0].number
    assert len(outer.ticks) - half == len(inner.ticks) > 0
    run(loop, [(10, 0, [20], SamplingParams(max_tokens=4), 0)])
    assert loop.ticks > outer.ticks[-1].number + 1 and loop.on_tick == []


def test_a_recording_ends_with_an_exception_too():
    loop = make_loop(1, late=0)
    with pytest.raises(ZeroDivisionError), record(loop):
        raise ZeroDivisionError
    assert loop.on_tick == []


def test_an_imagined_recording_is_the_ring_by_hand():
    entered = [PacketRecord((number,)) if number % 3 else PacketRecord() for number in range(10)]
    recording = Recording.imagined(3, entered)
    assert as_table(recording) == ring_by_hand(entered, 3)
    assert recording.busy_share() == (6 + 6 + 5) / 30  # the last packet has reached one stage only
    assert not recording.timed


def test_an_object_without_a_tick_loop_is_refused():
    with pytest.raises(UserError, match="str"), record("demo/checkpoint"):
        pass


def test_stages_and_ticks_that_do_not_exist():
    empty = Recording(2)
    assert empty.busy_share() == 0.0 and empty.request_ids == []
    with pytest.raises(IndexError, match="2"):
        empty.holds(2, 0)
    with pytest.raises(IndexError, match="0"):
        empty.holds(0, 0)
    with pytest.raises(IndexError, match="-1"):
        empty.holds(-1, 0)


def test_a_shared_page_counts_once():
    scheduler = Scheduler(SIZES, 2)
    loop = TickLoop(scheduler, MockExecutor(SIZES, 2), 0)  # type: ignore[arg-type]
    for request_id in range(2):
        params = SamplingParams(temperature=0, max_tokens=12)
        scheduler.add(request_id, [20] * 14, params, max_model_len=40, seed=0, stop_ids=frozenset())
    with record(loop) as recording:
        while loop.has_work:
            loop.step()
    for tick in recording.ticks:
        assert sum(tick.pages.values()) + tick.pages_free == 13
    assert any(tick.pages == {0: 4, 1: 1} for tick in recording.ticks)
