"""From a checkpoint onto the mesh: each device gets the right bytes, and each is read once."""

import collections
import gc
import math
import mmap
import os
import re

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

from llama_jax.checkpoint import CheckpointError, open_checkpoint
from llama_jax.checkpoint.load import load_params
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.weights.split import ShardingError, check_split
from sharding.mesh import make_mesh
from tests.support.conversions import convert_to
from tests.support.tiny_checkpoint import bits, write_checkpoint

MESHES = ("1x1", "2x1", "4x1", "1x2", "2x2", "4x2")
# The layers do not divide by the stages, nor the vocabulary by the devices: each of 8 has 11 rows,
# of which the last one's last five are padding.
UNEVEN = {"num_hidden_layers": 5, "vocab_size": 83}
FLOAT32 = np.dtype("float32")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def checkpoint(request, tmp_path_factory):
    """The weights, and the checkpoint's path by layout."""
    path = tmp_path_factory.mktemp("checkpoint")
    weights = write_checkpoint(path / "hf", tie_word_embeddings=request.param, **UNEVEN)
    convert_to(path / "orbax", path / "hf")
    return weights, {"hf": path / "hf", "orbax": path / "orbax"}


class Spy:
    """A reader that records what is read."""

    def __init__(self, path):
        self.reader = open_checkpoint(path)
        self.config, self.tensors = self.reader.config, self.reader.tensors
        self._asked = []

    def read_into(self, name, index, out):
        self._asked.append((name, *((part.start, part.stop) for part in index)))
        self.reader.read_into(name, index, out)

    @property
    def asked(self):
        return collections.Counter(self._asked)


def padded(tensor: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(tensor, [(0, rows - len(tensor)), *[(0, 0)] * (tensor.ndim - 1)])


def fused(matrices: list[np.ndarray], num_ranks: int) -> np.ndarray:
    """Rank after rank its rows of the first matrix, then those of the second, and so on."""
    shares = [np.split(matrix, num_ranks) for matrix in matrices]
    return np.concatenate([part for of_rank in zip(*shares, strict=True) for part in of_rank])


def expected_params(weights, num_stages: int, num_ranks: int) -> dict[str, np.ndarray]:
    """The arrays by their path in `Params`, computed from the weights by definition."""
    weights = {name: tensor.numpy() for name, tensor in weights.items()}
    num_devices = num_stages * num_ranks
    rows = math.ceil(83 / num_devices) * num_devices
    expected = {
        ".embedding": padded(weights["model.embed_tokens.weight"], rows),
        ".final_norm": weights["model.norm.weight"],
    }
    if "lm_head.weight" in weights:
        expected[".lm_head"] = padded(weights["lm_head.weight"], rows)
    names = {
        "attention_norm.scale": ["input_layernorm"],
        "attention.wqkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.wo": ["self_attn.o_proj"],
        "mlp_norm.scale": ["post_attention_layernorm"],
        "mlp.w_gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.w_down": ["mlp.down_proj"],
    }
    stages = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 2], [3, 4]], 4: [[0, 1], [2], [3], [4]]}[num_stages]
    for position in range(len(stages[0])):
        for ours, theirs in names.items():
            stacked = [None] * num_stages
            for stage, layers in enumerate(stages):
                layer = layers[position] if position < len(layers) else 0
                matrices = [weights[f"model.layers.{layer}.{name}.weight"] for name in theirs]
                joined = fused(matrices, num_ranks) if len(matrices) > 1 else matrices[0]
                stacked[stage] = joined if position < len(layers) else np.zeros_like(joined)
            expected[f".layers[{position}]['{ours}']"] = np.stack(stacked)
    return expected


@pytest.mark.parametrize("mesh_shape", MESHES)
@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_every_device_holds_the_right_slices(checkpoint, layout, mesh_shape):
    weights, paths = checkpoint
    mesh = make_mesh(mesh_shape)
    params = load_params(open_checkpoint(paths[layout]), mesh, FLOAT32)
    arrays = {jax.tree_util.keystr(p): a for p, a in jax.tree_util.tree_leaves_with_path(params)}
    expected = expected_params(weights, mesh.shape["stage"], mesh.shape["model"])
    assert arrays.keys() == expected.keys()
    for path, array in arrays.items():
        assert bits(np.asarray(array)) == bits(expected[path]), path
        assert array.shape == expected[path].shape
        for shard in array.addressable_shards:
            assert bits(np.asarray(shard.data)) == bits(expected[path][shard.index]), path


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_ranks_beyond_the_kv_heads_share_them(checkpoint, layout):
    """Four ranks, two KV heads: ranks 0 and 1 hold the first, 2 and 3 the second."""
    weights, paths = checkpoint
    mesh = make_mesh("2x4")
    [first, *_] = load_params(open_checkpoint(paths[layout]), mesh, FLOAT32).layers
    assert first["attention.wqkv"].shape == (2, 4 * 3 * 16, 32)
    for shard in first["attention.wqkv"].addressable_shards:
        [[stage], [rank]] = np.nonzero(mesh.devices == shard.device)
        expected = []
        for name, head in (("q_proj", rank), ("k_proj", rank // 2), ("v_proj", rank // 2)):
            whole = weights[f"model.layers.{3 * stage}.self_attn.{name}.weight"].numpy()
            expected.append(whole[16 * head : 16 * (head + 1)])
        assert bits(np.asarray(shard.data[0])) == bits(np.concatenate(expected))


@pytest.mark.parametrize("layout", ["hf", "orbax"])
def test_every_device_reads_its_own_slices_once_and_nothing_else(checkpoint, layout):
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


def test_nan_and_infinity_are_loaded_as_they_are(tmp_path):
    weights = write_checkpoint(tmp_path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    weights["lm_head.weight"][95, 31] = torch.inf
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    params = load_params(open_checkpoint(tmp_path), make_mesh("1x2"), FLOAT32)
    (where,) = np.argwhere(np.isnan(params.layers[1]["mlp.w_gate_up"]))
    np.testing.assert_array_equal(where, [0, 24 + 3, 5])  # after the rank's 24 rows of the gate
    assert params.lm_head[95, 31] == np.inf


def test_progress_counts_arrays(checkpoint):
    _, paths = checkpoint
    steps = []
    params = load_params(
        open_checkpoint(paths["hf"]), make_mesh("4x2"), FLOAT32, lambda *step: steps.append(step)
    )
    total = len(jax.tree.leaves(params))
    assert steps == [(done, total) for done in range(1, total + 1)]


@pytest.fixture
def advice(monkeypatch):
    """What the loader asks of the memory of each shard."""
    given = []

    class Advised(mmap.mmap):
        def madvise(self, option):
            given.append(option)
            super().madvise(option)

    monkeypatch.setattr(mmap, "mmap", Advised)
    return given


def test_shards_lie_in_huge_pages_where_the_system_has_them(checkpoint, advice):
    reader = open_checkpoint(checkpoint[1]["hf"])
    shards = jax.tree.leaves(load_params(reader, make_mesh("1x2"), FLOAT32))
    assert advice == [mmap.MADV_HUGEPAGE] * 2 * len(shards)


@pytest.mark.parametrize("missing", ["the option", "the feature"])
def test_shards_are_loaded_where_the_system_has_no_huge_pages(
    checkpoint, advice, missing, monkeypatch
):
    if missing == "the option":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    else:
        monkeypatch.setattr(mmap.mmap, "madvise", lambda pages, option: os.stat("/none"))
    weights, paths = checkpoint
    params = load_params(open_checkpoint(paths["hf"]), make_mesh("1x1"), FLOAT32)
    assert bits(np.asarray(params.final_norm)) == bits(weights["model.norm.weight"])


@pytest.fixture
def no_arrays(monkeypatch):
    """Fails the test if memory is allocated, by the loader or as an array of JAX."""
    gc.collect()
    before = len(jax.live_arrays())

    def refuse(*_, **__):
        raise AssertionError("memory was allocated")

    monkeypatch.setattr(mmap, "mmap", refuse)
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
    for token in (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.7.mlp.up_proj.weight",
        "model.norm.weight has shape [33]",
    ):
        assert token in str(caught.value)


def test_a_truncated_file_allocates_nothing(tmp_path, no_arrays):
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 1, "num_key_value_heads": 1}, {"intermediate_size": 49}],
    ids=["heads", "MLP"],
)
def test_a_model_that_cannot_be_split_is_not_read(tmp_path, no_arrays, changes):
    write_checkpoint(tmp_path, **changes)
    spy = Spy(tmp_path)
    with pytest.raises(ShardingError):
        load_params(spy, make_mesh("1x2"), FLOAT32)
    assert not spy.asked


def test_the_largest_mesh_that_can_share_a_model_is_named():
    with pytest.raises(ShardingError, match=r"8 KV heads .* second number is 4\.$"):
        check_split(LlamaConfig.llama3_70b(), 6)
