"""More tensor-parallel ranks than KV heads: neighbors hold the same head, and nothing changes."""

import jax
import numpy as np
import pytest

from convert.inspection import device_shares
from llama_jax import Llama, ShardedLlama
from llama_jax.config import LlamaConfig
from llama_jax.interpret import capture, kv_cache
from tests.support.hooked import assert_close
from tests.support.quantized_checkpoint import save_quantized
from tests.support.reference import (
    ROPE_LLAMA3,
    distance,
    drive,
    greedy_requests,
    make_loop,
    make_model,
    reference_logits,
    save_model,
)

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
MODELS = {
    "two": dict(num_heads=8, num_kv_heads=2, num_layers=3, vocab_size=131, rope=ROPE_LLAMA3),
    "one": dict(num_heads=8, num_kv_heads=1, num_layers=4, vocab_size=129, tied=True, rope=YARN),
    "wide": dict(num_heads=8, num_kv_heads=2, head_dim=64, mlp_dim=512, num_layers=2),
}
RUNS = [
    ("two", "1x4", None),
    ("one", "2x4", None),
    ("two", "2x4", "int8"),
    ("wide", "1x4", "int4"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "quantization"), RUNS)
def test_answers_are_those_of_transformers(tmp_path, name, mesh, quantization):
    model = make_model(**MODELS[name])
    path = (
        save_quantized(model, tmp_path, quantization)
        if quantization
        else save_model(model, tmp_path)
    )
    seqs = 2 * int(mesh[0])
    loop = make_loop(path, mesh, max_num_seqs=seqs, max_chunk=64, page_size=8, num_pages=48)
    requests = greedy_requests((1, 70, 20), vocab_size=model.config.vocab_size, max_tokens=8)
    run = drive(loop, requests)
    for request in requests:
        assert len(run.tokens[request.request_id]) == 8
        far = distance(model, request, run)
        assert far.logits <= 1e-4
        assert far.tokens <= 1e-3
    jax.clear_caches()


def test_activations_and_cache_hold_each_head_once(tmp_path):
    theirs = make_model(**MODELS["two"] | {"num_layers": 1})
    path = save_model(theirs, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 131, (2, 20))
    _, expected = capture(Llama.from_pretrained(path), tokens, "layers.0.attention.*")
    model = ShardedLlama.from_pretrained(path, "1x4")
    logits, found = capture(model, tokens, "layers.0.attention.*")
    assert_close(logits, np.stack([reference_logits(theirs, t) for t in tokens.tolist()]))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert_close(found[name], value)
    for name, [cached] in zip(("key", "value"), kv_cache(model, tokens), strict=True):
        assert_close(cached, expected[f"layers.0.attention.{name}"])


@pytest.mark.parametrize(
    ("mesh", "held"),
    [("1x2", [range(0, 4), range(4, 8)]), ("1x16", [range(r // 2, r // 2 + 1) for r in range(16)])],
)
def test_inspection_names_the_heads_of_each_rank(mesh, held):
    shares = device_shares(LlamaConfig.llama3_70b(), mesh)
    assert [share.kv_heads for share in shares] == held
    assert [len(share.heads) for share in shares] == [64 // len(held)] * len(held)
