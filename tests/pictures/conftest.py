"""A mesh and a recorded run for all tests of pictures."""

import pytest
from jax.sharding import Mesh

from llama_jax.engine.recording import Recording
from sharding.mesh import make_mesh
from tests.support.picture_inputs import recorded_run


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    return make_mesh("4x2")


@pytest.fixture(scope="session")
def recording() -> Recording:
    return recorded_run()
