"""Meta's release, read in Hugging Face's layout, against Meta's model and transformers'."""

import json
import shutil
import tracemalloc
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from convert.meta.reader import MetaReader
from convert.meta.source import open_meta
from llama_jax.checkpoint.reader import CheckpointError
from llama_jax.config import ConfigError
from llama_jax.model import Llama
from tests.support.meta_checkpoint import (
    PARAMS,
    SPLIT_BY_COLUMNS,
    meta_logits,
    meta_weights,
    shard,
    write_meta,
)
from tests.support.tiny_checkpoint import bits, read

TOKENS = np.random.default_rng(0).integers(0, PARAMS["vocab_size"], 40).tolist()
HEAD_DIM = PARAMS["dim"] // PARAMS["n_heads"]
NAMES = {
    "q_proj": "attention.wq",
    "k_proj": "attention.wk",
    "v_proj": "attention.wv",
    "o_proj": "attention.wo",
    "gate_proj": "feed_forward.w1",
    "down_proj": "feed_forward.w2",
    "up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}


def as_hugging_face(name, weights):
    """A whole tensor by its Hugging Face name, assembled row by row from the definition."""
    kind = next(kind for kind in NAMES if kind in name)
    layer = f"layers.{name.split('.')[2]}." if "layers" in name else ""
    weight = weights[f"{layer}{NAMES[kind]}.weight"]
    if kind not in ("q_proj", "k_proj"):
        return weight
    rows = []
    for row in range(len(weight)):
        head, inside = divmod(row, HEAD_DIM)
        half, pair = divmod(inside, HEAD_DIM // 2)
        rows.append(weight[head * HEAD_DIM + 2 * pair + half])
    return torch.stack(rows)


def close(actual, expected):
    return np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("shards", "dtype", "tied", "changes"),
    [
        (1, "float32", False, {}),
        (2, "bfloat16", False, {"n_kv_heads": 4}),
        (8, "float32", True, {}),
        (8, "float16", False, {"use_scaled_rope": False}),
        (1, "bfloat16", True, {"n_kv_heads": 16}),
        (4, "float32", False, {"vocab_size": 640}),
    ],
)
def test_the_logits_are_those_of_metas_model(tmp_path, monkeypatch, shards, dtype, tied, changes):
    weights = meta_weights(dtype, tied, **changes)
    write_meta(tmp_path, shard(weights, shards), PARAMS | changes)
    expected = meta_logits(weights, TOKENS, **changes)

    monkeypatch.setattr("llama_jax.checkpoint.open_checkpoint", MetaReader)
    declared = SimpleNamespace(report_unknown=lambda: None)
    monkeypatch.setattr(MetaReader, "declared", declared, raising=False)
    model = Llama.from_pretrained(tmp_path, dtype="float32")
    ours = jax.jit(Llama.__call__)(model, np.array([TOKENS]))[0]
    assert close(np.asarray(ours), expected)

    reader = MetaReader(tmp_path)
    assert (reader.config.dtype, reader.config.tie_embeddings) == (dtype, tied)
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**reader.config.to_dict() | {"torch_dtype": "float32"})
    )
    state = {
        name: torch.from_numpy(read(reader, name, dtype=np.float32)) for name in reader.tensors
    }
    missing = other.load_state_dict(state, strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == (["lm_head.weight"] if tied else [])
    with torch.no_grad():
        assert close(other(torch.tensor([TOKENS])).logits[0].numpy(), expected)


def test_likely_mistakes_change_the_logits(tmp_path):
    weights = meta_weights()
    wrong = {
        name: weight.reshape(-1, HEAD_DIM // 2, 2, 128).transpose(1, 2).reshape(weight.shape)
        if ".wq." in name or ".wk." in name
        else weight
        for name, weight in weights.items()
    }
    right = meta_logits(weights, TOKENS)
    assert not close(meta_logits(wrong, TOKENS), right)
    assert not close(meta_logits(weights, TOKENS, factor=4.0), right)  # nor another scaling


@pytest.mark.parametrize(
    ("dtype", "shards"),
    [
        *(("float32", 1), ("bfloat16", 2), ("float16", 8)),
        *(
            pytest.param(dtype, shards, marks=pytest.mark.slow)
            for dtype, shards in (("bfloat16", 1), ("float16", 2), ("float32", 8))
        ),
    ],
)
def test_every_tensor_has_the_bits_of_the_files(tmp_path, dtype, shards):
    weights = meta_weights(dtype)
    weights["norm.weight"][3] = torch.nan
    reader = MetaReader(write_meta(tmp_path, shard(weights, shards)))
    assert len(reader.tensors) == 3 + 9 * PARAMS["n_layers"]
    for name, info in reader.tensors.items():
        assert info.dtype == dtype
        assert bits(read(reader, name)) == bits(as_hugging_face(name, weights)), name


@pytest.fixture(scope="module", params=[1, 2, 8])
def opened(tmp_path_factory, request):
    weights = meta_weights("bfloat16")
    path = write_meta(tmp_path_factory.mktemp("meta"), shard(weights, request.param))
    reader = MetaReader(path)
    return reader, {name: as_hugging_face(name, weights).float().numpy() for name in reader.tensors}


@given(data=st.data())
def test_any_slice_is_that_slice_of_the_whole(opened, data):
    reader, whole = opened
    name = data.draw(st.sampled_from(sorted(whole)))
    index = []
    for size in whole[name].shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    sliced = read(reader, name, tuple(index), np.float32)
    np.testing.assert_array_equal(sliced, whole[name][tuple(index)])


def test_an_embedding_cut_by_columns_as_before_llama_3(tmp_path):
    weights = meta_weights(tied=True)
    parts = shard(weights, 4, (*SPLIT_BY_COLUMNS, "tok_embeddings"))
    assert parts[0]["tok_embeddings.weight"].shape == (512, 32)
    reader = MetaReader(write_meta(tmp_path, parts, PARAMS | {"vocab_size": -1}))
    assert reader.config.vocab_size == 512 and reader.config.tie_embeddings
    embedding = "model.embed_tokens.weight"
    assert bits(read(reader, embedding)) == bits(weights["tok_embeddings.weight"])


@pytest.mark.parametrize("shards", [1, 2])
def test_the_head_is_tied_only_where_it_is_the_embedding_bit_for_bit(tmp_path, shards, monkeypatch):
    monkeypatch.setattr("convert.meta.reader._BLOCK_BYTES", 1000)  # compared at a time
    weights = meta_weights(tied=True)
    weights["output.weight"][-1, -1] += 1e-6
    reader = MetaReader(write_meta(tmp_path / "one", shard(weights, shards)))
    assert not reader.config.tie_embeddings and "lm_head.weight" in reader.tensors
    weights["output.weight"] = weights["tok_embeddings.weight"].half()
    weights["tok_embeddings.weight"] = weights["output.weight"].float()
    reader = MetaReader(write_meta(tmp_path / "dtype", shard(weights, shards)))
    assert not reader.config.tie_embeddings
    del weights["output.weight"]
    reader = MetaReader(write_meta(tmp_path / "absent", shard(weights, shards)))
    assert reader.config.tie_embeddings and "lm_head.weight" not in reader.tensors


def test_rotary_frequencies_are_ignored(tmp_path):
    weights = meta_weights() | {"rope.freqs": torch.ones(HEAD_DIM // 2)}
    reader = MetaReader(write_meta(tmp_path, shard(weights, 2)))
    assert not any("rope" in name for name in reader.tensors)


def test_a_slice_touches_its_own_bytes_only(tmp_path):
    changes = {"vocab_size": 1 << 17, "n_layers": 1}  # an embedding of 64 MiB
    weights = meta_weights(tied=False, **changes)
    path = write_meta(tmp_path, shard(weights, 1), PARAMS | changes)
    reader = MetaReader(path)
    before = resident(path)
    read(reader, "model.embed_tokens.weight", (slice(70_000, 70_100), slice(0, 128)))
    assert resident(path) - before <= 4 << 20  # the system maps up to 2 MiB around a page
    read(reader, "model.embed_tokens.weight")
    assert resident(path) - before > 50 << 20  # the measurement would see it


def resident(path):
    """Resident bytes of the mapped files below `path`."""
    total, counting = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first = line.split()[0]
            if not first.endswith(":"):
                counting = str(path) in line
            elif counting and first == "Rss:":
                total += int(line.split()[1]) << 10
    return total


def test_reading_takes_little_memory_beyond_the_result(tmp_path):
    changes = {"vocab_size": 1 << 16, "n_layers": 1}
    weights = meta_weights("bfloat16", **changes)
    reader = MetaReader(write_meta(tmp_path, shard(weights, 2), PARAMS | changes))
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        shape = reader.tensors[name].shape
        out = np.empty(shape, np.float32)
        tracemalloc.start()
        reader.read_into(name, tuple(slice(0, size) for size in shape), out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20


def broken(tmp_path, change, count=2, **params):
    """The error for a release whose shards are edited by `change`."""
    parts = shard(meta_weights(), count)
    change(parts)
    with pytest.raises((CheckpointError, ConfigError)) as error:
        MetaReader(write_meta(tmp_path, parts, PARAMS | params))
    return str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {
            "layers.1.attention.wk.weight": None,
            "layers.2.ffn_norm.weight": torch.ones(128),
            "norm.weight has shape [64]": torch.ones(64),
            "layers.0.feed_forward.w1.weight has shape [20, 128]": torch.ones(10, 128),
        },
        {
            "layers.0.feed_forward.w3.weight has shape []": torch.ones(()),
            "layers.0.attention_norm.weight has shape [128, 1]": torch.ones(128, 1),
        },
    ],
)
def test_all_wrong_tensors_are_named_at_once(tmp_path, wrong):
    def change(parts):
        for part in parts:
            for token, tensor in wrong.items():
                part[token.split()[0]] = tensor
                if tensor is None:
                    del part[token.split()[0]]

    message = broken(tmp_path, change)
    assert all(token in message for token in wrong)


def test_shards_of_different_checkpoints_are_rejected(tmp_path):
    def other_names(parts):
        parts[1]["extra"] = torch.ones(1)
        del parts[1]["norm.weight"]

    message = broken(tmp_path / "names", other_names)
    for token in ("extra ", "norm.weight", "consolidated.00.pth", "consolidated.01.pth"):
        assert token in message

    def other_dtype(parts):
        parts[1]["output.weight"] = parts[1]["output.weight"].half()

    assert "output.weight" in broken(tmp_path / "dtype", other_dtype)

    def other_norm(parts):
        parts[1]["layers.1.ffn_norm.weight"][5] += 1

    message = broken(tmp_path / "norm", other_norm)
    assert "layers.1.ffn_norm.weight" in message


def test_missing_shards_are_named(tmp_path):
    path = write_meta(tmp_path, shard(meta_weights(), 4))
    (path / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth"):
        MetaReader(path)
    (path / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth.*consolidated\.01\.pth"):
        MetaReader(path)


def test_the_last_shard_missing_is_noticed_by_the_shapes(tmp_path):
    path = write_meta(tmp_path, shard(meta_weights(), 4))
    (path / "consolidated.03.pth").unlink()
    with pytest.raises(CheckpointError, match=r" 3 shards.*\[384, 128\]"):
        MetaReader(path)


def test_directories_without_a_release(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        open_meta(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"params\.json"):
        MetaReader(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    with pytest.raises(CheckpointError, match=r"consolidated\.00\.pth"):
        MetaReader(tmp_path)


def test_a_release_without_an_embedding(tmp_path):
    message = broken(tmp_path, lambda parts: [part.pop("tok_embeddings.weight") for part in parts])
    assert "tok_embeddings.weight" in message


def test_a_release_without_a_tokenizer(tmp_path):
    path = write_meta(tmp_path, shard(meta_weights(), 1))
    (path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        MetaReader(path)


def test_an_error_of_the_configuration_names_the_file(tmp_path):
    message = broken(tmp_path, lambda parts: None, quantization_args={"group_size": 32})
    assert str(tmp_path / "params.json") in message and "quantization_args" in message


def test_a_closed_reader_lets_go_of_its_files(tmp_path):
    path = write_meta(tmp_path, shard(meta_weights(), 2))
    reader = MetaReader(path)
    assert resident(path) > 0
    reader.close()
    assert resident(path) == 0
    shutil.rmtree(path)
