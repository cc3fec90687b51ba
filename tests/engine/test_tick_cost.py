"""The size of the chunk that enters, by the cost of a tick and by who waits for it."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.tick_cost import CPU_COST, GPU_COST, Load, TickCost, choose_chunk
from tests.support.scheduler_trial import Request, Trial, make_sizes, numbered

SIZES = replace(
    make_sizes(num_pages=100, page_size=16, max_rows=8, stages=4, tile=64, max_len=400),
    chunk_buckets=(0, 64, 128, 256),
)
IDLE = Load(num_stages=4, prompts=1, tokens=0, streams=0, rows=0)
BUSY = IDLE._replace(streams=30, rows=8)


def chosen(cost: TickCost, load: Load, **changes: int) -> int:
    return choose_chunk(cost, SIZES, load._replace(**changes))


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
    st.builds(TickCost, st.integers(0, 300), st.integers(0, 300)),
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

    best = choose_chunk(cost, SIZES, load)
    assert waiting(best) == min(map(waiting, SIZES.chunk_buckets[1:]))


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 6), st.integers(0, 30)),
        min_size=1,
        max_size=12,
    ),
    st.builds(TickCost, st.integers(0, 20), st.integers(0, 20)),
    st.integers(1, 4),
)
def test_every_request_gets_its_tokens_whatever_the_cost(requests, cost, stages):
    sizes = make_sizes(num_pages=40, max_rows=2, stages=stages, tile=4, max_len=80)
    sizes = replace(sizes, chunk_buckets=(0, 4, 8, 16))
    trial = Trial(sizes, stages, late=[1, 0])
    trial.scheduler = Scheduler(sizes, stages, cost=cost)
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
