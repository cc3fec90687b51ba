"""Log-probabilities over a vocabulary that is split over the mesh, against NumPy in float64."""

import jax
import numpy as np
import pytest
import scipy.special
from jax.sharding import PartitionSpec as P

from llama_jax.config.sampling_params import MAX_LOGPROBS
from llama_jax.model.logprobs import Logprobs, scores
from sharding.axes import AXES
from sharding.mesh import make_mesh
from sharding.stages import round_up
from tests.support.reference import MESHES


@pytest.mark.parametrize(
    ("mesh", "vocab_size"),
    [
        pytest.param(mesh, size, marks=[] if i % 3 == j else [pytest.mark.slow])
        for i, mesh in enumerate(MESHES)
        for j, size in enumerate((13, 37, 400))
    ],
)
def test_log_probabilities(mesh, vocab_size):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, vocab_size)).astype(np.float32) * 4
    logits[1] = logits[1].round()  # ties
    logits[2] = 0
    logits[3, 5] = 1e4
    logits[4, 7] = -np.inf
    chosen = np.array([0, vocab_size - 1, 9, 5, 7, 12])
    device_mesh = make_mesh(mesh)
    padding = round_up(vocab_size, device_mesh.size) - vocab_size
    padded = np.pad(logits, ((0, 0), (0, padding)), constant_values=-np.inf)
    run = jax.shard_map(
        scores,
        mesh=device_mesh,
        in_specs=(P(None, AXES), P()),
        out_specs=(Logprobs(P(), P(), P()), P()),
        check_vma=False,
    )
    found, ranks = jax.tree.map(np.asarray, jax.jit(run)(padded, chosen))
    want = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(found.chosen, want[np.arange(6), chosen], rtol=1e-5, atol=1e-5)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :MAX_LOGPROBS]
    kept = order.shape[1]
    np.testing.assert_array_equal(found.tokens[:, :kept], order)
    np.testing.assert_allclose(
        found.top[:, :kept], np.take_along_axis(want, order, axis=1), rtol=1e-5, atol=1e-5
    )
    assert (found.top[:, kept:] == -np.inf).all()
    own = logits[np.arange(6), chosen]
    assert ranks.tolist() == (1 + np.sum(logits > own[:, None], axis=1)).tolist()
