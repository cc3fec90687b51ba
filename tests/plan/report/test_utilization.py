"""The definitions of utilization that have a unit of their own, counted over a second."""

import pytest

from llama_jax.costs.memory import weight_bytes
from llama_jax.costs.work import Work
from llama_jax.plan.figures import communication, tick_work
from llama_jax.plan.report.floor import read_bytes
from llama_jax.plan.report.reference_question import LAYOUT, REQUIRED, TYPICAL, outlook, question

MATRICES = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)  # elements
NORMS = (20 * 2 + 1) * 8192 * 2  # bytes
WEIGHTS = 2 * (MATRICES + 8192 * 128256) / 8 + NORMS  # that a GPU reads: not the embedding
TOKEN = 40_960  # bytes of the cache


def test_bytes_and_flop_of_a_second():
    """8 requests/s of 1,024 + 256 tokens on 4x2 H100: an eighth of 70B on each GPU."""
    seen = outlook()
    state, chunk = seen.candidate.state(), seen.candidate.chunk
    used = {name: figure.value.expected for name, figure in seen.utilization.items()}
    rate, prompt, answer = 8, 1024, 255
    context = 1024 + 128

    pairs = prompt * prompt / 2 + answer * context
    flop = rate * (2 * MATRICES * (prompt + answer) + 4 * 64 * 128 * 80 * pairs) / 8
    assert used["matrix peak"] == pytest.approx(flop / 989e12, rel=1e-6)

    mean_prefix = (prompt - chunk) / 2 + (chunk + 1) / 2
    keys = rate * TOKEN * (answer * context + prompt / chunk * mean_prefix)
    read = 4 / state.mean_tpot * WEIGHTS + keys
    assert used["HBM bandwidth"] == pytest.approx(read / 3.35e12, rel=1e-6)


def test_a_request_alone_is_in_one_stage_at_a_time():
    """Counted tick by tick: the chunks of its prompt follow each other through 4 stages, and then
    each of 255 tokens passes them, a row of a program with one row. Then nothing runs."""
    rate = 1e-6
    seen = outlook().at_rate(rate)
    used = {name: figure.value.expected for name, figure in seen.utilization.items()}
    size, prompt, answer = seen.candidate.chunk, 1024, 255
    chunks = -(-prompt // size)
    with_chunk, decoding = chunks + 3, 4 * answer
    ticks = with_chunk + decoding
    assert used["stages busy"] == pytest.approx((chunks + answer) / ticks, rel=0.01)
    slots = ticks + with_chunk * size
    assert used["slots used"] == pytest.approx((prompt + answer) / slots, rel=0.01)
    read = rate * (ticks * WEIGHTS + answer * (1024 + 128) * TOKEN)
    assert used["HBM bandwidth"] == pytest.approx(read / 3.35e12, rel=0.01)


def test_data_moves_for_chunks_only_while_there_are_some():
    few, many = outlook().at_rate(1e-6), outlook()
    decode, chunk = (
        communication(seen.replica.model, tick_work(seen.candidate, size)).expected
        for seen, size in ((few, 0), (many, many.candidate.chunk))
    )
    assert few.communication.value.expected == pytest.approx(decode, rel=1e-3)
    assert decode < many.communication.value.expected < chunk


def test_a_tick_reads_all_weights_but_the_embedding():
    asked = question(TYPICAL, 8.0, REQUIRED, ("h100-sxm", "int8", LAYOUT))
    held = weight_bytes(deployment := asked.deployment(LAYOUT))
    assert held["scales"] > 0
    assert read_bytes(deployment, Work(1)) == sum(held.values()) - held["embedding"]
