"""The JSON files of a checkpoint are read once, when it is opened."""

import json
from collections import Counter
from pathlib import Path

import pytest

from llama_jax.checkpoint import open_checkpoint
from llama_jax.config import ConfigError, Quantization
from llama_jax.config.huggingface import read_checkpoint_config
from llama_jax.config.huggingface_quantization import StoredQuantization
from llama_jax.config.stored_matrices import StoredMatrices
from tests.support.tiny_checkpoint import write_checkpoint


def test_each_file_is_read_once(tmp_path, monkeypatch):
    write_checkpoint(tmp_path)
    content = {"do_sample": True, "temperature": 0.5, "eos_token_id": [3, 4]}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    reads = Counter()
    read_text = Path.read_text

    def counted(path, *args, **kwargs):
        reads[path.name] += 1
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", counted)
    declared = open_checkpoint(tmp_path).declared
    defaults = declared.generation_defaults()
    assert (reads["config.json"], reads["generation_config.json"]) == (1, 1)
    assert defaults.temperature == 0.5
    assert declared.config.eos_token_ids == (3, 4, 2)
    assert declared.quantization is None
    assert read_checkpoint_config(tmp_path).generation_defaults() == defaults


def test_unsupported_defaults_do_not_prevent_reading(tmp_path):
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_beams": 4}))
    declared = read_checkpoint_config(tmp_path)
    with pytest.raises(ConfigError, match="num_beams"):
        declared.generation_defaults()


def test_an_adapter_beside_the_model_is_not_passed_over_in_silence(tmp_path):
    """transformers adds it to the model."""
    write_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    declared = read_checkpoint_config(tmp_path)
    with pytest.raises(ConfigError, match="adapter_config"):
        declared.report_unknown(strict=True)


def test_the_tool_that_quantized_is_known(tmp_path):
    write_checkpoint(tmp_path)
    file = tmp_path / "config.json"
    quantization = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"quantization_config": quantization})
    )
    declared = read_checkpoint_config(tmp_path)
    assert declared.quantization == StoredQuantization(
        "fbgemm_fp8", StoredMatrices("fp8", Quantization(format="fp8"))
    )
    assert declared.config.quantization == Quantization(format="fp8")
