"""The tokens that layers compute beyond those of a packet, as on GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import LlamaConfig
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.model import Llama
from llama_jax.ring import steps
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.stage import locate_tokens
from llama_jax.ring.static_args import StaticArgs, token_multiple
from tests.support.reference import drive, make_loop, make_model, reference_logits, save_model

VOCAB = 64


def wrong(model, loop):
    """The requests with a token that is not the best one by transformers."""
    rng = np.random.default_rng(0)
    requests = [
        (i, i, rng.integers(0, VOCAB, length).tolist(), SamplingParams(temperature=0, max_tokens=6))
        for i, length in enumerate((70, 3, 40))
    ]
    run = drive(loop, requests, keep_logits=False)
    found = []
    for number, _, prompt, _ in requests:
        tokens = run.tokens[number]
        logits = reference_logits(model, prompt + tokens)[len(prompt) - 1 : -1]
        behind = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
        if len(tokens) != 6 or (behind > 1e-3).any():
            found.append(number)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("nowhere", [True, False])
def test_they_change_nothing(nowhere, tmp_path, monkeypatch):
    """Written to a page, they destroy the tokens there."""
    sizes = dict(embed_dim=32, mlp_dim=48, num_layers=2, num_heads=4, num_kv_heads=2)
    model = make_model(vocab_size=VOCAB, **sizes)
    path = save_model(model, tmp_path)
    monkeypatch.setattr(steps, "token_multiple", lambda platform, bucket: 101)

    def locate_somewhere(static, segments):
        found = locate_tokens(static, segments)
        padding = jnp.arange(static.num_padding) % static.sizes.num_pages
        return found._replace(page=found.page.at[static.num_tokens :].set(padding))

    if not nowhere:
        monkeypatch.setattr("llama_jax.ring.stage.locate_tokens", locate_somewhere)
    loop = make_loop(path, "2x1", max_num_seqs=4, max_chunk=64, page_size=4, num_pages=80)
    assert bool(wrong(model, loop)) == (not nowhere)


def test_tokens_without_a_page_are_nowhere():
    """Those beyond the page table, of an empty row, behind the end of a tile, and padding."""
    sizes = RingSizes(
        num_slots=3, num_pages=64, page_size=4, pages_per_sequence=8, row_buckets=(3,),
        chunk_buckets=(0, 4), tile=4,
    )  # fmt: skip
    static = StaticArgs(LlamaConfig.llama3_8b(), sizes, Bucket(3, 4), Llama, token_multiple=8)
    pages = range(10, 18)
    segments = [[0, 31, 1, *pages], [1, 32, 1, *pages], [2, 5, 0, *pages], [0, 2, 3, *pages]]
    found = jax.jit(locate_tokens, static_argnums=0)(static, np.array(segments))
    assert found.page.tolist() == [17, 64, 64, 10, 10, 11, 64, 64]
    assert found.position.tolist() == [31, 32, 5, 2, 3, 4, 5, 0]
    assert found.offset.tolist() == [3, 0, 1, 2, 3, 0, 1, 0]


def test_only_gpus_need_them_and_only_with_a_chunk():
    assert token_multiple("cpu", Bucket(1, 64)) == 1
    assert token_multiple("gpu", Bucket(1, 0)) == 1
    assert token_multiple("gpu", Bucket(1, 64)) == 8
