"""The ring against transformers on PyTorch: same random weights, float32, logits and tokens.

Everything goes through the ring as the engine drives it, on every mesh, and the logits are its own.
The pool starts out full of NaN, so nothing that was not written may count.
"""

import pytest

from tests.support.reference import (
    MESHES,
    ROPE_LLAMA3,
    distance,
    drive,
    greedy_requests,
    make_loop,
    make_model,
    save_model,
)

# Layers that do not divide by four stages, or are fewer; vocabularies that do not divide by eight
# ranks; as many query heads a KV head as the name says. Prompts go far beyond the 32 positions at
# which the scaling of ROPE_LLAMA3 begins.
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


@pytest.fixture(scope="module", params=CONFIGS)
def config(request, tmp_path_factory):
    """(its place in the list, model, checkpoint)"""
    model = make_model(**CONFIGS[request.param])
    path = save_model(model, tmp_path_factory.mktemp(request.param))
    return list(CONFIGS).index(request.param), model, path


def assert_agrees(model, request, run):
    far = distance(model, request, run)
    assert far.logits <= 1e-4
    assert far.tokens <= 1e-3


@pytest.mark.parametrize("mesh", MESHES)
def test_logits(config, mesh):
    number, model, path = config
    num_stages = int(mesh[0])
    loop = make_loop(
        path,
        mesh,
        results_late=(number + MESHES.index(mesh)) % 6,
        max_num_seqs=2 * num_stages,
        max_chunk=64,
        page_size=8,
        num_pages=24 * num_stages,
    )
    lengths = (1, 7, 170, 40, 90, 64)  # up to three chunks
    requests = greedy_requests(lengths, vocab_size=model.config.vocab_size, max_tokens=8)
    run = drive(loop, requests)
    for request in requests:
        assert len(run.tokens[request.request_id]) == 8
        assert_agrees(model, request, run)


# Each config on each mesh, results 0 to 5 ticks late. The quick ones hold each config and each mesh
# once.
LONG_RUNS = [
    pytest.param(
        name, mesh, (i + 2 * j) % 6, marks=[] if i == j else [pytest.mark.slow], id=f"{name}-{mesh}"
    )
    for i, name in enumerate(CONFIGS)
    for j, mesh in enumerate(MESHES)
]


@pytest.mark.parametrize(("name", "mesh", "results_late"), LONG_RUNS)
def test_long_runs(name, mesh, results_late, tmp_path):
    """128 greedy tokens, while others are preempted and aborted."""
    model = make_model(**CONFIGS[name])
    loop = make_loop(
        save_model(model, tmp_path),
        mesh,
        results_late=results_late,
        max_num_seqs=max(4, 2 * int(mesh[0])),
        max_chunk=64,
        page_size=8,
        num_pages=36,
    )
    lengths = (5, 70, 33, 150, 12, 100, 64, 3, 90, 20)
    requests = greedy_requests(lengths, vocab_size=model.config.vocab_size, max_tokens=128)
    aborts = {9: 30, 1: 60, 3: 200}
    run = drive(loop, requests, aborts=[(tick, number) for number, tick in aborts.items()])
    assert loop.scheduler.num_preemptions >= 8
    assert [len(run.tokens[i]) for i in range(10) if i not in aborts] == [128] * 7
    assert [bool(run.tokens[i]) for i in aborts] == [False, True, True]  # the first still waited
    for request in requests:
        if run.tokens[request.request_id]:
            assert_agrees(model, request, run)
