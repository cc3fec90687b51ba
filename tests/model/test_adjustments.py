"""Biases and penalties over a vocabulary that is split over the mesh, against NumPy in float64."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.config.llama_config import MAX_EOS_TOKEN_IDS
from llama_jax.config.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from llama_jax.model.adjustments import (
    HISTORY_CHUNK,
    MAX_BIASES,
    adjust,
    count_tokens,
    encode_adjustments,
    extend_history,
)
from sharding.axes import AXES
from sharding.mesh import make_mesh
from tests.support.reference import MESHES

VOCAB, SLOTS = 40, 5
SPLIT = P(None, AXES)


def expected(logits, prompt, answer, params, biases):
    """The documented changes to one row."""
    logits = np.array(logits, np.float64)
    for token, bias in biases.items():
        logits[token] += bias
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(answer):
        logits[token] -= params.frequency_penalty * answer.count(token) + params.presence_penalty
    return logits


PARAMS = {
    "none": SamplingParams(),
    "presence": SamplingParams(presence_penalty=1.5),
    "negative presence": SamplingParams(presence_penalty=-2),
    "frequency": SamplingParams(frequency_penalty=0.7),
    "repetition": SamplingParams(repetition_penalty=1.3),
    "rewarded repetition": SamplingParams(repetition_penalty=0.5),
    "all": SamplingParams(presence_penalty=0.5, frequency_penalty=-0.3, repetition_penalty=1.1),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_adjust(mesh):
    rng = np.random.default_rng(0)
    n = len(PARAMS)
    logits = rng.normal(size=(n, VOCAB)).astype(np.float32) * 3
    prompts = rng.integers(0, VOCAB, (n, 6)).tolist()
    answers = [rng.integers(0, VOCAB, length).tolist() * 2 for length in range(n)]
    biases = [{}, {0: -100.0, VOCAB - 1: 100.0}, {}, {17: 2.5}, {3: -np.inf}, {}, {8: 1.0}]
    history = np.zeros((n, VOCAB), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        history[row, prompt] = 1
        np.add.at(history[row], answer, 2)
    rows = list(zip(range(n), PARAMS.values(), biases, strict=True))
    run = jax.jit(
        jax.shard_map(
            adjust,
            mesh=make_mesh(mesh),
            in_specs=(SPLIT, SPLIT, P()),
            out_specs=SPLIT,
            check_vma=False,
        )
    )
    found = np.asarray(run(logits, history, encode_adjustments(n, rows)))
    for row, params, bias in rows:
        want = expected(logits[row], prompts[row], answers[row], params, bias)
        np.testing.assert_allclose(found[row], want, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[0], logits[0])
    untouched = np.asarray(run(logits, history, encode_adjustments(n, [])))
    np.testing.assert_array_equal(untouched, logits)


@pytest.mark.parametrize("mesh", MESHES)
def test_history(mesh):
    """Prompts and answers of several chunks, a slot with another owner, and counted tokens."""
    rng = np.random.default_rng(0)
    specs = (SPLIT, P(), P(), P(), P())
    on = dict(mesh=make_mesh(mesh), out_specs=SPLIT, check_vma=False)
    extend = jax.jit(jax.shard_map(extend_history, in_specs=specs, **on))
    count = jax.jit(jax.shard_map(count_tokens, in_specs=(SPLIT, P(), P()), **on))
    history, expected = np.zeros((SLOTS, VOCAB), np.int32), np.zeros((SLOTS, VOCAB), np.int32)
    for slot, num_prompt, num_answer in (
        (2, 7, 0),
        (0, 700, 900),
        (2, 3, 4),
        (4, 1, HISTORY_CHUNK),
    ):
        tokens = rng.integers(0, VOCAB, num_prompt + num_answer).tolist()
        for first in range(0, len(tokens), HISTORY_CHUNK):
            chunk = np.full(HISTORY_CHUNK, -1, np.int32)
            part = tokens[first : first + HISTORY_CHUNK]
            chunk[: len(part)] = part
            history = extend(history, slot, chunk, first == 0, num_prompt - first)
        expected[slot] = 0
        expected[slot, tokens[:num_prompt]] = 1
        np.add.at(expected[slot], tokens[num_prompt:], 2)
    np.testing.assert_array_equal(history, expected)
    history = count(history, np.array([4, SLOTS, 0, 1]), np.array([39, 3, 0, -1]))
    expected[4, 39] += 2
    expected[0, 0] += 2
    np.testing.assert_array_equal(history, expected)


def test_a_row_has_room_for_all_biases_and_bans():
    assert MAX_BIASES >= MAX_LOGIT_BIAS + MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS
    biases = dict.fromkeys(range(MAX_BIASES), 1.0)
    assert encode_adjustments(1, [(0, SamplingParams(), biases)]).shape[0] == 1
