"""Masks over a vocabulary that is split over the mesh, against NumPy."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.constraint import Constraint
from llama_jax.model.token_masks import apply_masks, encode_masks
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
