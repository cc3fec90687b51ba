"""LoRA adapters merged by a conversion, against sums in float64."""

import json
import math
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from convert.__main__ import DIFFERENT, DONE, ERROR, main
from convert.adapter import with_adapter
from convert.conversion import Options, convert
from convert.source import open_source
from llama_jax.checkpoint import merged, open_checkpoint
from llama_jax.checkpoint.lora import Adapter
from llama_jax.checkpoint.merged import MergedReader
from llama_jax.checkpoint.reader import numpy_dtype
from tests.support.conversions import convert_to, files, load_weights, refusal
from tests.support.lora_adapter import low_rank, write_adapter
from tests.support.tiny_checkpoint import bits, read, write_checkpoint
from tests.support.tiny_tokenizer import make_tokenizer

Q, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MATRICES = {Q: (64, 32), DOWN: (32, 48)}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def base(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    write_checkpoint(path, dtype=request.param, vocab_size=600)
    make_tokenizer(path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied")
    write_checkpoint(path, tie_word_embeddings=True)
    return path


def change_of(tensors, module, scale):
    up, down = (tensors[f"{module}.lora_{part}.weight"].double().numpy() for part in "BA")
    return scale * up @ down


def merge(base, adapter):
    return MergedReader(open_checkpoint(base), Adapter(adapter))


def rounded(exact, dtype):
    """The exact values in the dtype, and how much the rounding of a sum in float32 may add."""
    unit = float(np.finfo(np.float32).eps) + float(torch.finfo(dtype).eps)
    return exact, 2 * unit * np.abs(exact) + 1e-6


METHODS = {
    "alpha over rank": ({}, 4, 6 / 4),
    "rank-stabilized": ({"use_rslora": True}, 4, 6 / math.sqrt(4)),
    "patterns": (
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {".*q_proj": 3}},
        2,
        3 / 2,
    ),
    "patterns of other modules": (
        {"rank_pattern": {"proj": 2, "layers.1.self_attn": 2}},
        4,
        6 / 4,
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_added_to_its_matrices_only(base, tmp_path, method):
    config, rank, scale = METHODS[method]
    scales = {Q: scale, DOWN: 6 / math.sqrt(4) if config.get("use_rslora") else 6 / 4}
    tensors = low_rank(Q, MATRICES[Q], rank) | low_rank(DOWN, MATRICES[DOWN])
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    reader, before = merge(base, adapter), load_weights(base)
    assert set(reader.tensors) == set(before)
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        assert numpy_dtype(reader.tensors[name].dtype) == read(reader, name).dtype
        if module not in MATRICES:
            assert bits(read(reader, name)) == bits(weight), name
            continue
        wanted = weight.double().numpy() + change_of(tensors, module, scales[module])
        for dtype in (weight.dtype, torch.float32):
            exact, tolerance = rounded(wanted, dtype)
            ours = read(reader, name, dtype=numpy_dtype(str(dtype).removeprefix("torch.")))
            assert (np.abs(ours.astype(np.float64) - exact) <= tolerance).all(), (name, dtype)


def test_dora_scales_each_row_to_its_norm(base, tmp_path):
    tensors = low_rank(Q, MATRICES[Q])
    norms = torch.linspace(0.5, 3, 64)
    adapter = write_adapter(
        tmp_path, tensors | {f"{Q}.lora_magnitude_vector": norms}, use_dora=True
    )
    ours = read(merge(base, adapter), f"{Q}.weight", dtype=np.float32).astype(np.float64)
    raw = load_weights(base)[f"{Q}.weight"].double().numpy() + change_of(tensors, Q, 6 / 4)
    wanted = raw / np.linalg.norm(raw, axis=1, keepdims=True) * norms.double().numpy()[:, None]
    np.testing.assert_allclose(ours, wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_a_slice_has_the_bits_of_the_whole(base, tmp_path, monkeypatch, dora):
    """Shards, and blocks of any size, on any machine."""
    norms = {f"{Q}.lora_magnitude_vector": torch.linspace(0.5, 3, 64)} if dora else {}
    adapter = write_adapter(tmp_path, low_rank(Q, MATRICES[Q]) | norms, use_dora=dora)
    reader = merge(base, adapter)
    whole = read(reader, f"{Q}.weight", dtype=np.float32)
    for block in (1, 7 * 32, 1 << 18):
        monkeypatch.setattr(merged, "_BLOCK", block)
        for rows, columns in ((slice(3, 40), slice(0, 32)), (slice(63, 64), slice(5, 6))):
            part = read(reader, f"{Q}.weight", (rows, columns), np.float32)
            assert bits(part) == bits(whole[rows, columns])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_is_multiplied_in_float32(base, tmp_path, dtype):
    tensors = low_rank(Q, MATRICES[Q], dtype=dtype)
    reader = merge(base, write_adapter(tmp_path, tensors))
    wanted = load_weights(base)[f"{Q}.weight"].double().numpy() + change_of(tensors, Q, 6 / 4)
    ours = read(reader, f"{Q}.weight", dtype=np.float32)
    np.testing.assert_allclose(ours, wanted, rtol=2e-6, atol=1e-6)


def test_embedding_and_head_are_changed_apart(tied, tmp_path):
    """They are tied in the base model, but PEFT trains the change of one of the two."""
    up, down = torch.randn(32, 4), torch.randn(4, 96)
    tensors = {f"{EMBEDDING}.lora_embedding_A": down, f"{EMBEDDING}.lora_embedding_B": up}
    reader = merge(tied, write_adapter(tmp_path, tensors))
    assert not reader.config.tie_embeddings
    table = load_weights(tied)[f"{EMBEDDING}.weight"]
    assert bits(read(reader, f"{HEAD}.weight")) == bits(table)
    wanted = table.double() + 6 / 4 * (up.double() @ down.double()).T
    np.testing.assert_allclose(read(reader, f"{EMBEDDING}.weight"), wanted, rtol=2e-6, atol=1e-6)


def test_a_head_that_changes_as_the_embedding_does_stays_tied(tied, tmp_path):
    change = low_rank(HEAD, (96, 32))
    up, down = change[f"{HEAD}.lora_B.weight"], change[f"{HEAD}.lora_A.weight"]
    same = {
        f"{EMBEDDING}.lora_embedding_A": up.T.contiguous(),
        f"{EMBEDDING}.lora_embedding_B": down.T.contiguous(),
    }
    reader = merge(tied, write_adapter(tmp_path / "same", change | same))
    assert reader.config.tie_embeddings and f"{HEAD}.weight" not in reader.tensors
    table = load_weights(tied)[f"{EMBEDDING}.weight"]
    wanted = table.double() + 6 / 4 * up.double() @ down.double()
    np.testing.assert_allclose(read(reader, f"{EMBEDDING}.weight"), wanted, rtol=2e-6, atol=1e-6)
    for part in "AB":
        name = f"{EMBEDDING}.lora_embedding_{part}"
        other = write_adapter(tmp_path / part, change | same | {name: same[name] + 1})
        assert not merge(tied, other).config.tie_embeddings
    other = write_adapter(tmp_path / "scale", change | same, alpha_pattern={HEAD: 7})
    assert not merge(tied, other).config.tie_embeddings


def test_whole_weights_and_a_larger_vocabulary(tied, tmp_path):
    """New tokens: PEFT saves the embedding and the head."""
    table, head = torch.randn(100, 32), torch.randn(100, 32)
    norm = torch.randn(32)
    tensors = {f"{EMBEDDING}.weight": table, f"{HEAD}.weight": head, "model.norm.weight": norm}
    copies = {
        f"{HEAD}.modules_to_save.weight": head.clone(),
        f"{HEAD}.original_module.weight": torch.zeros(100, 32),
    }
    adapter = write_adapter(tmp_path / "adapter", tensors | copies)
    assert main(["hf", str(tied), str(tmp_path / "new"), "--adapter", str(adapter)]) == DONE
    reader = open_checkpoint(tmp_path / "new")
    assert (reader.config.vocab_size, reader.config.tie_embeddings) == (100, False)
    for name, tensor in tensors.items():
        assert bits(read(reader, name)) == bits(tensor), name
    tensors[f"{HEAD}.weight"] = table.clone()
    reader = merge(tied, write_adapter(tmp_path / "same", tensors))
    assert reader.config.tie_embeddings and reader.config.vocab_size == 100


def test_the_change_of_a_weight_that_is_also_replaced(tied, tmp_path):
    """With new tokens and a change of the embedding, PEFT saves the base that it belongs to."""
    table, change = torch.randn(100, 32), low_rank(HEAD, (100, 32))
    tensors = {f"{EMBEDDING}.weight": table, f"{HEAD}.base_layer.weight": table.clone()}
    reader = merge(tied, write_adapter(tmp_path, tensors | change))
    wanted = table.double().numpy() + change_of(change, HEAD, 6 / 4)
    np.testing.assert_allclose(read(reader, f"{HEAD}.weight"), wanted, rtol=2e-6, atol=1e-6)
    assert bits(read(reader, f"{EMBEDDING}.weight")) == bits(table)


@pytest.mark.parametrize("command", [["hf"], ["quantize", "--quantize", "int8"], ["export"]])
def test_every_conversion_writes_the_merged_model(base, tmp_path, command):
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q, MATRICES[Q]))
    name, *options = command
    new = str(tmp_path / "new")
    call = [name, str(base), new, *options, "--adapter", str(adapter)]
    assert main(call) == DONE
    assert main(["verify", str(base), new, "--adapter", str(adapter)]) == DONE
    assert main(["verify", str(base), new]) == DIFFERENT
    # The same in two steps, of which the first keeps the sums in float32.
    assert main(["export", str(base), str(tmp_path / "merged"), *call[-2:]]) == DONE
    if "--quantize" not in options or open_checkpoint(base).config.dtype == "float32":
        assert main([name, str(tmp_path / "merged"), str(tmp_path / "two"), *options]) == DONE
        assert {
            name: content
            for name, content in files(tmp_path / "new").items()
            if name != "llama_jax.json"
        } == {
            name: content
            for name, content in files(tmp_path / "two").items()
            if name != "llama_jax.json"
        }


def test_the_report_names_the_adapter(base, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q, MATRICES[Q]))
    call = ["hf", str(base), str(tmp_path / "new"), "--adapter", str(adapter)]
    assert main([*call, "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["adapter"] == str(adapter)


def test_a_conversion_is_not_resumed_with_another_adapter(base, tmp_path):
    tensors = low_rank(Q, MATRICES[Q])
    adapter = write_adapter(tmp_path / "adapter", tensors)
    new = tmp_path / "new"

    def run(**options):
        return convert(with_adapter(open_source(base), adapter), new, Options(**options))

    run()
    assert run(resume=True).seconds == 0
    (adapter / "adapter_model.safetensors").touch()
    assert "already holds a complete checkpoint" in refusal(run, resume=True)
    shutil.rmtree(new)
    run()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 5}))
    assert "already holds a complete checkpoint" in refusal(run, resume=True)


def test_the_tokenizer_of_the_adapter_replaces_that_of_the_model(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q, MATRICES[Q]))
    call = ["hf", str(base), str(tmp_path / "one"), "--adapter", str(adapter)]
    assert main(call) == DONE
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == "{{ messages }}"
    make_tokenizer(adapter)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "mine"}))
    call[2] = str(tmp_path / "two")
    assert main(call) == DONE
    assert not (tmp_path / "two" / "chat_template.jinja").exists()
    assert "mine" in (tmp_path / "two" / "tokenizer_config.json").read_text()


def test_a_quantized_model_is_refused(base, tmp_path):
    convert_to(tmp_path / "int8", base, quantize="int8")
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q, MATRICES[Q]))
    assert "--quantize" in refusal(merge, tmp_path / "int8", adapter)


REFUSED = {
    "another method": ({"peft_type": "IA3"}, {}, "IA3"),
    "no method": ({"peft_type": None}, {}, "peft_type is missing"),
    "a changed base model": ({"init_lora_weights": "pissa_niter_4"}, {}, "pissa_niter_4"),
    "transposed matrices": ({"fan_in_fan_out": True}, {}, "fan_in_fan_out"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 3]]}, {}, "layer_replication"),
    "new rows of the embedding": ({"trainable_token_indices": [3]}, {}, "trainable_token_indices"),
    "a rank of another type": ({"r": "4"}, {}, "r must be"),
    "an alpha that is not a number": ({"lora_alpha": float("nan")}, {}, "lora_alpha must be"),
    "a broken pattern": ({"rank_pattern": {"(": 4}}, {}, "regular expression"),
    "another rank than it says": ({"r": 8}, {}, "rank 8"),
    "DoRA without norms": ({"use_dora": True}, {}, "rank 4"),
    "half a change": ({}, {f"{DOWN}.lora_A.weight": torch.ones(4, 48)}, DOWN),
    "an empty shard": (
        {},
        {f"{Q}.lora_A.weight": torch.ones(0), f"{Q}.lora_B.weight": torch.ones(0)},
        "gathered",
    ),
    "a bias": ({}, {f"{Q}.lora_B.bias": torch.ones(64)}, "lora_B.bias"),
    "an unknown part": ({}, {f"{EMBEDDING}.token_adapter.delta": torch.ones(2, 32)}, "delta"),
    "a layer that is not there": ({}, low_rank("model.layers.3.mlp.up_proj", (48, 32)), "layers.3"),
    "a matrix of another size": ({}, low_rank(DOWN, (32, 64)), "[32, 64]"),
    "a norm changed by a matrix": ({}, low_rank("model.norm", (32, 1)), "model.norm"),
    "a head of another vocabulary": ({}, {f"{HEAD}.weight": torch.ones(601, 32)}, "[601, 32]"),
    "an embedding without its head": ({}, {f"{EMBEDDING}.weight": torch.ones(601, 32)}, "lm_head"),
    "an empty embedding": ({}, {f"{EMBEDDING}.weight": torch.ones(0, 32)}, "[0, 32]"),
    "an embedding of no dimension": ({}, {f"{EMBEDDING}.weight": torch.ones(())}, "shape []"),
    "NaN": ({}, {"model.norm.weight": torch.full((32,), torch.nan)}, "NaN"),
    "integers": ({}, {"model.norm.weight": torch.ones(32, dtype=torch.int32)}, "int32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused(base, tmp_path, case):
    config, tensors, token = REFUSED[case]
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q, MATRICES[Q]) | tensors, **config)
    message = refusal(merge, base, adapter)
    assert token in message and str(adapter) in message


def test_norms_for_the_embedding_are_refused(base, tmp_path):
    tensors = {
        f"{EMBEDDING}.lora_embedding_A": torch.ones(4, 600),
        f"{EMBEDDING}.lora_embedding_B": torch.ones(32, 4),
        f"{EMBEDDING}.lora_magnitude_vector": torch.ones(32),
    }
    adapter = write_adapter(tmp_path, tensors, use_dora=True)
    assert "merge_and_unload" in refusal(merge, base, adapter)


def test_directories_that_are_no_adapters(base, tmp_path):
    assert "no directory" in refusal(Adapter, tmp_path / "nowhere")
    assert "adapter_config.json" in refusal(Adapter, base)
    adapter = write_adapter(tmp_path / "adapter", {})
    (adapter / "adapter_model.safetensors").unlink()
    assert "holds no adapter_model.safetensors" in refusal(Adapter, adapter)
    (adapter / "adapter_model.bin").write_bytes(b"")
    assert "PyTorch" in refusal(Adapter, adapter)
    (adapter / "adapter_config.json").write_text("[" * 100_000)
    assert "JSON object" in refusal(Adapter, adapter)
    (adapter / "adapter_config.json").write_text('{"fine_tune_type": "lora", "model": "m"}')
    assert "MLX" in refusal(Adapter, adapter)


def test_unknown_settings_are_named_once_or_refused(base, tmp_path, caplog, capsys):
    adapter = write_adapter(tmp_path / "adapter", low_rank(Q, MATRICES[Q]), new=[], newer=3)
    Adapter(adapter)
    assert ": newer (adapter_config.json)" in caplog.text
    call = ["hf", str(base), str(tmp_path / "new"), "--adapter", str(adapter), "--strict-config"]
    assert main(call) == ERROR
    assert ": newer (adapter_config.json)" in capsys.readouterr().err


def test_a_damaged_file_is_refused(tmp_path):
    adapter = write_adapter(tmp_path, low_rank(Q, MATRICES[Q]))
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "truncated" in refusal(Adapter, adapter)
    safetensors.torch.save_file({"lora_A": torch.ones(1)}, file)
    assert "lora_A" in refusal(Adapter, adapter)
