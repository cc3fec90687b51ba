"""The scheduler against a device whose tokens can be computed by hand, on generated traces.

After every tick `Trial` checks the invariants of slots, pages, microbatches and packets. At the end
every request must have the tokens of a sequential model, in bounded time.
"""

from collections import Counter

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from llama_jax.engine.pages import PagePool
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.sequence import Sequence
from llama_jax.ring.sizes import RingSizes
from tests.support.mock_executor import POISON, VOCAB_SIZE, generate
from tests.support.scheduler_trial import Request, Trial, make_sizes, numbered


def cost(request: Request, trial: Trial) -> int:
    """An upper bound on the ticks that the oldest request takes.

    The oldest is never preempted, and has or may take all pages. Each tick brings at least half a
    chunk, then up to P - 1 ticks pass until a microbatch has a row for it, then it gets a token
    every P ticks, and its last result is read late.
    """
    chunks = -(-request.max_length // trial.sizes.max_chunk)
    return 2 * chunks + 1 + trial.stages * (1 + request.max_tokens) + trial.stages + max(trial.late)


def run(sizes: RingSizes, stages: int, late: list[int], requests: list[Request]) -> Trial:
    """A whole trace, with all checks."""
    trial = Trial(sizes, stages, late)
    accepted = {}
    last = max((max(r.arrival, r.abort or 0) for r in requests), default=0)
    for tick in range(last + 1):
        for request_id, request in enumerate(requests):
            if request.arrival == tick:
                # The client refuses requests that can never fit the cache.
                if -(-(request.max_length - 1) // sizes.page_size) <= sizes.num_pages:
                    trial.add(request_id, request)
                    accepted[request_id] = request
            if request.abort == tick:
                trial.abort(request_id)
        trial.step()
    trial.drain()

    for request_id, request in accepted.items():
        reason, ended = trial.ended[request_id]
        tokens, expected_reason = request.answer
        if reason == "abort":
            tokens = tokens[: len(trial.tokens[request_id])]
        else:
            assert reason == expected_reason
        assert trial.tokens[request_id] == tokens
        # Twice: a sequence that is preempted begins again.
        bound = last + 2 * sum(cost(r, trial) for r in accepted.values())
        assert ended <= bound, f"starved: ended at {ended}, not by {bound}"
    check_order(trial)
    assert trial.scheduler.num_generated_tokens == sum(map(len, trial.tokens.values()))
    return trial


def check_order(trial: Trial) -> None:
    """First come, first served among equally important ones, but for short prompts."""
    begun: dict[int, tuple[int, Sequence]] = {}
    for tick, packet in enumerate(trial.packets):
        for tile in packet.tiles:
            begun.setdefault(tile.sequence.arrival, (tick, tile.sequence))
    for arrival, (tick, sequence) in begun.items():
        overtaken = [
            i
            for i, (later, other) in begun.items()
            if i < arrival and tick < later and other.params.priority <= sequence.params.priority
        ]
        if overtaken:
            assert sequence.num_prompt - sequence.num_cached <= 8 * trial.sizes.max_chunk


# Made once: to make a strategy takes as long as to draw from it.
GAP = st.sampled_from([0, 0, 0, 1, 2, 9])
ABORT = st.sampled_from([None, None, None, 0, 1, 2, 5, 10, 30])
STEMS = st.lists(st.lists(st.integers(0, POISON), min_size=1, max_size=3), min_size=1)
STOP_IDS = st.sets(st.integers(0, 20), max_size=2)
SALT = st.sampled_from([b"", b"", b"salt"])
PRIORITY = st.sampled_from([0, 0, 0, -1, 2])


@st.composite
def traces(draw):
    """Small sizes, few pages and many requests at once, so that everything runs short."""
    stages = draw(st.integers(1, 4))
    page_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    max_len = draw(st.integers(2, 40))
    pages_of_longest = -(-max_len // page_size)
    sizes = make_sizes(
        num_pages=draw(st.integers(-(-pages_of_longest // 2), 2 * pages_of_longest)),
        page_size=page_size,
        max_rows=draw(st.integers(1, 4)),
        stages=stages,
        tile=draw(st.sampled_from([1, 2, 4, 8])),
        tiles=draw(st.integers(1, 3)),
        max_len=max_len,
    )
    late = draw(st.lists(st.integers(0, stages + 5), min_size=1, max_size=7))
    requests: list[Request] = []
    arrival = 0
    stems = draw(STEMS)
    for _ in range(draw(st.integers(2, 14))):
        arrival += draw(GAP)
        abort = draw(ABORT)
        length = draw(st.integers(1, max_len - 1))
        prompt = stems[draw(st.integers(0, len(stems) - 1))] * length
        if requests and draw(st.booleans()):  # the next turn of a chat
            earlier = requests[draw(st.integers(0, len(requests) - 1))]
            prompt = [*earlier.prompt, *earlier.answer[0], *prompt]
        requests.append(
            Request(
                prompt=prompt[:length],
                max_tokens=max_len - length - draw(st.integers(0, max_len - length - 1)),
                arrival=arrival,
                abort=None if abort is None else arrival + abort,
                stop_ids=frozenset(draw(STOP_IDS)),
                salt=draw(SALT),
                priority=draw(PRIORITY),
            )
        )
    return sizes, stages, late, requests


@settings(deadline=None, max_examples=200)
@given(traces())
def test_any_trace(trace):
    trial = run(*trace)
    event(f"preemptions: {min(trial.scheduler.num_preemptions, 3)}")
    event(f"mixed packets: {any(p.rows and p.tiles for p in trial.packets)}")
    event(f"cached pages: {min(trial.cached_tokens // trial.sizes.page_size, 10)}")


@pytest.mark.slow
@settings(deadline=None, max_examples=8_000)
@given(traces())
def test_any_of_many_traces(trace):
    run(*trace)


# --- limits -----------------------------------------------------------------------------------


def test_a_request_may_fill_the_cache_but_for_its_last_token():
    trial = Trial(make_sizes(num_pages=2, page_size=4), 2)
    trial.add(0, Request(numbered(6), 3))  # 8 tokens are written; the ninth is only read
    trial.drain()
    assert trial.ended[0][0] == "length" and len(trial.tokens[0]) == 3


def test_max_model_len_limits_prompt_and_answer():
    trial = Trial(make_sizes(num_pages=20), 2)
    trial.add(1, Request(numbered(6), 30), max_model_len=8)
    trial.drain()
    assert len(trial.tokens[1]) == 2 and trial.ended[1][0] == "length"


def test_requests_that_the_client_should_have_refused_are_defects():
    trial = Trial(make_sizes(num_pages=2, page_size=4), 2)
    trial.add(0, Request(numbered(2), 1))
    for request_id, request, limit in (
        (0, Request(numbered(2), 1), 8),  # its id is in use
        (1, Request([], 1), 8),
        (1, Request(numbered(8), 1), 8),
        (1, Request(numbered(6), 4), 100),  # it can never fit the cache
    ):
        with pytest.raises(AssertionError):
            trial.add(request_id, request, max_model_len=limit)
    trial.drain()
    assert set(trial.ended) == {0}


def test_a_request_id_may_be_used_again_after_its_end():
    trial = Trial(make_sizes(num_pages=20), 2)
    trial.add(0, Request(numbered(2), 1))
    trial.drain()
    trial.ended.clear()
    trial.add(0, Request(numbered(3), 2))
    trial.drain()
    assert trial.tokens[0] == generate(numbered(3), 5)[0]


def test_the_unfinished_requests_are_counted():
    trial = Trial(make_sizes(num_pages=20), 2)
    trial.add(0, Request(numbered(2), 1))
    trial.add(1, Request(numbered(2), 1))
    assert trial.scheduler.num_unfinished == 2
    trial.drain()
    assert set(trial.ended) == {0, 1} and trial.scheduler.num_unfinished == 0


# --- pages ------------------------------------------------------------------------------------


def test_the_youngest_gives_up_its_pages_and_still_gets_its_tokens():
    # Three sequences of 2 pages each at the start, and of 4 at the end, share 8 pages.
    trial = Trial(make_sizes(num_pages=8, page_size=2, max_rows=3, stages=1, tile=4), 1)
    requests = [Request(numbered(3, 5 * i), 5) for i in range(3)]
    for request_id, request in enumerate(requests):
        trial.add(request_id, request)
    preempted = []
    while trial.scheduler.has_work:
        running = {s.request_id: s.epoch for s in trial.live}
        trial.step()
        preempted += [
            s.request_id for s in trial.scheduler.waiting if s.request_id in running and s.epoch
        ]
    trial.drain()
    assert trial.scheduler.num_preemptions >= 1
    assert preempted[0] == 2 and 0 not in preempted
    assert [trial.tokens[i] for i in range(3)] == [r.answer[0] for r in requests]


def test_preemptions_are_counted_by_request_when_it_ends():
    trial = Trial(make_sizes(num_pages=8, page_size=2, max_rows=3, stages=1, tile=4), 1)
    scheduler, times = trial.scheduler, Counter(dict.fromkeys(range(3), 0))
    preempt = scheduler.roster.preempt

    def note(sequence: Sequence) -> None:
        times[sequence.request_id] += 1
        preempt(sequence)

    scheduler.roster.preempt = note
    for request_id in range(3):
        trial.add(request_id, Request(numbered(3, 5 * request_id), 5))
    for _ in range(100):
        if times[2]:
            break
        trial.step()
    trial.abort(2)  # while it waits to be computed again
    assert sum(scheduler.requests_by_preemptions[1:]) == 1
    trial.drain()
    by_times = Counter(times.values())
    assert scheduler.requests_by_preemptions == [by_times[count] for count in range(9)]
    assert scheduler.request_preemptions == times.total() == scheduler.num_preemptions


def test_a_preempted_request_is_served_before_younger_ones():
    trial = Trial(make_sizes(num_pages=5, page_size=2, max_rows=2, stages=1, tile=4), 1)
    trial.add(0, Request(numbered(3), 6))
    trial.add(1, Request(numbered(3, 9), 6))
    while not trial.scheduler.num_preemptions:
        trial.step()
    trial.add(2, Request(numbered(1), 1))
    assert [s.request_id for s in trial.scheduler.waiting] == [1, 2]
    assert trial.scheduler.num_queued_tokens == 3 + len(trial.tokens[1]) + 1
    trial.drain()
    ends = {request_id: tick for request_id, (_, tick) in trial.ended.items()}
    assert ends[0] <= ends[1]


def test_pages_are_free_when_the_last_packet_has_entered_before_its_result_is_read():
    trial = Trial(make_sizes(num_pages=2, page_size=2, max_rows=1, stages=4), 4, late=[9])
    trial.add(0, Request(numbered(2), 3))
    packets = [trial.step() for _ in range(8)]  # the prompt, three rotating ticks, a row, ...
    assert [s.position for packet in packets for s in packet.rows] == [2]
    assert trial.scheduler.pool.num_free == 0
    assert [s.position for s in trial.step().rows] == [3]  # the last
    assert trial.scheduler.pool.num_free == 2 and trial.tokens[0] == []
    assert not trial.scheduler.has_work and trial.scheduler.num_unfinished == 1
    trial.drain()
    assert trial.tokens[0] == generate(numbered(2), 5)[0]


def test_a_page_cannot_be_given_back_twice():
    pool = PagePool(2)
    (page,) = pool.take(1)
    pool.give_back([page])
    with pytest.raises(ValueError, match=f"{page}"):
        pool.give_back([page])
    assert set(pool.take(2)) == {0, 1}
    with pytest.raises(IndexError):
        pool.take(1)


# --- microbatches and chunks ------------------------------------------------------------------


def test_a_burst_is_spread_over_the_microbatches():
    trial = Trial(make_sizes(num_pages=64, max_rows=4, stages=4, tile=4, tiles=4), 4)
    for request_id in range(8):
        trial.add(request_id, Request(numbered(2, request_id), 20))
    for _ in range(4):
        assert len(trial.step().tiles) == 2  # in one turn of the ring, side by side in a chunk
    assert [len(microbatch) for microbatch in trial.scheduler.microbatches] == [2, 2, 2, 2]
    trial.drain()


def test_requests_that_wait_for_pages_do_not_raise_the_share():
    trial = Trial(make_sizes(num_pages=8, max_rows=8, stages=4, tile=4, tiles=4), 4)
    for request_id in range(20):
        trial.add(request_id, Request(numbered(6, request_id), 2))  # two pages, so four at once
    for _ in range(4):
        trial.step()
    assert [len(packet.tiles) // 2 for packet in trial.packets] == [1, 1, 1, 1]
    trial.drain()


def test_chunks_of_a_prompt_enter_in_consecutive_ticks():
    trial = Trial(make_sizes(num_pages=20, max_rows=2, stages=4, tile=2, tiles=2), 4)
    trial.add(0, Request(numbered(15), 2))
    packets = [trial.step() for _ in range(4)]
    positions = [[tile.position for tile in packet.tiles] for packet in packets]
    assert positions == [[0, 2], [4, 6], [8, 10], [12, 14]]
    assert [tile.ends for tile in packets[3].tiles] == [False, True]
    # The packet with the last chunk is now its microbatch.
    assert [len(microbatch) for microbatch in trial.scheduler.microbatches] == [0, 0, 0, 1]


def test_short_prompts_share_a_chunk():
    trial = Trial(make_sizes(num_pages=20, max_rows=4, stages=1, tile=4, tiles=3), 1)
    for request_id, length in enumerate((3, 5, 2)):
        trial.add(request_id, Request(numbered(length), 2))
    packet = trial.step()
    assert [(t.sequence.request_id, t.length) for t in packet.tiles] == [(0, 3), (1, 4), (1, 1)]
    trial.drain()


# --- ends -------------------------------------------------------------------------------------


def test_a_sequence_that_is_fully_sent_is_not_dispatched():
    trial = Trial(make_sizes(num_pages=20, stages=2), 2, late=[7])
    trial.add(0, Request(numbered(3), 4))
    trial.drain()
    positions = [s.position for packet in trial.packets for s in packet.rows]
    assert positions == [3, 4, 5]  # they yield the tokens at 4, 5 and 6, the last


def test_tokens_after_the_end_are_discarded():
    tokens, _ = generate(numbered(3), 20)
    stop = tokens[2]
    trial = Trial(make_sizes(num_pages=20, stages=2), 2, late=[7])
    trial.add(0, Request(numbered(3), 17, stop_ids=frozenset([stop])))
    trial.drain()
    assert trial.tokens[0] == tokens[: tokens.index(stop) + 1]
    assert trial.ended[0][0] == "stop"
    overshoot = sum(len(packet.rows) for packet in trial.packets) - tokens.index(stop)
    assert overshoot > 0, "results were not late enough"
    assert trial.scheduler.num_generated_tokens == tokens.index(stop) + 1


def test_nan_logits_end_only_that_request():
    trial = Trial(make_sizes(num_pages=20), 2, late=[3])
    trial.add(0, Request([20, POISON, 22], 5))
    trial.add(1, Request(numbered(3), 5))
    trial.drain()
    assert trial.ended[0][0] == "error" and trial.tokens[0] == []
    assert trial.tokens[1] == generate(numbered(3), 8)[0] and trial.ended[1][0] == "length"


@pytest.mark.parametrize("token", [-2, -1, VOCAB_SIZE])
def test_what_is_no_token_ends_a_request_at_any_place(token):
    trial = Trial(make_sizes(num_pages=20, stages=1), 1)
    trial.scheduler = scheduler = Scheduler(trial.sizes, 1, vocab_size=VOCAB_SIZE)
    trial.add(0, Request(numbered(4), 9))
    while len(trial.tokens[0]) < 2:
        trial.step()
    [output] = scheduler.process(scheduler.schedule(), [token], trial.sizes.max_rows)
    assert (output.token, output.finish_reason) == (None, "error") and not scheduler.has_work


@pytest.mark.parametrize("abort_at", range(30))
def test_abort_in_any_state(abort_at):
    """Waiting, half prefilled, decoding, preempted, fully sent, ended: the other continues."""
    sizes = make_sizes(num_pages=7, page_size=2, max_rows=2, stages=2, tile=2)
    victim, other = Request(numbered(7), 5, abort=abort_at), Request(numbered(4, 3), 8)
    trial = run(sizes, 2, [3], [other, victim])
    assert trial.ended[0][0] == "length" and trial.tokens[0] == other.answer[0]


def test_the_states_of_the_test_above_all_occur():
    sizes = make_sizes(num_pages=7, page_size=2, max_rows=2, stages=2, tile=2)
    trial = Trial(sizes, 2, [3])
    trial.add(0, Request(numbered(4, 3), 8))
    trial.add(1, Request(numbered(7), 5))
    states = set()
    sequence = trial.scheduler.waiting[1]
    while sequence.request_id not in trial.ended:
        if sequence in trial.scheduler.waiting:
            states.add("preempted" if sequence.epoch else "waiting")
        elif sequence.slot is not None:
            states.add("half prefilled" if sequence.prefilling else "decoding")
        else:
            states.add("fully sent")
        trial.step()
    assert states == {"waiting", "half prefilled", "decoding", "preempted", "fully sent"}


def test_a_prompt_that_was_never_computed_does_not_count():
    trial = Trial(make_sizes(num_pages=4), 2)
    trial.add(0, Request(numbered(7), 2))
    trial.add(1, Request(numbered(5), 2))
    trial.abort(1)
    assert trial.scheduler.num_prompt_tokens == 0
    trial.drain()
    assert trial.scheduler.num_prompt_tokens == 7


def test_aborting_an_unknown_request_does_nothing():
    trial = Trial(make_sizes(num_pages=4), 2)
    trial.scheduler.abort(5)
    assert not trial.scheduler.has_work


def test_a_result_of_an_earlier_epoch_does_not_count():
    """A request is aborted, and its id used again: tokens of the first must not come out."""
    trial = Trial(make_sizes(num_pages=20, stages=2), 2, late=[7])
    trial.add(0, Request(numbered(3), 9))
    for _ in range(5):
        trial.step()
    trial.abort(0)
    trial.ended.clear()
    trial.add(0, Request(numbered(4, 11), 6))
    trial.drain()
    assert trial.tokens[0] == generate(numbered(4, 11), 10)[0]
