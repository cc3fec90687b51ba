"""The size of the chunk that enters: by the time of a tick, by who waits, and by the targets."""

import itertools
import statistics
from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st

from llama_jax.costs.rule_of_thumb import CPU_COST, GPU_COST, TickCost
from llama_jax.engine.chunk_choice import AS_LONG, MARGIN, ChunkChoice, Load
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.tick_times import TickTimes
from llama_jax.ring.sizes import Bucket
from tests.support.scheduler_trial import Request, Trial, make_sizes, numbered

SIZES = replace(
    make_sizes(num_pages=100, page_size=16, max_rows=8, stages=4, tile=64, max_len=400),
    chunk_buckets=(0, 64, 128, 256),
)
TARGETS = st.none() | st.floats(1, 10_000)
IDLE = Load(num_stages=4, prompts=1, tokens=0, streams=0, rows=0)
BUSY = IDLE._replace(streams=30, rows=8)


def chosen(cost: TickCost, load: Load, **changes: int) -> int:
    return choice(cost).choose(load._replace(**changes))


def choice(cost: TickCost, sizes=SIZES, **targets: float | None) -> ChunkChoice:
    return ChunkChoice(sizes, TickTimes(cost.seconds, sizes), **targets)


def test_a_short_prompt_takes_a_small_chunk_and_a_long_one_a_large_one():
    # 64 tokens at a time: 5 ticks of 128. 128: 4 ticks of 192, and 256: 4 ticks of 320.
    assert chosen(CPU_COST, IDLE, tokens=128) == 64
    # 64: 67 ticks of 128. 128: 35 ticks of 192. 256: 19 ticks of 320.
    assert chosen(CPU_COST, IDLE, tokens=4096) == 256


def test_many_streams_make_the_chunk_small_and_many_prompts_make_it_large():
    assert chosen(CPU_COST, BUSY, tokens=1000) == 64
    assert chosen(CPU_COST, BUSY, tokens=4000, prompts=20) == 256


def test_what_is_computed_while_the_weights_are_read_is_free():
    assert chosen(GPU_COST, BUSY, tokens=60) == 64  # no more ticks than with 128
    assert chosen(GPU_COST, BUSY, tokens=1000) == 128
    assert chosen(GPU_COST, IDLE, tokens=4000) == 256


@given(
    st.builds(TickCost, st.integers(0, 300), st.integers(0, 300), st.just(1.0)),
    st.builds(
        Load,
        num_stages=st.integers(1, 8),
        prompts=st.integers(1, 40),
        tokens=st.integers(1, 5000),
        streams=st.integers(0, 40),
        rows=st.integers(0, 64),
    ),
)
def test_no_other_chunk_makes_them_wait_less(cost, load):
    def waiting(chunk: int) -> int:
        """Of all, counted tick by tick."""
        total, left, behind = 0, load.tokens, load.num_stages - 1
        while left > 0 or behind > 0:
            behind -= left <= 0
            left -= chunk
            tick = cost.overhead + max(cost.free, load.rows + chunk)
            total += load.prompts * tick
            total += load.streams * (tick - cost.overhead - max(cost.free, load.rows))
        return total

    best = choice(cost).choose(load)
    assert waiting(best) == min(map(waiting, SIZES.chunk_buckets[1:]))


class Watched(ChunkChoice):
    """Compares what the scheduler says of its sequences with the sequences themselves.

    Attributes:
      trial: of the scheduler whose choice this is; its ticks are the time.
    """

    trial: Trial

    def choose(self, load: Load) -> int:
        scheduler = self.trial.scheduler
        sent = {s: s.next_position for s in scheduler.prefilling}
        live = min(scheduler.sizes.num_slots, scheduler.prefill.most_running)
        room = max(0, live - scheduler.num_running)
        prompts = [*sent, *scheduler.waiting[:room]]
        left = list(itertools.accumulate(len(s.tokens) - sent.get(s, 0) for s in prompts))
        rows = [len(microbatch) for microbatch in scheduler.microbatches]
        assert load == Load(
            num_stages=len(rows),
            prompts=len(prompts),
            tokens=left[-1],
            streams=sum(rows),
            rows=max(rows),
            keys=max(sum(s.next_position for s in batch) for batch in scheduler.microbatches),
            prefix=next(iter(sent.values()), 0),
            waits=[
                (until, self.trial.tick - s.arrived_at)
                for s, until in zip(prompts, left, strict=True)
                if len(s.tokens) == s.num_prompt
            ],
        )
        return super().choose(load)

    def most_rows(self, num_stages: int, context: float) -> int:
        scheduler = self.trial.scheduler
        prompts = [*scheduler.prefilling, scheduler.waiting[0]]
        keys = [s.next_position for s in itertools.chain(*scheduler.microbatches)]
        assert context == statistics.mean([len(s.tokens) for s in prompts] + keys)
        return super().most_rows(num_stages, context)

    def is_late(self, num_stages: int, tokens: int, waited: float) -> bool:
        first = self.trial.scheduler.waiting[0]
        assert len(first.tokens) == first.num_prompt == tokens, "it has had its first token"
        assert waited == self.trial.tick - first.arrived_at
        return super().is_late(num_stages, tokens, waited)


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 16), st.integers(0, 30)),
        min_size=1,
        max_size=12,
    ),
    st.builds(TickCost, st.integers(0, 20), st.integers(0, 20), st.just(1.0)),
    st.integers(1, 4),
    st.fixed_dictionaries({"tpot": st.none() | st.floats(1, 60), "ttft": TARGETS}),
)
# The second begins beside the first lest it be late. When it has lost its pages, it may wait.
@example([(30, 16, 0)] * 2, TickCost(1, 1), 1, {"tpot": 10.0, "ttft": 1.0})
def test_every_request_gets_its_tokens_whatever_the_cost(requests, cost, stages, targets):
    sizes = make_sizes(num_pages=20, max_rows=2, stages=stages, tile=4, max_len=80)
    sizes = replace(sizes, chunk_buckets=(0, 4, 8, 16))
    trial = Trial(sizes, stages, late=[1, 0])
    times = TickTimes(lambda work: cost.seconds(work) + work.row_keys / 8, sizes)
    chunks = Watched(sizes, times, **targets)
    trial.scheduler, chunks.trial = Scheduler(sizes, stages, chunks=chunks), trial
    trial.check_consecutive = lambda *_: None  # a smaller chunk leaves room for a short prompt
    arriving = sorted(enumerate(requests), key=lambda item: item[1][2])
    expected = {}
    while arriving:
        while arriving and arriving[0][1][2] <= trial.tick:
            number, (length, max_tokens, _) = arriving.pop(0)
            request = Request(numbered(length, number), max_tokens)
            expected[number] = request.answer
            trial.add(number, request)
        trial.step()
    trial.drain()
    for number, (tokens, reason) in expected.items():
        assert trial.tokens[number] == tokens and trial.ended[number][0] == reason


LOADS = st.builds(
    Load,
    num_stages=st.integers(1, 8),
    prompts=st.integers(1, 40),
    tokens=st.integers(1, 5000),
    streams=st.integers(0, 40),
    rows=st.integers(0, 8),
    keys=st.integers(0, 10_000),
    prefix=st.integers(0, 3000),
    waits=st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 5000)), max_size=6).map(tuple),
)


def slower_with_context(work):
    return 100 + max(192, work.tokens) + work.row_keys / 50 + work.chunk_keys / 200


@given(TARGETS, TARGETS, LOADS)
def test_no_other_chunk_keeps_the_targets_better(tpot, ttft, load):
    """Brute force: every chunk is judged, by ticks that are counted one by one."""
    times = TickTimes(slower_with_context, SIZES)
    chooser = ChunkChoice(SIZES, times, tpot, ttft)
    if not chooser.has_targets:
        return

    def tick(chunk: int) -> float:
        return times.seconds(Bucket(8, chunk), load.keys / 8, load.prefix)

    def tokens_come_in_time(chunk: int) -> bool:
        return tpot is None or load.num_stages * tick(chunk) <= tpot

    def late(chunk: int) -> float:
        total = 0.0
        for until, waited in load.waits:
            sent, ticks = 0, load.num_stages - 1
            while sent < until:
                sent, ticks = sent + chunk, ticks + 1
            seconds = waited + ticks * tick(chunk) - MARGIN * (ttft or float("inf"))
            total += seconds if seconds > 0 else 0.0
        return total

    def waiting(chunk: int) -> float:
        ticks = -(-load.tokens // chunk) + load.num_stages - 1
        return ticks * (load.prompts * tick(chunk) + load.streams * (tick(chunk) - tick(0)))

    chunks = SIZES.chunk_buckets[1:]
    fast = [c for c in chunks if tokens_come_in_time(c) or tick(c) <= AS_LONG * tick(chunks[0])]
    assert chooser.limit(load) == max(fast)
    best = [chunk for chunk in chunks if late(chunk) == min(map(late, chunks))]
    if tpot is None:
        least = min(map(waiting, best))
        expected = min(chunk for chunk in best if waiting(chunk) == least)
    else:
        expected = max(set(best) & set(fast), default=min(best))
    assert chooser.choose(load) == expected
    assert SIZES.row_buckets == (8,)  # which `tick` counts on


def test_the_largest_chunk_that_keeps_the_time_per_token():
    load = BUSY._replace(tokens=1000)
    for chunk in (64, 128, 256):
        tokens = 4 * CPU_COST.unit * (64 + 8 + chunk)
        assert choice(CPU_COST, tpot=tokens).choose(load) == chunk
        assert choice(CPU_COST, tpot=0.999 * tokens).choose(load) == max(64, chunk // 2)


def test_a_prompt_that_would_be_late_gets_a_larger_chunk():
    load = BUSY._replace(tokens=1000, waits=((1000, 0.0),))
    tick = CPU_COST.unit * (64 + 8 + 128)
    soon = (8 + 3) * tick / MARGIN * 1.001  # with chunks of 128; those of 64 take 19 shorter ticks
    tokens = 4 * CPU_COST.unit * (64 + 8 + 64)
    assert choice(CPU_COST, ttft=10.0).choose(load) == 64  # for the streams
    assert choice(CPU_COST, ttft=soon).choose(load) == 128
    assert choice(CPU_COST, tpot=tokens, ttft=10.0).choose(load) == 64
    assert choice(CPU_COST, tpot=tokens, ttft=soon).choose(load) == 128  # above the limit
    waited = load._replace(waits=((1000, MARGIN * (10.0 - soon)),))
    assert choice(CPU_COST, tpot=tokens, ttft=10.0).choose(waited) == 128
    lost = load._replace(waits=((1000, 10.0),))  # late whatever the chunk, but less so with 128
    assert choice(CPU_COST, tpot=tokens, ttft=10.0).choose(lost) == 128


def test_a_chunk_that_costs_no_time_is_allowed_even_if_the_target_cannot_hold():
    load = BUSY._replace(tokens=4000, prompts=20)
    assert choice(GPU_COST, tpot=1e-6).limit(load) == 128  # 192 tokens are computed for nothing
    assert choice(CPU_COST, tpot=1e-6).limit(load) == 64


def test_a_ring_without_chunks_has_nothing_to_choose():
    sizes = replace(SIZES, chunk_buckets=(0,))
    assert choice(CPU_COST, sizes).choose(BUSY) == 0
    assert choice(CPU_COST, sizes, tpot=0.05, ttft=0.5).choose(BUSY) == 0


@given(
    st.builds(TickCost, st.integers(0, 20), st.integers(0, 20), st.just(1.0)),
    st.integers(1, 8),
    st.floats(1, 400),
    st.integers(0, 300),
)
def test_as_many_rows_run_as_keep_the_target(cost, stages, tpot, context):
    """Beside every number of rows, with keys that cost as well."""
    sizes = replace(SIZES, row_buckets=(1, 2, 4, 8))

    def seconds(work):
        return cost.seconds(work) + work.row_keys / 64

    times = TickTimes(seconds, sizes)
    found = ChunkChoice(sizes, times, tpot).most_rows(stages, context)

    def keeps(rows: int) -> bool:
        bucket = next(b for b in sizes.row_buckets if b >= rows)
        return stages * times.seconds(Bucket(bucket, 0), context * rows / bucket) <= tpot

    kept = [rows for rows in range(1, 9) if keeps(rows)]
    assert found == (max(kept) if kept else 8)
    assert ChunkChoice(sizes, times, None, 1.0).most_rows(stages, context) == 8


@given(
    st.builds(TickCost, st.integers(0, 300), st.integers(0, 300), st.just(1.0)),
    st.integers(1, 8),
    st.integers(1, 2000),
    st.floats(0, 5000),
)
def test_a_prompt_is_late_that_would_miss_its_target_one_tick_later(cost, stages, tokens, waited):
    """With the largest chunks beside the most rows, counted tick by tick."""
    seconds = choice(cost).times.seconds(Bucket(8, 256))
    sent, ticks = 0, 1
    while sent < tokens:
        sent, ticks = sent + 256, ticks + 1
    ticks += stages - 1  # until it has passed the stages
    needed = (waited + ticks * seconds) / MARGIN
    for share in (0.999, 1.001):
        chooser = choice(cost, ttft=share * needed)
        assert chooser.is_late(stages, tokens, waited) == (share < 1)
    assert not choice(cost, tpot=1.0).is_late(stages, tokens, waited)
