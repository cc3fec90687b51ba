"""The definitions of utilization that have a unit of their own, counted over a second."""

import pytest

from llama_jax.plan.report.reference_question import outlook


def test_bytes_and_flop_of_a_second():
    """8 requests/s of 1,024 + 256 tokens on 4x2 H100: an eighth of 70B on each GPU."""
    seen = outlook()
    state, chunk = seen.candidate.state(), seen.candidate.chunk
    used = {name: figure.value.expected for name, figure in seen.utilization.items()}
    rate, prompt, answer = 8, 1024, 255
    context, token = 1024 + 128, 40_960  # bytes of the cache

    matrices = 80 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    pairs = prompt * prompt / 2 + answer * context
    flop = rate * (2 * matrices * (prompt + answer) + 4 * 64 * 128 * 80 * pairs) / 8
    assert used["matrix peak"] == pytest.approx(flop / 989e12, rel=1e-6)

    norms = (20 * 2 + 1) * 8192 * 2
    weights = 2 * (matrices + 8192 * 128256) / 8 + norms  # the embedding is not read
    mean_prefix = (prompt - chunk) / 2 + (chunk + 1) / 2
    keys = rate * token * (answer * context + prompt / chunk * mean_prefix)
    read = 4 / state.mean_tpot * weights + keys
    assert used["HBM bandwidth"] == pytest.approx(read / 3.35e12, rel=1e-6)
