"""The ways to lay a model on GPUs, and those that are refused."""

import itertools

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.costs.deployment import Layout
from llama_jax.plan.layouts import HOST_GPUS, LayoutError, check_layout, layouts, meshes
from llama_jax.weights.split import ShardingError

LLAMA = LlamaConfig.llama3_70b()


@pytest.mark.parametrize("gpus", [1, 2, 6, 8, 12, 24])
def test_every_possible_layout_is_found_once(gpus):
    """Brute force: 64 heads, 8 KV heads and an MLP of 28,672 columns can be split in 1, 2, 4, 8."""
    sizes = range(1, gpus + 1)
    expected = {
        Layout(p, r, n)
        for p, r, n in itertools.product(sizes, sizes, sizes)
        if p * r * n == gpus and r in (1, 2, 4, 8) and p * r <= HOST_GPUS
    }
    found = layouts(LLAMA, gpus)
    assert set(found) == expected and len(found) == len(expected)


def test_the_meshes_are_those_of_one_replica():
    assert {mesh.replicas for mesh in meshes(LLAMA)} == {1}
    assert max(mesh.gpus for mesh in meshes(LLAMA)) == HOST_GPUS
    assert Layout(4, 2) in meshes(LLAMA) and Layout(2, 3) not in meshes(LLAMA)


@pytest.mark.parametrize(
    ("layout", "error"),
    [
        (Layout(81, 1), LayoutError),  # more stages than layers
        (Layout(1, 3), ShardingError),  # 8 KV heads
        (Layout(1, 16), LayoutError),  # more than a host
    ],
)
def test_impossible_layouts_are_refused(layout, error):
    with pytest.raises(error):
        check_layout(LLAMA, layout)


def test_too_many_gpus_are_refused():
    with pytest.raises(LayoutError):
        layouts(LLAMA, 10**6)
