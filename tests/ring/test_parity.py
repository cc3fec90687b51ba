"""The ring against transformers on PyTorch: same random weights, float32, logits and tokens.

Requests go through the ring as the engine drives it, and the logits are the ring's own. The page
pool starts full of NaN, so reading anything that was never written shows.
"""

import jax
import pytest

from tests.support.reference import (
    MESHES,
    ROPE_LLAMA3,
    distance,
    drive,
    greedy_requests,
    make_loop,
    make_model,
    restart,
    save_model,
)

# Numbers of layers that four stages do not divide, or fewer than four; vocabularies that eight
# ranks do not divide; the name says how many query heads share a KV head. Prompts go far beyond the
# 32 positions at which the scaling of ROPE_LLAMA3 starts.
CONFIGS = {
    "one": dict(vocab_size=250, num_heads=4, num_kv_heads=4, num_layers=4),
    "one-tied-llama3": dict(
        vocab_size=256, num_heads=4, num_kv_heads=4, num_layers=7, tied=True, rope=ROPE_LLAMA3
    ),
    "four-tied": dict(vocab_size=253, num_heads=8, num_kv_heads=2, num_layers=6, tied=True),
    "four-llama3": dict(
        vocab_size=131, num_heads=8, num_kv_heads=2, head_dim=16, num_layers=3, rope=ROPE_LLAMA3
    ),
    "eight": dict(vocab_size=129, num_heads=16, num_kv_heads=2, num_layers=4, embed_dim=48),
    "eight-tied-llama3": dict(
        vocab_size=199, num_heads=16, num_kv_heads=2, num_layers=5, tied=True, rope=ROPE_LLAMA3
    ),
}


# Every config on every mesh, with results read 0 to 5 ticks late. The quick tests have the largest
# buckets alone, which compile in a third of the time, and shorter answers; the crowded scenario of
# test_rules.py has all buckets.
SHORT_ANSWER, LONG_ANSWER = 48, 128
QUICK = {
    ("one-tied-llama3", "4x1"),
    ("four-llama3", "1x2"),
    ("eight", "2x2"),
    ("eight-tied-llama3", "4x2"),
}
PAIRS = [
    pytest.param(
        (name, mesh, (2 * i - j) % 6, short),
        marks=[] if short else [pytest.mark.slow],
        id=f"{name}-{mesh}{'-short' if short else ''}",
    )
    for i, name in enumerate(CONFIGS)
    for j, mesh in enumerate(MESHES)
    for short in (False, True)
    if not short or (name, mesh) in QUICK
]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory):
    """(PyTorch model, ring with nothing in it, ticks by which results are late, long answers)"""
    name, mesh, results_late, short = request.param
    model = make_model(**CONFIGS[name])
    loop = make_loop(
        save_model(model, tmp_path_factory.mktemp("model")),
        mesh,
        max_num_seqs=max(4, 2 * int(mesh[0])),
        max_chunk=64,
        page_size=8,
        num_pages=36,
        largest_only=short,
    )
    yield model, loop, results_late, SHORT_ANSWER if short else LONG_ANSWER
    jax.clear_caches()  # no other pair runs the same programs


def assert_agrees(model, request, run):
    far = distance(model, request, run)
    assert far.logits <= 1e-4
    assert far.tokens <= 1e-3


def test_prompts_of_every_length(pair):
    """From one token to three chunks, nothing preempted or aborted."""
    model, compiled, results_late, _ = pair
    loop = restart(compiled, results_late)
    requests = greedy_requests(
        (1, 7, 150, 40, 64), vocab_size=model.config.vocab_size, max_tokens=5, ticks_apart=6
    )
    run = drive(loop, requests)
    assert loop.scheduler.num_preemptions == 0
    for request in requests:
        assert len(run.tokens[request.request_id]) == 5
        assert_agrees(model, request, run)


def test_long_answers(pair):
    """Many greedy tokens, while other requests are preempted and aborted."""
    model, compiled, results_late, length = pair
    loop = restart(compiled, results_late)
    lengths = (5, 70, 33, 150, 12, 100, 64, 3, 90, 20)
    requests = greedy_requests(lengths, vocab_size=model.config.vocab_size, max_tokens=length)
    aborts = {9: 30, 1: 60, 3: 200} if length == LONG_ANSWER else {9: 30, 1: 40, 3: 80}
    run = drive(loop, requests, aborts=[(tick, number) for number, tick in aborts.items()])
    assert loop.scheduler.num_preemptions >= (8 if length == LONG_ANSWER else 4)
    assert [len(run.tokens[i]) for i in range(10) if i not in aborts] == [length] * 7
    assert [bool(run.tokens[i]) for i in aborts] == [False, True, True]  # the first still waited
    for request in requests:
        if run.tokens[request.request_id]:
            assert_agrees(model, request, run)


def test_shared_beginnings(pair):
    """Prompts that begin alike share pages: at once, during the answer, and after its end."""
    model, compiled, results_late, _ = pair
    loop = restart(compiled, results_late)
    lengths = (90, 17, 30, 5, 40)
    requests = greedy_requests(lengths, vocab_size=model.config.vocab_size, max_tokens=6)
    system = requests[0].prompt[:75]  # 9 pages of 8 tokens, and 3 tokens
    ticks = (0, 0, 3, 9, 200)
    requests = [
        request._replace(tick=tick, prompt=[*system, *request.prompt])
        for request, tick in zip(requests, ticks, strict=True)
    ]
    run = drive(loop, requests)
    assert loop.scheduler.num_preemptions == 0
    assert loop.scheduler.num_cached_tokens >= 4 * 72
    for request in requests:
        assert len(run.tokens[request.request_id]) == 6
        assert_agrees(model, request, run)
