"""Which prompts begin when: priorities, and short prompts beside long ones."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_scheduler import traces
from tests.support.brute_scheduler import BruteScheduler, Job
from tests.support.scheduler_trial import Request, Trial, make_sizes, numbered

# --- against brute force ----------------------------------------------------------------------


def compare(sizes, stages, late, requests: list[Request]) -> None:
    """Runs a trace; every packet must be the one that brute force chooses."""
    trial = Trial(sizes, stages, late, prefix_caching=False)

    def known(request_id: int) -> int:
        return len(requests[request_id].prompt) + len(trial.tokens[request_id])

    brute = BruteScheduler(sizes, stages, known)
    last = max(max(r.arrival, r.abort or 0) for r in requests)
    arrivals = 0
    while trial.tick <= last or trial.scheduler.has_work:
        for request_id, request in enumerate(requests):
            fits = -(-(request.max_length - 1) // sizes.page_size) <= sizes.num_pages
            if request.arrival == trial.tick and fits:
                trial.add(request_id, request)
                rank = request.priority, arrivals
                brute.jobs.append(Job(request_id, rank, request.max_length))
                arrivals += 1
            if request.abort == trial.tick and request_id in trial.tokens:
                trial.abort(request_id)
        brute.jobs = [job for job in brute.jobs if job.request_id not in trial.ended]
        expected = brute.schedule()
        packet = trial.step()
        rows = [(s.sequence.request_id, s.position) for s in packet.rows]
        tiles = [(s.sequence.request_id, s.position, s.length) for s in packet.tiles]
        assert (rows, tiles) == expected
    assert trial.scheduler.num_preemptions == len(brute.victims)
    trial.drain()


@settings(deadline=None, max_examples=80)
@given(traces(), st.data())
def test_every_packet_is_the_one_that_brute_force_chooses(trace, data):
    sizes, stages, late, requests = trace
    for request in requests:
        request.salt = b""
        request.priority = data.draw(st.integers(-1, 1))
    compare(sizes, stages, late, requests)


# --- short prompts beside a long one ----------------------------------------------------------


def enters(trial: Trial, request_id: int) -> int:
    """The tick in which the last token of a prompt enters; the trial goes on until then."""
    while True:
        packet = trial.step()
        if any(t.ends and t.sequence.request_id == request_id for t in packet.tiles):
            return trial.tick - 1


def bound(tokens: int, trial: Trial) -> int:
    """The bound of docs/ring.md, in ticks."""
    chunk, tile = trial.sizes.max_chunk, trial.sizes.tile
    whole_tiles = -(-tokens // tile) * tile
    return -(-2 * whole_tiles // chunk) + 2 * trial.stages


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("tiles", [1, 2, 3, 8])
@pytest.mark.parametrize("arrival", [1, 2, 30, 61])
def test_a_short_prompt_enters_within_the_bound(stages, tiles, arrival):
    sizes = make_sizes(
        num_pages=110, page_size=32, max_rows=4, stages=stages, tile=4, tiles=tiles, max_len=3200
    )
    for length in {1, 4, 5, 4 * tiles, 8 * 4 * tiles}:
        trial = Trial(sizes, stages)
        trial.add(0, Request(numbered(3000), 2), max_model_len=4000)
        for _ in range(arrival):
            trial.step()
        trial.add(1, Request(numbered(length, 7), 2))
        ticks = enters(trial, 1) - arrival
        assert ticks <= bound(length, trial)
        # The long one keeps half of every chunk, or of every two if a chunk is one tile.
        sent = [sum(t.sequence.request_id == 0 for t in p.tiles) for p in trial.packets]
        left = 3000 // 4 - sum(sent)
        pairs = itertools.pairwise(sent)
        assert left <= 0 or all(2 * sum(pair) >= 2 * tiles for pair in pairs)


def test_a_prompt_that_is_not_short_waits_for_the_end_of_a_long_one():
    trial = Trial(make_sizes(num_pages=1000, max_rows=4, tile=4, tiles=2, max_len=4000), 2)
    trial.add(0, Request(numbered(800), 2), max_model_len=4000)
    trial.step()
    trial.add(1, Request(numbered(8 * 8 + 1, 5), 2))
    assert enters(trial, 0) < enters(trial, 1)
    order = [t.sequence.request_id for packet in trial.packets for t in packet.tiles]
    assert order == sorted(order)
    trial.drain()


def test_a_stream_of_short_prompts_neither_stops_a_long_one_nor_is_stopped():
    trial = Trial(make_sizes(num_pages=300, max_rows=40, tile=4, tiles=4, max_len=1000), 2)
    trial.add(0, Request(numbered(800), 2))
    latest = {}
    scheduler = trial.scheduler
    while 0 in {s.request_id for s in [*scheduler.waiting, *scheduler.prefilling]}:
        request_id = len(trial.tokens)
        trial.add(request_id, Request(numbered(7, request_id), 1))
        latest[request_id] = trial.tick
        trial.step()
    assert trial.tick <= 2 * 800 // 16 + 3
    for tick, packet in enumerate(trial.packets):
        for tile in packet.tiles:
            if tile.ends and tile.sequence.request_id:
                arrived = latest[tile.sequence.request_id]
                assert tick - arrived <= 2
    trial.drain()


def test_a_short_prompt_does_not_take_what_those_before_it_need():
    """Four pages are free beside the long prompt, and the next in line needs all of them."""
    sizes = make_sizes(num_pages=54, page_size=4, max_rows=4, tile=4, tiles=2, max_len=400)
    trial = Trial(sizes, 2)
    trial.add(0, Request(numbered(199), 1))  # 50 pages
    trial.step()
    trial.add(1, Request(numbered(79, 5), 1))  # 20 pages: not short
    trial.add(2, Request(numbered(3, 9), 1))
    for _ in range(10):
        trial.step()
    assert trial.scheduler.pool.num_free < 54
    assert [s.request_id for s in trial.scheduler.waiting] == [1, 2]
    trial.drain()


def test_a_prompt_that_will_find_the_pages_of_a_long_one_waits_for_them():
    """Else both would compute what they share."""
    trial = Trial(make_sizes(num_pages=500, max_rows=4, tile=4, tiles=2, max_len=400), 2)
    stem = numbered(120)
    trial.add(0, Request([*stem, *numbered(80, 3)], 2))
    trial.step()
    trial.add(1, Request([*stem, 5, 6, 7], 2))
    enters(trial, 1)
    sent = [t for p in trial.packets for t in p.tiles if t.sequence.request_id == 1]
    assert [(t.position, t.length) for t in sent] == [(120, 3)]
    assert trial.scheduler.prefilling, "it waited for the end of the long prompt"
    trial.drain()


# --- priorities -------------------------------------------------------------------------------


def test_the_most_important_request_begins_first():
    trial = Trial(make_sizes(num_pages=100, max_rows=1, stages=1), 1)
    for request_id, priority in enumerate([0, 5, 0, -3, 5, -3]):
        trial.add(request_id, Request(numbered(3, request_id), 3, priority=priority))
    trial.drain()
    ends = sorted(trial.ended, key=lambda request_id: trial.ended[request_id][1])
    assert ends == [3, 5, 0, 2, 1, 4]


def test_the_least_important_gives_up_its_pages_though_it_is_older():
    trial = Trial(make_sizes(num_pages=6, page_size=2, max_rows=2, stages=1, tile=4), 1)
    requests = [Request(numbered(3), 6, priority=1), Request(numbered(3, 9), 6)]
    for request_id, request in enumerate(requests):
        trial.add(request_id, request)
    trial.drain()
    assert trial.scheduler.num_preemptions >= 1
    preempted = {s.sequence.request_id for p in trial.packets for s in p.rows + p.tiles if s.epoch}
    assert preempted == {0}
    assert [trial.tokens[i] for i in range(2)] == [r.answer[0] for r in requests]


# --- one prompt, several choices --------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_choices_of_one_prompt_compute_it_once(caching):
    """Without prefix caching the server gives the choices of a request a salt of their own."""
    sizes = make_sizes(
        num_pages=1000, page_size=16, max_rows=8, stages=2, tile=64, tiles=2, max_len=2000
    )
    trial = Trial(sizes, 2, prefix_caching=caching)
    requests = [Request(numbered(1000), 1 + i, salt=b"private") for i in range(8)]
    for request_id, request in enumerate(requests):
        trial.add(request_id, request, max_model_len=2000)
    trial.drain()
    computed = trial.scheduler.num_prompt_tokens
    assert computed == sum(t.length for p in trial.packets for t in p.tiles)
    assert computed <= 1000 + 8 * 16
    assert [trial.tokens[i] for i in range(8)] == [r.answer[0] for r in requests]


def test_a_shared_system_prompt_is_computed_once():
    sizes = make_sizes(
        num_pages=1000, page_size=16, max_rows=8, stages=2, tile=64, tiles=2, max_len=2000
    )
    trial = Trial(sizes, 2)
    system = numbered(1000)
    requests = [Request([*system, *numbered(60, i)], 5) for i in (3, 8)]
    computed = []
    for request_id, request in enumerate(requests):
        before = trial.scheduler.num_prompt_tokens
        trial.add(request_id, request, max_model_len=2000)
        trial.drain()
        computed.append(trial.scheduler.num_prompt_tokens - before)
    assert computed[1] <= 0.1 * computed[0]
    assert [trial.tokens[i] for i in range(2)] == [r.answer[0] for r in requests]
