"""Checkpoints in Hugging Face layout that say the same in other words, as real tools write them."""

import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.checkpoint import CheckpointError, open_checkpoint
from tests.support.conversions import change_weights, convert_to, refusal
from tests.support.tiny_checkpoint import SIZES, bits, read, write_checkpoint

INDEX = "model.safetensors.index.json"
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROTARY = (
    "model.rotary_emb.inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached",
)


def assert_holds(path, expected) -> None:
    """A checkpoint opens, and holds exactly these tensors."""
    reader = open_checkpoint(path)
    assert {name: bits(read(reader, name)) for name in reader.tensors} == {
        name: bits(tensor) for name, tensor in expected.items()
    }


def edit_index(path, change) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A tied and an untied checkpoint, in shards, each with its weights."""
    made = {}
    for tied in (True, False):
        path = tmp_path_factory.mktemp("tied" if tied else "untied")
        weights = write_checkpoint(
            path, dtype="bfloat16", shard_size="20KB", tie_word_embeddings=tied
        )
        assert len(list(path.glob("*.safetensors"))) > 2
        made[tied] = path, weights
    return made


@pytest.fixture
def sharded(originals, tmp_path):
    path, weights = originals[False]
    return shutil.copytree(path, tmp_path / "sharded"), weights


@pytest.fixture
def tied(originals, tmp_path):
    path, weights = originals[True]
    return shutil.copytree(path, tmp_path / "tied"), weights


# The embedding table and the head.


def test_save_model_keeps_only_the_head_of_a_tied_model(tmp_path):
    """Of tensors that share memory, safetensors writes the one whose name is first."""
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert HEAD in stored and TABLE not in stored
    assert_holds(tmp_path, {TABLE: stored.pop(HEAD), **stored})


def test_a_head_that_repeats_the_table(tied, monkeypatch):
    monkeypatch.setattr("llama_jax.checkpoint.huggingface._BLOCK_BYTES", 1000)  # compared at a time
    path, weights = tied
    file = sorted(path.glob("*.safetensors"))[-1]
    stored = safetensors.torch.load(file.read_bytes())
    safetensors.torch.save_file(stored | {HEAD: weights[TABLE].clone()}, file)
    assert_holds(path, weights)  # the index does not list it
    edit_index(path, lambda weight_map: weight_map.update({HEAD: file.name}))
    assert_holds(path, weights)
    changed = weights[TABLE].clone()
    changed[95, 31] += 1
    safetensors.torch.save_file(stored | {HEAD: changed}, file)
    assert "tie_word_embeddings" in refusal(open_checkpoint, path)


def test_a_tied_head_that_only_the_index_lists(tied):
    path, weights = tied
    edit_index(path, lambda weight_map: weight_map.update({HEAD: "model-00099.safetensors"}))
    assert_holds(path, weights)


def test_a_tied_head_and_table_of_an_unknown_dtype_are_refused(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=True)
    wide = torch.zeros(96, 32, dtype=torch.float64)
    change_weights(tmp_path, lambda w: w.update({HEAD: wide, TABLE: wide.clone()}))
    refusal(open_checkpoint, tmp_path)


# Tensors that say nothing new.


@pytest.mark.parametrize("listed", [False, True])
def test_rotary_buffers(sharded, listed):
    path, weights = sharded
    first, second, *_ = sorted(path.glob("*.safetensors"))
    for file in (first, second):  # even twice
        stored = safetensors.torch.load(file.read_bytes())
        safetensors.torch.save_file(stored | {name: torch.ones(8) for name in ROTARY}, file)
    if listed:
        gone = dict.fromkeys(ROTARY, "gone.safetensors")
        edit_index(path, lambda weight_map: weight_map.update(gone))
    assert_holds(path, weights)


def test_biases_of_zero(tmp_path):
    """As transformers initializes them, and as old versions of AutoGPTQ write them."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
    )
    model.save_pretrained(tmp_path / "hf")
    weights = {name: w for name, w in model.state_dict().items() if not name.endswith(".bias")}
    assert len(weights) == len(model.state_dict()) - 3 * 7
    assert_holds(tmp_path / "hf", weights)
    convert_to(tmp_path / "orbax", tmp_path / "hf")
    assert_holds(tmp_path / "orbax", weights)
    convert_to(tmp_path / "export", tmp_path / "orbax", layout="huggingface")
    exported = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "export")
    assert exported.state_dict().keys() == weights.keys()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(1e-8, torch.float32), (float("nan"), torch.float32), (0.0, torch.float64)],
)
def test_another_bias_is_refused_by_name(tmp_path, value, dtype):
    """Also one of an unknown dtype, whatever it holds."""
    write_checkpoint(tmp_path)
    name = "model.layers.1.self_attn.q_proj.bias"
    zeros, bias = torch.zeros(64), torch.zeros(64, dtype=dtype)
    bias[63] = value
    change_weights(tmp_path, lambda w: w.update({name: bias, name.replace("q_", "k_"): zeros}))
    message = refusal(open_checkpoint, tmp_path)
    assert name in message and "k_proj" not in message


def test_an_index_without_some_tensors(sharded):
    """Its files hold them all the same."""
    path, weights = sharded
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        edit_index(path, lambda weight_map, name=name: weight_map.pop(name))
    assert_holds(path, weights)


def test_an_index_with_a_weight_that_is_nowhere(sharded):
    path, _ = sharded
    file = next(path.glob("*.safetensors"))
    stored = safetensors.torch.load(file.read_bytes())
    name, _ = stored.popitem()
    safetensors.torch.save_file(stored, file)
    assert name in refusal(open_checkpoint, path)


# Names of files.


@pytest.mark.parametrize("form", ["pytorch_model-{}.safetensors", "weights/part {}", "./[{}].st"])
def test_shards_of_any_name(sharded, form):
    path, weights = sharded
    names = {
        file.name: form.format(number) for number, file in enumerate(path.glob("*.safetensors"))
    }
    for old, new in names.items():
        (path / new).parent.mkdir(exist_ok=True)
        (path / old).rename(path / new)
    edit_index(path, lambda w: w.update({name: names[file] for name, file in w.items()}))
    (path / "consolidated.safetensors").write_bytes(b"of another tool")
    assert_holds(path, weights)


def test_files_without_an_index(sharded):
    """Also a single one, as AutoGPTQ and AutoAWQ named it ("gptq_model-4bit-128g.safetensors")."""
    path, weights = sharded
    (path / INDEX).unlink()
    (path / "adapter_model.safetensors").write_bytes(b"a LoRA adapter")
    assert_holds(path, weights)
    for file in path.glob("model*.safetensors"):
        file.unlink()
    whole = {name: tensor.contiguous() for name, tensor in weights.items()}
    safetensors.torch.save_file(whole, path / "gptq_model-4bit-128g.safetensors")
    assert_holds(path, weights)
    safetensors.torch.save_file(whole, path / "copy.safetensors")
    assert "copy.safetensors" in refusal(open_checkpoint, path)


# Damage.

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def open_or_refuse(path) -> None:
    try:
        open_checkpoint(path).close()
    except CheckpointError as error:
        assert len(str(error)) < 800 and str(error).isprintable()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_mutated_index_opens_or_is_refused(originals, data):
    path, _ = originals[False]
    original = (path / INDEX).read_text()
    weight_map = json.loads(original)["weight_map"]
    names = st.sampled_from(sorted(weight_map)) | st.text()
    files = st.sampled_from(sorted(set(weight_map.values()))) | json_values
    changes = data.draw(st.dictionaries(names, files, min_size=1, max_size=4))
    try:
        (path / INDEX).write_text(json.dumps({"weight_map": weight_map | changes}))
        open_or_refuse(path)
    finally:
        (path / INDEX).write_text(original)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_mutated_header_opens_or_is_refused(originals, data):
    path, _ = originals[False]
    file = sorted(path.glob("*.safetensors"))[0]
    original = file.read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    header = json.loads(original[8:end])
    names = st.sampled_from(sorted(header)) | st.text()
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["BF16", "F32", "F64", "BOOL", "F8_E5M2", "U4", ""]),
            "shape": st.lists(st.integers(-1, 100), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 10_000), min_size=2, max_size=2),
        }
    )
    changes = data.draw(st.dictionaries(names, entry | json_values, min_size=1, max_size=3))
    text = json.dumps(header | changes).encode()
    try:
        file.write_bytes(len(text).to_bytes(8, "little") + text + original[end:])
        open_or_refuse(path)
    finally:
        file.write_bytes(original)
