"""Unknown keys of a checkpoint, as users of each entry point see them."""

import json

import pytest

from convert.__main__ import main as convert
from llama_jax import LLM
from llama_jax.config import ConfigError
from llama_jax.engine.core import Engine
from llama_jax.engine.options import EngineOptions
from llama_jax.model import Llama
from llama_jax.ring.sharded_llama import ShardedLlama
from llama_jax.serve.launch import main as serve
from tests.support.tiny_checkpoint import write_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"surprise": 1}))
    return tmp_path / "model"


def test_serve_refuses_before_anything_starts(checkpoint, capsys):
    assert serve([str(checkpoint), "--strict-config", "--port", "0"]) == 1
    assert "surprise" in capsys.readouterr().err


def test_llm_refuses_before_an_engine_starts(checkpoint):
    with pytest.raises(ConfigError, match="surprise"):
        LLM(checkpoint, strict_config=True)


def test_an_engine_refuses(checkpoint):
    with pytest.raises(ConfigError, match="surprise"):
        Engine(EngineOptions(path=str(checkpoint), strict_config=True))


def test_a_conversion_refuses(checkpoint, tmp_path, capsys):
    arguments = ["hf", str(checkpoint), str(tmp_path / "new"), "--strict-config"]
    assert convert(arguments) == 1
    assert "surprise" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_conversion_warns_once(checkpoint, tmp_path, caplog):
    assert convert(["hf", str(checkpoint), str(tmp_path / "new")]) == 0
    [record] = caplog.records
    assert "surprise" in record.getMessage()


@pytest.mark.parametrize("model", [Llama, ShardedLlama])
def test_a_model_warns_once(checkpoint, caplog, model):
    for _ in range(2):
        model.from_pretrained(str(checkpoint))
    [record] = caplog.records
    assert "surprise" in record.getMessage()
