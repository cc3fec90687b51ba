"""From a checkpoint onto the mesh: the right bytes on each device, each read once, none twice."""

import collections
import gc
import math

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from llama_jax.checkpoint import CheckpointError, load, open_checkpoint
from llama_jax.checkpoint.load import load_params
from llama_jax.model import Llama
from llama_jax.weights.placement import ShardingError
from sharding.mesh import make_mesh
from tests.support.conversions import convert_to
from tests.support.tiny_checkpoint import bits, place_tensors, write_checkpoint

MESHES = ("1x1", "2x1", "4x1", "1x2", "2x2", "4x2")
# Layers that do not divide by the stages, and a vocabulary that does not divide by the devices: of
# 8 each has 11 rows, and five of the last one's are padding.
UNEVEN = {"num_hidden_layers": 5, "vocab_size": 83}
FLOAT32 = np.dtype("float32")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request, tmp_path_factory):
    """The weights, and where they lie by layout."""
    path = tmp_path_factory.mktemp("checkpoint")
    weights = write_checkpoint(path / "hf", tie_word_embeddings=request.param, **UNEVEN)
    convert_to(path / "orbax", path / "hf")
    return weights, {"hf": path / "hf", "orbax": path / "orbax"}


class Spy:
    """A reader that writes down what it is asked for."""

    def __init__(self, path):
        self.reader = open_checkpoint(path)
        self.config, self.tensors = self.reader.config, self.reader.tensors
        self._asked = []

    def read_into(self, name, index, out):
        self._asked.append((name, *((part.start, part.stop) for part in index)))
        self.reader.read_into(name, index, out)

    def map(self, name, index, dtype):
        mapped = self.reader.map(name, index, dtype)
        if mapped is not None:
            self._asked.append((name, *((part.start, part.stop) for part in index)))
        return mapped

    @property
    def asked(self):
        return collections.Counter(self._asked)


def padded(tensor: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(tensor, [(0, rows - len(tensor)), *[(0, 0)] * (tensor.ndim - 1)])


def expected_params(weights, num_stages: int, num_devices: int) -> dict[str, np.ndarray]:
    """The arrays by their path in `Params`, from the description of the layout alone."""
    weights = {name: tensor.numpy() for name, tensor in weights.items()}
    rows = math.ceil(83 / num_devices) * num_devices
    expected = {
        ".embedding": padded(weights["model.embed_tokens.weight"], rows),
        ".final_norm": weights["model.norm.weight"],
    }
    if "lm_head.weight" in weights:
        expected[".lm_head"] = padded(weights["lm_head.weight"], rows)
    names = {
        "attention_norm.scale": "input_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "mlp_norm.scale": "post_attention_layernorm",
        "mlp.w_gate": "mlp.gate_proj",
        "mlp.w_up": "mlp.up_proj",
        "mlp.w_down": "mlp.down_proj",
    }
    stages = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 2], [3, 4]], 4: [[0, 1], [2], [3], [4]]}[num_stages]
    for position in range(len(stages[0])):
        for ours, theirs in names.items():
            example = weights[f"model.layers.0.{theirs}.weight"]
            stacked = np.zeros((num_stages, *example.shape), np.float32)
            for stage, layers in enumerate(stages):
                if position < len(layers):
                    stacked[stage] = weights[f"model.layers.{layers[position]}.{theirs}.weight"]
            expected[f".layers[{position}]['{ours}']"] = stacked
    return expected


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_every_weight_lies_where_it_belongs(checkpoint, layout, mesh_shape):
    weights, paths = checkpoint
    mesh = make_mesh(mesh_shape)
    params = load_params(open_checkpoint(paths[layout]), mesh, FLOAT32)
    arrays = {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(params)}
    expected = expected_params(weights, mesh.shape["stage"], mesh.size)
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
        assert bits(np.asarray(array)) == bits(expected[path]), path
        assert array.shape == expected[path].shape
        for shard in array.addressable_shards:
            assert bits(np.asarray(shard.data)) == bits(expected[path][shard.index]), path


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_a_device_reads_its_own_slices_once_and_nothing_else(checkpoint, layout):
    weights, paths = checkpoint
    spy = Spy(paths[layout])
    load_params(spy, make_mesh("4x2"), FLOAT32)

    expected = collections.Counter()
    for device in range(8):
        stage, rank = divmod(device, 2)
        expected["model.norm.weight", (0, 32)] += 1
        rows = (11 * device, min(11 * (device + 1), 83))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            if name in weights:
                expected[name, rows, (0, 32)] += 1
        for layer in [[0, 1], [2], [3], [4]][stage]:
            prefix = f"model.layers.{layer}"
            heads, kv, mlp = ((rank * n, rank * n + n) for n in (32, 16, 24))
            for name, *index in (
                ("input_layernorm", (0, 32)),
                ("post_attention_layernorm", (0, 32)),
                ("self_attn.q_proj", heads, (0, 32)),
                ("self_attn.k_proj", kv, (0, 32)),
                ("self_attn.v_proj", kv, (0, 32)),
                ("self_attn.o_proj", (0, 32), heads),
                ("mlp.gate_proj", mlp, (0, 32)),
                ("mlp.up_proj", mlp, (0, 32)),
                ("mlp.down_proj", (0, 32), mlp),
            ):
                expected[f"{prefix}.{name}.weight", *index] += 1
    assert spy.asked == expected


def test_a_device_without_rows_of_the_vocabulary_reads_none(tmp_path):
    write_checkpoint(tmp_path, vocab_size=9)
    spy = Spy(tmp_path)
    params = load_params(spy, make_mesh("4x2"), FLOAT32)
    asked = {rows for name, rows, *_ in spy.asked if name == "lm_head.weight"}
    assert sorted(asked) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    assert params.lm_head.shape == (16, 32)
    assert not np.asarray(params.lm_head)[9:].any()


def test_the_weights_do_not_depend_on_the_file_any_more(tmp_path):
    """Served from mapped pages, they would change or vanish when somebody writes to the file."""
    write_checkpoint(tmp_path, hidden_size=128, intermediate_size=256)
    file = tmp_path / "model.safetensors"
    place_tensors(file, 0)  # where JAX would take a tensor of the file for its own memory
    reader = open_checkpoint(tmp_path)
    params = load_params(reader, make_mesh("1x1"), FLOAT32)
    model = Llama.from_pretrained(tmp_path)
    reader.close()
    expected = safetensors.torch.load(file.read_bytes())["lm_head.weight"].numpy()
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    np.testing.assert_array_equal(params.lm_head, expected)
    np.testing.assert_array_equal(model.lm_head[...], expected)


def test_nan_is_a_weight_like_any_other(tmp_path):
    weights = write_checkpoint(tmp_path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    weights["lm_head.weight"][95, 31] = torch.inf
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    params = load_params(open_checkpoint(tmp_path), make_mesh("1x2"), FLOAT32)
    (where,) = np.argwhere(np.isnan(params.layers[1]["mlp.w_up"]))
    np.testing.assert_array_equal(where, [0, 3, 5])
    assert params.lm_head[95, 31] == np.inf


def test_progress_counts_the_arrays(checkpoint):
    _, paths = checkpoint
    steps = []
    params = load_params(
        open_checkpoint(paths["hf"]), make_mesh("4x2"), FLOAT32, lambda *step: steps.append(step)
    )
    total = len(jax.tree.leaves(params))
    assert steps == [(done, total) for done in range(1, total + 1)]


@pytest.fixture
def no_arrays(monkeypatch):
    """Fails the test if it allocates: neither JAX nor the loader makes an array."""
    gc.collect()
    before = len(jax.live_arrays())

    def refuse(*_):
        raise AssertionError("an array was allocated")

    monkeypatch.setattr(load, "_zeros", refuse)
    yield
    gc.collect()
    assert len(jax.live_arrays()) == before


def test_a_checkpoint_that_does_not_fit_its_config_allocates_nothing(tmp_path, no_arrays):
    weights = write_checkpoint(tmp_path)
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(48, 32)
    weights["model.norm.weight"] = torch.zeros(33)
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Llama.from_pretrained(tmp_path)
    for problem in (
        "model.layers.0.mlp.up_proj.weight is missing",
        "model.layers.7.mlp.up_proj.weight belongs to no weight",
        "model.norm.weight has shape [33] instead of [32]",
    ):
        assert problem in str(caught.value)


def test_a_truncated_file_allocates_nothing(tmp_path, no_arrays):
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_key_value_heads": 1}, "2 tensor-parallel ranks do not divide the 1 KV heads"),
        ({"intermediate_size": 49}, "2 tensor-parallel ranks do not divide the 49 MLP columns"),
    ],
)
def test_a_model_that_cannot_be_split_is_not_read(tmp_path, no_arrays, changes, what):
    write_checkpoint(tmp_path, **changes)
    spy = Spy(tmp_path)
    with pytest.raises(ShardingError, match=what) as caught:
        load_params(spy, make_mesh("1x2"), FLOAT32)
    assert str(caught.value).endswith("use a mesh whose second number is 1.")
    assert not spy.asked
