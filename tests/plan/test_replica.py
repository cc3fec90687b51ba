"""The ticks and the cache of a replica under a load."""

from dataclasses import replace

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Layout
from llama_jax.costs.gpus import find_gpu
from llama_jax.costs.memory import parameters
from llama_jax.costs.work import Work
from llama_jax.plan.candidate import ALONE
from llama_jax.plan.figures import communication, figures
from llama_jax.plan.headroom import headrooms
from llama_jax.plan.plan import Question, make_plan
from llama_jax.plan.reasons import missed_text
from llama_jax.plan.targets import Targets, Workload

QUESTION = Question(
    "llama3-70b",
    LlamaConfig.llama3_70b(),
    find_gpu("h100-sxm"),
    8,
    Workload(1024, 256, 8.0),
    Targets(0.5, 0.05, 0.85),
)


def test_a_tick_is_in_the_middle_of_an_answer_and_of_a_prompt():
    replica = QUESTION.candidate(Layout(4, 2)).replica
    keys = 10 * (1024 + 128)
    assert replica.work(10, 0) == Work(16, 0, keys)  # the bucket for 10 rows
    # Chunks of 256 have 0, 256, 512 or 768 tokens before them.
    pairs, of_tiles = 256 * 384 + 256 * 257 / 2, 4 * 384 + 64 + 128 + 192 + 256
    assert replica.work(10, 256) == Work(16, 256, keys, pairs, of_tiles)
    # A chunk of 2,048 holds two prompts.
    whole = 64 * sum(range(1, 17))
    assert replica.work(10, 2048) == Work(16, 2048, keys, 1024 * 1025, 2 * whole)


def test_the_cache_holds_the_live_sequences_and_a_prompt():
    candidate = QUESTION.candidate(Layout(4, 2))
    live = candidate.state().most_live
    assert candidate.kv_needed == pytest.approx(live * 1152 + 1024)


def test_the_share_of_communication_spans_what_the_parts_of_a_tick_allow():
    model = QUESTION.candidate(Layout(1, 8)).replica.model
    work = Work.of(32, 1000, 256, 512)
    parts = model.parts(work)
    moved = parts.pop("communication")
    shares = [
        part / (part + sum(getattr(other, end) for other in parts.values()))
        for part in (moved.low, moved.high)
        for end in ("low", "high")
    ]
    found = communication(model, work)
    assert (found.low, found.high) == pytest.approx((min(shares), max(shares)))
    assert found.expected == pytest.approx(moved.expected / model.expected(work))


def test_tokens_are_counted_for_each_gpu():
    rate = figures(QUESTION.candidate(Layout(2, 2, 2)))["output rate of a GPU"]
    assert rate.value.expected == 8.0 * 256 / 8


def test_prompts_grow_up_to_the_context_of_the_model():
    free = replace(QUESTION, workload=Workload(1024, 256, 0.01), targets=Targets(memory_share=0.85))
    found = {h.what: h for h in headrooms(free, free.candidate(Layout(4, 2)))}
    assert (found["prompt length"].limit, found["prompt length"].then) == (8192 - 256, "")


def test_the_chunk_of_a_rate_that_is_too_high_is_that_of_the_highest_rate():
    replica = replace(QUESTION, gpu=find_gpu("a100-80")).candidate(Layout(2, 4)).replica
    most = replica.max_rate()
    assert 0 < most < 8
    assert all(replica.state(8, chunk).overload for chunk in replica.chunks)
    assert replica.excess(replica.state(most, replica.best_chunk(8))) <= 1
    # No rate keeps these targets: it is the chunk with which most can be done at all.
    hurried = replace(QUESTION, targets=Targets(0.01, 0.01)).candidate(Layout(4, 2)).replica
    assert hurried.max_rate() == 0
    assert not hurried.state(hurried.max_load(), hurried.best_chunk(1000)).overload


@pytest.mark.parametrize(("gpus", "layout"), [(1, Layout(1, 1)), (2, Layout(2, 1))])
def test_a_cpu_says_whether_its_memory_or_its_cache_is_too_small(gpus, layout):
    """16 layers with 8 heads of 64 numbers in float32, and 1 GiB of cache for all devices."""
    config, tokens = LlamaConfig.llama3_2_1b(), 30_000  # pages of 16
    asked = replace(
        QUESTION, config=config, gpu=find_gpu("cpu"), gpus=gpus,
        workload=Workload(tokens - 256, 256, 1e-6),
    )  # fmt: skip
    [missed] = asked.candidate(layout).missed
    each = tokens * 2 * 16 * 8 * 64 * 4 / gpus
    if gpus == 1:  # 4.9 GB of weights and 2.0 of cache of 8 GB, of which 85 % are allowed
        assert (missed.target, missed.bound) == ("memory", 0.85 * 8e9)
        assert missed.value > each + 4 * parameters(config)
    else:
        assert missed[:4] == ("KV cache", each, 2**30 / 2, "bytes")
        assert "--kv-cache-memory" in missed_text(missed)
        assert make_plan(replace(asked, gpus=2)).best.layout.replicas == 1  # the nearest


@pytest.mark.parametrize(("name", "page"), [("cpu", 16), ("h100-sxm", 64)])
def test_pages_have_the_size_that_the_engine_chooses(name, page):
    small = replace(QUESTION, config=LlamaConfig.llama3_2_1b(), gpu=find_gpu(name))
    replica = replace(small, workload=Workload(page, 1, 1.0)).candidate(Layout(1, 1)).replica
    assert replica.request == 2 * page
    whole = replica.memory.cache // (2 * 16 * 8 * 64 * page * (4 if name == "cpu" else 2))
    assert replica.memory.tokens == whole * page


def test_a_request_that_a_part_of_a_page_is_missing_for_misses_the_memory():
    candidate = QUESTION.candidate(Layout(4, 1))
    room = candidate.memory.tokens
    for tokens, fits in ((room, True), (room + 1, False)):
        other = replace(QUESTION, workload=Workload(tokens - 1, 1, 1e-6)).candidate(Layout(4, 1))
        assert other.fits == fits
        assert all(missed.excess > 1 for missed in other.missed)


def test_many_short_requests_are_limited_by_their_number():
    load = Workload(8, 256, 200.0)
    asked = replace(QUESTION, config=LlamaConfig.llama3_8b(), targets=Targets(5.0, 1.0, 0.85))
    [missed] = replace(asked, gpu=find_gpu("h200"), workload=load).candidate(Layout(1, 1)).missed
    assert (missed.target, missed.overload) == ("rate", "limit")
    assert "4,096 sequences" in missed_text(missed)
    [missed] = replace(asked, workload=load).candidate(Layout(1, 1)).missed
    assert missed.overload == "sequences"  # 420,000 tokens of cache are full before


def test_a_request_alone_is_answered_however_slow_the_device():
    """A prompt of 8,000 tokens takes a CPU more than 1,000 s, and is no overload."""
    slow = replace(
        QUESTION, config=LlamaConfig.llama3_8b(), gpu=replace(find_gpu("cpu"), memory_bytes=10**11),
        workload=Workload(8000, 16, ALONE), kv_cache_dtype="int8",
    )  # fmt: skip
    candidate = slow.candidate(Layout(1, 1))
    assert 1000 < candidate.state().ttft < float("inf")
    assert {missed.target for missed in candidate.missed} == {"TTFT", "TPOT"}
    most = replace(slow, targets=Targets(1e9, 1e9, 0.85)).candidate(Layout(1, 1)).max_rate
    assert 0 < most.expected < 1e-3
