"""Sequences that begin alike share pages (prefix caching).

`test_scheduler.test_any_trace` checks the same on generated traces.
"""

import pytest

from llama_jax.engine.pages import PagePool, first_key, page_keys
from tests.support.mock_executor import POISON, generate
from tests.support.scheduler_trial import Request, Trial, make_sizes, numbered


def sent_positions(trial: Trial, request_id: int) -> list[int]:
    """The positions of the prompt tokens that a request sent."""
    tiles = [t for p in trial.packets for t in p.tiles if t.sequence.request_id == request_id]
    return [t.position + i for t in tiles for i in range(t.length)]


def test_equal_prompts_share_their_full_pages():
    trial = Trial(make_sizes(num_pages=20, page_size=4, max_rows=2, stages=2, tile=4, tiles=3), 2)
    requests = [Request(numbered(11), 3), Request([*numbered(10), 3], 3)]
    for request_id, request in enumerate(requests):
        trial.add(request_id, request)
    trial.step()  # the second begins in the packet that fills the pages of the first
    trial.step()
    first, second = trial.live
    assert first.pages[:2] == second.pages[:2] and first.pages[2] != second.pages[2]
    trial.drain()
    assert [trial.tokens[i] for i in range(2)] == [r.answer[0] for r in requests]
    assert sent_positions(trial, 1) == [8, 9, 10]
    assert (first.num_cached, second.num_cached, trial.scheduler.num_cached_tokens) == (0, 8, 8)


@pytest.mark.parametrize("late", [0, 7])
def test_the_next_turn_of_a_chat_finds_the_answer_before_it(late):
    sizes = make_sizes(num_pages=20, page_size=4, max_rows=2, stages=2, tile=4, tiles=3)
    trial = Trial(sizes, 2, late=[late])
    first = Request(numbered(6), 25)
    trial.add(0, first)
    trial.drain()
    second = Request(first.prompt + first.answer[0] + [3, 4], 3)
    trial.add(1, second)
    trial.drain()
    assert trial.tokens[1] == second.answer[0]
    # Its pages were given back when its last packet entered, before the last results were known.
    unknown = 1 + -(-late // trial.stages)
    assert sent_positions(trial, 1)[0] == (first.max_length - unknown) // 4 * 4


def test_an_answer_is_found_while_it_grows():
    sizes = make_sizes(num_pages=20, page_size=4, max_rows=2, stages=1, tile=4, tiles=3)
    trial = Trial(sizes, 1)
    trial.add(0, Request(numbered(6), 25))
    while len(trial.tokens[0]) < 12:
        trial.step()
    fork = Request([*numbered(6), *trial.tokens[0][:11], 3], 2)
    trial.add(1, fork)
    trial.step()
    assert sent_positions(trial, 1) == [16, 17] and len(trial.live) == 2
    trial.drain()
    assert trial.tokens[1] == fork.answer[0]


def test_shared_pages_need_not_be_free():
    trial = Trial(make_sizes(num_pages=6, page_size=4, max_rows=2, stages=2, tile=4, tiles=4), 2)
    trial.add(0, Request(numbered(14), 2))
    trial.add(1, Request([*numbered(13), 3], 2))  # 4 pages, of which 3 are shared
    trial.step()
    trial.step()
    assert len(trial.live) == 2 and trial.scheduler.pool.num_free == 1
    trial.drain()


def test_the_last_token_is_computed_even_if_all_pages_are_found():
    trial = Trial(make_sizes(num_pages=20, page_size=4, max_rows=2, stages=2, tile=4, tiles=3), 2)
    for request_id in range(2):
        trial.add(request_id, Request(numbered(8), 3))
        trial.drain()
    assert sent_positions(trial, 1) == [4, 5, 6, 7]
    assert trial.tokens[1] == trial.tokens[0]


@pytest.mark.parametrize(("salt", "caching"), [(b"another", True), (b"", False)])
def test_nothing_is_shared_across_salts_or_without_prefix_caching(salt, caching):
    trial = Trial(make_sizes(num_pages=20), 2, prefix_caching=caching)
    trial.add(0, Request(numbered(11), 3))
    trial.drain()
    trial.add(1, Request(numbered(11), 3, salt=salt))
    trial.drain()
    assert sent_positions(trial, 1) == list(range(11)) and trial.tokens[1] == trial.tokens[0]
    assert trial.scheduler.num_cached_tokens == 0


def test_no_salt_stands_for_the_beginning_of_a_text():
    """A client chooses its salt, which may be the key of a page that others know."""
    trial = Trial(make_sizes(num_pages=20, page_size=4), 2)
    trial.add(0, Request(numbered(11), 3))
    trial.drain()
    trial.add(1, Request(numbered(7, 4), 3, salt=page_keys(b"", numbered(4), 4)[0]))
    trial.add(2, Request(numbered(7, 4), 3, salt=page_keys(first_key(b""), numbered(4), 4)[0]))
    trial.drain()
    for request_id in (1, 2):
        assert sent_positions(trial, request_id) == list(range(7))
        assert trial.tokens[request_id] == generate(numbered(7, 4), 10)[0]


def test_a_preempted_request_finds_its_own_pages():
    trial = Trial(make_sizes(num_pages=9, page_size=2, max_rows=2, stages=1, tile=4, tiles=2), 1)
    trial.add(0, Request(numbered(4), 8))
    trial.add(1, Request(numbered(8, 9), 5))
    trial.drain()
    assert trial.scheduler.num_preemptions == 1 and trial.scheduler.num_cached_tokens == 0
    positions = sent_positions(trial, 1)
    assert positions[:8] == list(range(8)) and 0 not in positions[8:]
    assert trial.tokens[1] == generate(numbered(8, 9), 13)[0]


def test_every_prompt_token_counts_once_though_others_go_on_after_a_preemption():
    """The last prompt is preempted, and then finds more of itself than it had computed."""
    sizes = make_sizes(num_pages=10, page_size=4, max_rows=4, stages=1, tile=4, tiles=1)
    trial = Trial(sizes, 1)
    for request_id, request in enumerate(
        [Request(numbered(4, 9), 12), Request(numbered(4, 10), 12), Request(numbered(21), 3)]
    ):
        trial.add(request_id, request)
    for _ in range(10):
        trial.step()
    assert trial.scheduler.num_preemptions == 1
    trial.add(3, Request(numbered(21), 3, priority=-1))
    trial.drain()
    scheduler = trial.scheduler
    assert 0 < scheduler.num_cached_tokens
    assert scheduler.num_prompt_tokens + scheduler.num_cached_tokens == 4 + 4 + 21 + 21


def test_nothing_is_shared_with_a_request_whose_logits_are_nan():
    trial = Trial(make_sizes(num_pages=20), 2)
    for request_id in range(2):
        trial.add(request_id, Request([*numbered(5), POISON, *numbered(5)], 5))
        trial.drain()
    assert sent_positions(trial, 1) == list(range(11)) and trial.ended[1][0] == "error"


def test_pages_are_evicted_in_the_order_in_which_they_were_given_back():
    pool = PagePool(4)
    keys = [page_keys(b"", [i], 1)[0] for i in range(4)]
    pages = pool.take(3)
    for page, key in zip(pages, keys, strict=False):
        pool.publish(page, key)
    pool.give_back(pages[:2])
    pool.give_back(pages[2:])
    assert pool.num_free == 4 and pool.find(keys) == pages
    pool.share(pages[:1])  # in use again, and given back last
    pool.give_back(pages[:1])
    assert pool.take(1)[0] not in pages  # the page without content
    assert pool.take(3) == [pages[1], pages[2], pages[0]]
    assert pool.find(keys[:1]) == [] and pool.num_free == 0


def test_the_end_of_a_text_is_evicted_before_its_beginning():
    pool = PagePool(3)
    pages, keys = pool.take(3), [bytes([i]) for i in range(3)]
    for page, key in zip(pages, keys, strict=True):
        pool.publish(page, key)
    pool.give_back(pages)
    assert pool.take(1) == pages[2:] and pool.find(keys) == pages[:2]


def test_a_shared_page_is_free_when_its_last_owner_gives_it_back():
    pool = PagePool(1)
    (page,) = pool.take(1)
    pool.publish(page, b"key")
    pool.share([page])
    pool.give_back([page])
    assert (pool.num_free, pool.num_owners(page)) == (0, 1)
    pool.give_back([page])
    assert (pool.num_free, pool.num_owners(page)) == (1, 0)
    with pytest.raises(ValueError, match=f"{page}"):
        pool.give_back([page])


def test_a_second_page_with_the_same_content_is_not_published():
    pool = PagePool(2)
    first, second = pool.take(2)
    pool.publish(first, b"key")
    pool.publish(second, b"key")
    pool.give_back([second])
    assert pool.find([b"key"]) == [first]
    pool.withdraw([b"key", b"unknown"])
    assert pool.find([b"key"]) == []


def test_keys_of_pages_depend_on_every_token_before():
    keys = {
        page_keys(parent, tokens, len(tokens))[0]
        for parent in (b"", b"x")
        for tokens in ([1, 2], [2, 1], [1])
    }
    assert len(keys) == 6
