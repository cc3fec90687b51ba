"""A changed `Llama` is saved as a checkpoint, which transformers and `LLM`'s loader read alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from convert.model import save_model
from llama_jax import Llama, ShardedLlama
from llama_jax.checkpoint import CheckpointError
from sharding.errors import UserError
from tests.support.conversions import convert_to
from tests.support.gguf_file import gpt2_metadata, tiny_backend, tiny_model, write_gguf
from tests.support.tiny_checkpoint import write_checkpoint

TOKENS = np.array([[1, 5, 95, 33, 7]])
jitted = jax.jit(Llama.__call__)


@pytest.fixture(params=[False, True], ids=["head", "tied"])
def path(tmp_path, request):
    write_checkpoint(tmp_path / "like", tie_word_embeddings=request.param)
    (tmp_path / "like" / "tokenizer.json").write_text("{}")
    return tmp_path / "like"


def changed(model: Llama) -> Llama:
    """The model with every number of every weight changed, each by another factor."""
    graph, state = nnx.split(model)
    random = np.random.default_rng(0)
    for leaf in nnx.to_flat_state(state).leaves:
        leaf.set_value(leaf[...] * random.uniform(0.8, 1.2, leaf.shape).astype(leaf.dtype))
    return nnx.merge(graph, state)


@pytest.mark.parametrize("layout", ["huggingface", "orbax"])
def test_what_is_saved_is_the_changed_model(tmp_path, path, layout):
    model = changed(Llama.from_pretrained(path))
    save_model(model, tmp_path / "saved", like=path, layout=layout)
    found = Llama.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(jitted(found, TOKENS), jitted(model, TOKENS))
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "{}"
    if layout == "huggingface":
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        with torch.no_grad():
            expected = other(torch.tensor(TOKENS)).logits
        np.testing.assert_allclose(jitted(model, TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_the_dtype_is_that_of_the_model(tmp_path, path):
    save_model(Llama.from_pretrained(path, "bfloat16"), tmp_path / "saved", like=path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert {tensor.dtype for tensor in other.state_dict().values()} == {torch.bfloat16}


def test_a_model_from_gguf_keeps_its_tokenizer(tmp_path):
    backend = tiny_backend()
    metadata = gpt2_metadata(backend, "llama-bpe", bos="<|begin_of_text|>")
    file = write_gguf(
        tmp_path / "a.gguf", tiny_model(vocab_size=backend.get_vocab_size()), tokenizer=metadata
    )
    model = changed(Llama.from_pretrained(file))
    save_model(model, tmp_path / "saved", like=file)
    found = Llama.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(jitted(found, TOKENS), jitted(model, TOKENS))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("hello world").input_ids == backend.encode("hello world").ids


def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path, path):
    def refused(model: Llama, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            save_model(model, tmp_path / "saved", like=path)
        assert not (tmp_path / "saved" / "config.json").exists()

    model = Llama.from_pretrained(path)
    del model.layers[2]
    refused(model, "no layer 2")
    model = Llama.from_pretrained(path)
    model.layers[0].attention.wqkv = nnx.Param(jnp.zeros((3, 32)))
    refused(model, "attention.wqkv has 3 rows")
    model = Llama.from_pretrained(path)
    model.layers[1].mlp.narrow = nnx.Param(jnp.ones((2, 32)))  # an adapter, say
    refused(model, r"layers\.1\.mlp\.narrow")
    model = Llama.from_pretrained(path)
    model.layers[1].mlp.w_down[...] = model.layers[1].mlp.w_down[...] * jnp.nan
    refused(model, "down_proj.*NaN")
    model = Llama.from_pretrained(path)
    model.layers[1].mlp.w_down = model.layers[1].mlp.w_down[...]
    with pytest.raises(UserError, match=r"^mlp\.w_down must be an nnx\.Param, .*\.$"):
        save_model(model, tmp_path / "saved", like=path)
    write_checkpoint(tmp_path / "other", rms_norm_eps=1e-3)
    refused(Llama.from_pretrained(tmp_path / "other"), "not that of")
    convert_to(tmp_path / "int8", path, quantize="int8")
    with pytest.raises(CheckpointError, match="are quantized"):
        save_model(Llama.from_pretrained(tmp_path / "int8"), tmp_path / "saved", tmp_path / "int8")


def test_wrong_arguments_are_refused(tmp_path, path):
    with pytest.raises(CheckpointError, match=r"^layout must be one of .*, got 'hf'\.$"):
        save_model(Llama.from_pretrained(path), tmp_path / "saved", like=path, layout="hf")
    with pytest.raises(CheckpointError, match=r"^save_model needs a Llama .*not ShardedLlama: "):
        save_model(ShardedLlama.from_pretrained(path), tmp_path / "saved", like=path)
