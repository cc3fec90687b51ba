"""The mesh, and the placement of layers and weights on its devices."""

import itertools
import os
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint import open_checkpoint
from llama_jax.checkpoint.load import load_params
from llama_jax.config import LlamaConfig
from llama_jax.weights.placement import param_specs, placements
from llama_jax.weights.split import ShardingError
from sharding.axes import AXES
from sharding.mesh import make_mesh, mesh_shape
from sharding.mesh_name import MeshError, parse_mesh
from sharding.stages import round_up, split_layers
from tests.support.paths import ROOT
from tests.support.tiny_checkpoint import write_checkpoint

SHAPES = {"1x1": (1, 1), "2x1": (2, 1), "4x1": (4, 1), "1x2": (1, 2), "2x2": (2, 2), "4x2": (4, 2)}
LLAMA_70B = LlamaConfig.llama3_70b()


@pytest.mark.parametrize("shape", SHAPES)
def test_make_mesh(shape):
    mesh = make_mesh(shape)
    assert mesh.axis_names == AXES == ("stage", "model")
    assert mesh_shape(mesh) == mesh.devices.shape == SHAPES[shape]
    # Ranks of one stage talk most, so they are neighbors in the list of devices.
    assert list(mesh.devices.flat) == jax.devices()[: mesh.size]


def test_given_devices_are_used():
    devices = jax.devices()[2:4]
    assert list(make_mesh("2x1", devices).devices.flat) == devices


@pytest.mark.parametrize("text", ["4x2", " 4 X 2 ", "4×2"])
def test_spellings_of_a_mesh(text):
    assert parse_mesh(text) == (4, 2)


@pytest.mark.parametrize("text", ["", "4", "x2", "4x", "0x1", "4x0", "-4x2", "4x2x1", "4.0x2", "a"])
def test_malformed_meshes_are_refused(text):
    with pytest.raises(MeshError):
        make_mesh(text)


def in_a_process(code: str, **environment: str) -> str:
    """Runs code in a fresh interpreter without the settings of conftest; returns its output."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**clean, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_virtual_devices_are_created_as_needed():
    code = (
        "from sharding.mesh import make_mesh; import jax\n"
        "print(make_mesh('4x2').devices.shape, len(jax.devices()))"
    )
    assert in_a_process(code) == "(4, 2) 8\n"


def test_the_first_mesh_may_be_smaller_than_a_later_one():
    code = (
        "from sharding.mesh import make_mesh; print(make_mesh('1x1').size, make_mesh('4x2').size)"
    )
    assert in_a_process(code, JAX_NUM_CPU_DEVICES="8") == "1 8\n"


def test_virtual_devices_after_jax_has_started():
    code = (
        "import jax; jax.devices()\n"
        "from sharding.mesh import MeshError, make_mesh\n"
        "print(make_mesh('1x1').size)\n"
        "try: make_mesh('4x2')\n"
        "except MeshError as error: print(error)"
    )
    size, error = in_a_process(code).splitlines()
    assert size == "1" and "JAX_NUM_CPU_DEVICES=8" in error
    assert in_a_process(code, JAX_NUM_CPU_DEVICES="8").splitlines() == ["1"]


def test_a_mesh_larger_than_the_devices():
    with pytest.raises(MeshError, match="4 devices"):
        make_mesh("2x2", jax.devices()[:3])


def test_an_absurdly_large_mesh_is_refused_at_once():
    with pytest.raises(MeshError, match="40000 devices"):
        make_mesh("20000x2")


def test_layers_that_divide():
    assert split_layers(8, 4) == ((0, 1), (2, 3), (4, 5), (6, 7))


def test_layers_that_do_not_divide_are_padded_at_the_end():
    assert split_layers(22, 4) == (
        (0, 1, 2, 3, 4, 5),
        (6, 7, 8, 9, 10, 11),
        (12, 13, 14, 15, 16, None),
        (17, 18, 19, 20, 21, None),
    )
    assert split_layers(2, 4) == ((0,), (1,), (None,), (None,))


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_layers", range(1, 20))
def test_every_layer_appears_once_and_in_order(num_layers, num_stages):
    stages = split_layers(num_layers, num_stages)
    held = [[layer for layer in stage if layer is not None] for stage in stages]
    assert [*itertools.chain(*held)] == list(range(num_layers))
    assert len({len(stage) for stage in stages}) == 1
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert len(stages[0]) == max(map(len, held))  # no more padding than necessary


@pytest.mark.parametrize(
    ("size", "parts", "expected"), [(128256, 8, 128256), (97, 8, 104), (1, 8, 8), (8, 1, 8)]
)
def test_padded(size, parts, expected):
    assert round_up(size, parts) == expected


@pytest.mark.parametrize(("num_stages", "num_ranks"), SHAPES.values(), ids=SHAPES)
def test_specs_of_all_weights(num_stages, num_ranks):
    specs = param_specs(LLAMA_70B, num_stages, num_ranks)
    assert specs.embedding == specs.lm_head == P(("stage", "model"), None)
    assert specs.final_norm == P(None)
    rows, columns = P("stage", "model", None), P("stage", None, "model")
    assert len(specs.layers) == 80 // num_stages
    for layer in specs.layers:
        assert layer == {
            "attention_norm.scale": P("stage", None),
            "attention.wqkv": rows,
            "attention.wo": columns,
            "mlp_norm.scale": P("stage", None),
            "mlp.w_gate_up": rows,
            "mlp.w_down": columns,
        }


def test_a_rank_holds_the_query_heads_of_its_kv_heads():
    place = placements(LLAMA_70B, 4, 2).layers[0]["attention.wqkv"]
    for rank in range(2):
        held = {}
        for source in place.sources:
            part, width = source.stored(0, rank, 2)
            assert part.stop - part.start == width
            name = source.tensor.hf_name.split(".")[-2]
            held[name] = {row // LLAMA_70B.head_dim for row in range(part.start, part.stop)}
        assert {head // 8 for head in held["q_proj"]} == held["k_proj"] == held["v_proj"]
        assert len(held["k_proj"]) == 4


def test_shapes_of_70b_on_8_gpus():
    table = placements(LLAMA_70B, 4, 2)
    assert table.embedding.shape == table.lm_head.shape == (128256, 8192)
    assert table.layers[0]["attention.wqkv"].shape == (4, 8192 + 2 * 1024, 8192)
    assert table.layers[0]["mlp.w_gate_up"].shape == (4, 2 * 28672, 8192)
    assert table.layers[3]["mlp.w_down"].layers == (3, 23, 43, 63)
    assert placements(LlamaConfig.llama3_2_1b(), 4, 2).lm_head is None


@pytest.mark.parametrize(("num_stages", "num_ranks", "fits"), [(1, 3, 2), (4, 12, 8), (1, 128, 64)])
def test_ranks_that_cannot_share_the_heads(num_stages, num_ranks, fits):
    with pytest.raises(ShardingError, match=rf"\b{fits}\b"):  # it names a number that does
        placements(LLAMA_70B, num_stages, num_ranks)


@pytest.mark.parametrize(
    ("shape", "tied"),
    [
        pytest.param(shape, bool(tied), marks=[] if i % 2 == tied else [pytest.mark.slow])
        for i, shape in enumerate(SHAPES)
        for tied in range(2)
    ],
)
def test_every_device_holds_the_same_number_of_bytes(tmp_path, shape, tied):
    """Padding makes devices equal where neither the vocabulary nor the layers divide."""
    write_checkpoint(tmp_path, vocab_size=83, num_hidden_layers=5, tie_word_embeddings=tied)
    params = load_params(open_checkpoint(tmp_path), make_mesh(shape), np.dtype("float32"))
    held = Counter()
    for array in jax.tree.leaves(params):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert len(held) == SHAPES[shape][0] * SHAPES[shape][1]
    assert max(held.values()) == min(held.values())
