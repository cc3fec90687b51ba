"""Masks over a vocabulary that is split over the mesh, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.constraint import Constraint
from llama_jax.model.token_masks import apply_masks, encode_masks
from llama_jax.ring.choosing import mask_step
from llama_jax.ring.tick import StepOutput
from sharding.axes import AXES
from sharding.mesh import make_mesh
from tests.support.reference import MESHES

SPLIT = P(None, AXES)


@pytest.mark.parametrize(
    ("mesh", "vocab_size"),  # 256 is split between words
    [
        pytest.param(mesh, size, marks=[] if i % 4 == j else [pytest.mark.slow])
        for i, mesh in enumerate(MESHES)
        for j, size in enumerate((250, 256, 300, 40))
    ],
)
def test_only_allowed_tokens_keep_their_logits(mesh, vocab_size):
    rng = np.random.default_rng(vocab_size)
    devices = make_mesh(mesh)
    padded = -(-vocab_size // devices.size) * devices.size
    logits = rng.normal(size=(4, padded)).astype(np.float32)
    logits[:, vocab_size:] = -np.inf
    logits[3, 5] = np.nan
    allowed = [rng.permutation(vocab_size)[:count].tolist() for count in (1, 7, vocab_size - 1)]
    masks = [
        Constraint(SamplingParams(allowed_token_ids=tuple(ids)), vocab_size).mask([0], 1, ())
        for ids in allowed
    ]
    rows = [(0, masks[0]), (1, masks[1]), (3, masks[2])]  # the third row has no mask
    places, packed = encode_masks(4, rows, vocab_size, devices.size, capacity=4)
    assert places.tolist() == [0, 1, 3, 4]  # the fourth is none
    apply = jax.shard_map(
        apply_masks, mesh=devices, in_specs=(SPLIT, SPLIT), out_specs=SPLIT, check_vma=False
    )
    found = np.asarray(jax.jit(apply)(logits[[0, 1, 3, 2]], packed))

    expected = logits.copy()
    for row, ids in zip((0, 1, 3), allowed, strict=True):
        expected[row, [i for i in range(padded) if i not in ids]] = -np.inf
    expected[3, 5] = np.nan
    np.testing.assert_array_equal(found, expected[[0, 1, 3, 2]])


def test_only_rows_with_a_mask_get_another_token():
    """There is room for more masks than rows have; what fills it up changes nothing."""
    vocab_size, mesh = 40, make_mesh("1x2")
    logits = np.random.default_rng(0).normal(size=(4, vocab_size)).astype(np.float32)
    logits[3, 7] = 10
    mask = Constraint(SamplingParams(allowed_token_ids=(5, 30)), vocab_size).mask([0], 1, ())
    packed = encode_masks(4, [(3, mask)], vocab_size, mesh.size, capacity=4)
    best, slots = logits.argmax(axis=1).astype(np.int32), np.array([2, 0, 4, 1], np.int32)
    before = np.full(5, -7, np.int32)
    tokens, output = mask_step(mesh)(jnp.array(before), StepOutput(logits, best, slots), *packed)
    masked = max((5, 30), key=lambda token: logits[3, token])
    assert tokens.tolist() == [-7, masked, -7, -7, -7]
    assert output.tokens.tolist() == [*best[:3], masked]
    np.testing.assert_array_equal(output.logits[:3], logits[:3])
    assert np.flatnonzero(np.isfinite(output.logits[3])).tolist() == [5, 30]
