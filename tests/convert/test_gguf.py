"""Converting models in GGUF, by the command line."""

import json
import os

import numpy as np
import pytest
from gguf import GGUFReader

from convert.__main__ import main
from convert.gguf import open_gguf
from convert.journal import identify
from llama_jax.checkpoint import open_checkpoint
from llama_jax.text.tokenizer import Tokenizer
from tests.support.conversions import load_weights
from tests.support.gguf_file import WIDE, gpt2_metadata, tiny_backend, tiny_model, write_gguf
from tests.support.tiny_checkpoint import bits, read

BOS, EOT = "<|begin_of_text|>", "<|eot_id|>"
CHAT = [{"role": "user", "content": "hello, world 12345"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
CONFIG = WIDE | {"vocab_size": 600, "num_hidden_layers": 1, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    metadata = gpt2_metadata(
        tiny_backend(), "llama-bpe", bos=BOS, eos="<|end_of_text|>", chat_template=TEMPLATE
    )
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, tiny_model(**CONFIG), "Q4_K", tokenizer=metadata)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("command", ["gguf", "hf"])
def test_a_converted_model_is_the_same(file, tmp_path, command, dtype, capsys):
    options = [] if dtype is None else ["--dtype", dtype]
    assert main([command, str(file), str(tmp_path / "new"), "--json", *options]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["dtype"] == (dtype or "bfloat16")
    assert outcome["source_bytes"] < file.stat().st_size < outcome["bytes"]
    source, new = open_checkpoint(file), open_checkpoint(tmp_path / "new")
    for name in source.tensors:
        kept = read(source, name, dtype=np.dtype(read(new, name).dtype))
        assert bits(read(new, name)) == bits(kept)
    same = {name: value for name, value in vars(source.config).items() if name != "dtype"}
    assert vars(new.config) == same | {"dtype": dtype or "bfloat16"}
    assert new.declared.generation_config == source.declared.generation_config
    old_tokenizer, tokenizer = Tokenizer(file), Tokenizer(tmp_path / "new")
    assert tokenizer.encode_chat(CHAT) == old_tokenizer.encode_chat(CHAT)
    assert tokenizer.encode("hello") == old_tokenizer.encode("hello")
    assert main(["verify", str(file), str(tmp_path / "new")]) == 0


@pytest.mark.parametrize("command", ["gguf", "hf"])
def test_a_key_that_nothing_knows_is_refused_if_asked(tmp_path, command, capsys):
    metadata = {"llama.surprise": 1}
    path = write_gguf(tmp_path / "model.gguf", tiny_model(), metadata=metadata)
    assert main([command, str(path), str(tmp_path / "new"), "--strict-config"]) == 1
    assert "surprise" in capsys.readouterr().err


def test_quantized_and_checked(file, tmp_path, capsys):
    arguments = [str(file), str(tmp_path / "new"), "--quantize", "int8", "--json"]
    assert main(["quantize", *arguments]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["quantization"] == "int8"
    assert 0 < max(outcome["quantization_error"].values()) < 0.02
    assert open_checkpoint(tmp_path / "new").config.quantization.format == "int8"


def test_exported_to_hugging_face_layout(file, tmp_path):
    assert main(["export", str(file), str(tmp_path / "new")]) == 0
    source = open_checkpoint(file)
    weights = load_weights(tmp_path / "new")
    assert weights.keys() == source.tensors.keys()
    for name, weight in weights.items():
        assert bits(weight) == bits(read(source, name)), name


def test_a_conversion_is_resumed_unless_a_part_has_changed(tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_model(), split=7)
    first, *others = sorted(tmp_path.iterdir())
    before = identify(open_gguf(first), {})
    (tmp_path / "README.md").write_text("A model.")
    assert identify(open_gguf(first), {}) == before
    os.utime(others[-1], ns=(1, 1))
    assert identify(open_gguf(first), {}) != before


def test_inspect_counts_the_bytes_of_the_file(file, capsys):
    assert main(["inspect", str(file), "--json", "--mesh", "1x2"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["layout"] == "gguf" and outcome["num_files"] == 1
    assert outcome["bytes_by_dtype"].keys() == {"Q4_K", "F32"}
    assert outcome["bytes"] == sum(tensor.n_bytes for tensor in GGUFReader(file).tensors)
    assert len(outcome["devices"]) == 2


def test_a_tokenizer_that_cannot_be_written_is_found_before_the_weights(tmp_path, capsys):
    metadata = gpt2_metadata(tiny_backend(), "qwen2")
    path = write_gguf(tmp_path / "model.gguf", tiny_model(vocab_size=600), tokenizer=metadata)
    assert main(["gguf", str(path), str(tmp_path / "new")]) == 1
    assert "qwen2" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_other_layouts_are_named_with_their_commands(tmp_path, capsys):
    (tmp_path / "model.safetensors").touch()
    assert main(["gguf", str(tmp_path), str(tmp_path / "new")]) == 1
    assert "convert hf" in capsys.readouterr().err
    assert main(["gguf", str(tmp_path / "none.gguf"), str(tmp_path / "new")]) == 1
    assert "none.gguf" in capsys.readouterr().err
