"""Masks of tokens that the host computes, against sets, while results are late and rows preempted.

The device's tokens can be computed by hand. In place of a grammar there is an automaton whose state
depends on every token of the answer, so that one token too many, too few or out of order shows.
"""

import time
import zlib
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.constraint import Constraint
from llama_jax.engine.errors import RequestError
from llama_jax.engine.scheduler import Scheduler
from llama_jax.engine.tick_loop import TickLoop
from llama_jax.ring.sizes import RingSizes
from tests.support.mock_executor import VOCAB_SIZE, MockExecutor, allowed_tokens, next_token

EOS = 3
EVERY = frozenset(range(VOCAB_SIZE))
THREADS = ThreadPoolExecutor(2)


def state(answer: list[int]) -> int:
    return zlib.crc32(bytes(answer))


def automaton(answer: list[int]) -> frozenset[int]:
    """What may follow an answer: half of the tokens; sometimes EOS alone; in a dead end nothing."""
    found = np.random.default_rng(state(answer))
    if found.random() < 0.05:
        return frozenset([EOS])
    if found.random() < 0.02:
        return frozenset()
    return frozenset(np.flatnonzero(found.random(VOCAB_SIZE) < 0.5).tolist())


class AutomatonMatcher:
    """Stands in for `llama_jax.engine.grammars.Matcher`, and takes its time."""

    def __init__(self) -> None:
        self._answer: list[int] = []
        self._mask: Future[np.ndarray] = THREADS.submit(self._compute)

    def take(self, token: int) -> None:
        assert self._mask.done(), "a token was chosen before its mask was known"
        assert token in automaton(self._answer), "a token was chosen that is not allowed"
        self._answer.append(token)
        self._mask = THREADS.submit(self._compute)

    def mask(self) -> np.ndarray:
        return self._mask.result()

    def _compute(self) -> np.ndarray:
        time.sleep(state(self._answer) % 3 / 10_000)
        mask = np.zeros(2, np.int32)
        for token in automaton(self._answer):
            mask[token // 32] |= np.int32(np.uint32(1 << token % 32).astype(np.int32))
        return mask


def allowed(params: SamplingParams, answer: list[int]) -> list[int]:
    """The tokens that may come next, as the fields of `SamplingParams` document them."""
    if not params.constrains:
        return sorted(EVERY)  # the device bans EOS, but this one does not know how to
    left = set(params.allowed_token_ids or EVERY)
    if params.grammar:
        left &= automaton(answer)
    for *before, last in params.bad_words:
        if answer[len(answer) - len(before) :] == before:
            left.discard(last)
    if len(answer) < params.min_tokens and not (params.grammar and left <= {EOS}):
        left.discard(EOS)
    return sorted(left)


def expected(prompt: list[int], params: SamplingParams, seed: int) -> tuple[list[int], str]:
    answer: list[int] = []
    while len(answer) < params.max_tokens:
        left = allowed(params, answer)
        if not left:
            return answer, "error"
        answer.append(next_token(prompt + answer, None if params.greedy else seed, left))
        if answer[-1] == EOS:
            return answer, "stop"
    return answer, "length"


tokens = st.integers(0, VOCAB_SIZE - 1)
constrained = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 1.0]),
    min_tokens=st.integers(0, 1),
    grammar=st.sampled_from(["", "automaton"]),
    allowed_token_ids=st.one_of(
        st.just(()), st.lists(tokens, min_size=1, max_size=30, unique=True).map(tuple)
    ),
    bad_words=st.lists(
        st.lists(st.integers(0, 12), min_size=1, max_size=3).map(tuple), max_size=30
    ).map(tuple),
)
requests = st.lists(
    st.tuples(st.integers(0, 20), st.lists(tokens, min_size=1, max_size=20), constrained),
    min_size=1,
    max_size=12,
)


def make_loop(stages: int, late: int, num_pages: int) -> TickLoop:
    sizes = RingSizes(
        num_slots=4 * stages,
        num_pages=num_pages,
        page_size=4,
        pages_per_sequence=12,
        row_buckets=(1, 2, 4),
        chunk_buckets=(0, 4, 8),
        tile=4,
    )
    executor = MockExecutor(sizes, stages)
    return TickLoop(Scheduler(sizes, stages), executor, late)  # type: ignore[arg-type]


def run(loop: TickLoop, arriving, aborts=()):
    answers: dict[int, list[int]] = defaultdict(list)
    reasons: dict[int, str] = {}
    waiting = sorted(enumerate(arriving), key=lambda item: item[1][0])
    tick = 0
    while waiting or loop.has_work:
        while waiting and waiting[0][1][0] <= tick:
            request_id, (_, prompt, params) = waiting.pop(0)
            matcher = AutomatonMatcher() if params.grammar else None
            loop.scheduler.add(
                request_id,
                prompt,
                params,
                max_model_len=48,
                seed=request_id,
                stop_ids=frozenset([EOS]),
                constraint=Constraint(params, VOCAB_SIZE, matcher) if params.constrains else None,
            )
        for at, request_id in aborts:
            if at == tick:
                loop.scheduler.abort(request_id)
        for output in loop.step():
            assert output.request_id not in reasons
            if output.token is not None:
                answers[output.request_id].append(output.token)
            if output.finish_reason:
                reasons[output.request_id] = output.finish_reason
        tick += 1
        assert tick < 5000
    assert loop.scheduler.num_running == 0
    assert loop.scheduler.pool.num_free == loop.sizes.num_pages
    return answers, reasons


@pytest.mark.parametrize("stages", [1, 2, 4])
@settings(deadline=None, max_examples=25)
@given(
    arriving=requests,
    late=st.integers(0, 5),
    num_pages=st.sampled_from([12, 16, 40]),
    aborts=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 11)), max_size=3),
)
def test_every_token_is_one_of_those_that_the_mask_allows(
    stages, arriving, late, num_pages, aborts
):
    loop = make_loop(stages, late, num_pages)
    answers, reasons = run(loop, arriving, aborts)
    aborted = {request_id for _, request_id in aborts}
    for request_id, (_, prompt, params) in enumerate(arriving):
        answer, reason = expected(prompt, params, request_id)
        if request_id in reasons:
            assert (answers[request_id], reasons[request_id]) == (answer, reason)
        else:
            assert request_id in aborted
            assert answers[request_id] == answer[: len(answers[request_id])]


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_preempted_requests_go_on_with_their_masks(stages):
    """As above, where preemption is certain."""
    rng = np.random.default_rng(stages)
    params = SamplingParams(max_tokens=24, grammar="automaton", bad_words=((1, 2), (5,)))
    arriving = [(i, rng.integers(0, 50, 9).tolist(), params) for i in range(24)]
    for late in (0, 2, 5):
        loop = make_loop(stages, late, num_pages=14)
        answers, reasons = run(loop, arriving)
        assert loop.scheduler.num_preemptions > 0
        for request_id, (_, prompt, _) in enumerate(arriving):
            assert (answers[request_id], reasons[request_id]) == expected(
                prompt, params, request_id
            )


@pytest.mark.parametrize("late", [0, 1, 2, 3, 4])
def test_results_are_read_early_only_for_a_mask(late):
    """With four stages, a row's last token is read in time if results are at most 3 ticks late."""
    unread: dict[str, list[int]] = defaultdict(list)
    for grammar in ("", "automaton"):
        loop = make_loop(4, late, num_pages=40)
        params = SamplingParams(max_tokens=20, temperature=0, grammar=grammar)
        matcher = AutomatonMatcher() if grammar else None
        loop.scheduler.add(
            0,
            [20, 17, 4],
            params,
            max_model_len=48,
            seed=0,
            stop_ids=frozenset(),
            constraint=Constraint(params, VOCAB_SIZE, matcher) if grammar else None,
        )
        original = loop.executor.run

        def record(*args, loop=loop, grammar=grammar, original=original):
            unread[grammar].append(len(loop._unread))
            return original(*args)

        loop.executor.run = record  # type: ignore[method-assign]
        while loop.has_work:
            loop.step()
    assert max(unread[""]) == late
    assert (unread["automaton"] == unread[""]) == (late <= 3)


def test_a_fixed_mask_does_not_depend_on_the_answer():
    fixed = SamplingParams(allowed_token_ids=(1, 2), bad_words=((3,),))
    assert not Constraint(fixed, VOCAB_SIZE).follows_answer
    assert Constraint(SamplingParams(bad_words=((3, 4),)), VOCAB_SIZE).follows_answer


def test_bad_words_are_those_of_the_answer():
    constraint = Constraint(SamplingParams(bad_words=((1, 2), (1, 1, 3), (7,))), VOCAB_SIZE)

    def banned(answer):
        return EVERY - set(allowed_tokens(constraint.mask([1, 1, *answer], 2, ())))

    assert banned([]) == {7}  # the prompt does not count
    assert banned([1]) == {7, 2}
    assert banned([1, 1]) == {7, 2, 3}
    assert banned([1, 1, 4]) == {7}


def test_nothing_to_choose_is_an_error_of_the_request():
    constraint = Constraint(SamplingParams(allowed_token_ids=(4,), bad_words=((4,),)), VOCAB_SIZE)
    with pytest.raises(RequestError) as caught:
        constraint.mask([1], 1, ())
    assert caught.value.param == "allowed_token_ids"
