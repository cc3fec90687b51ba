"""The model to plan for, by name or by path."""

import json
import shutil
import tempfile

import pytest

from llama_jax.config import ConfigError, LlamaConfig
from llama_jax.plan.model import MODELS, find_model, with_weights
from sharding.errors import UserError
from tests.support.another_user import as_another_user
from tests.support.paths import ROOT

DEMO = ROOT / "demo" / "checkpoint"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama3-70b", LlamaConfig.llama3_70b()),
        ("70B", LlamaConfig.llama3_70b()),
        ("8b", LlamaConfig.llama3_8b()),
        ("405b", LlamaConfig.llama3_1_405b()),
        ("meta-llama/Meta-Llama-3-8B-Instruct", LlamaConfig.llama3_8b()),
        ("meta-llama/Llama-3.1-70B-Instruct", LlamaConfig.llama3_1_70b()),
        ("Llama_3.2_1B", LlamaConfig.llama3_2_1b()),
        ("3b", LlamaConfig.llama3_2_3b()),
    ],
)
def test_names_are_known_in_their_usual_spellings(name, config):
    assert find_model(name) == config


def test_a_checkpoint_or_its_config_is_read(tmp_path):
    copy = tmp_path / "config.json"
    shutil.copy(DEMO / "config.json", copy)
    assert find_model(str(DEMO)).num_layers == find_model(str(copy)).num_layers == 8


@pytest.mark.parametrize("name", ["~nobody-of-this-name/llama3-71b", "a" * 300])
def test_what_can_be_no_path_is_refused(name):
    with pytest.raises(UserError):
        find_model(name)


def test_the_folder_of_a_stranger_does_not_hide_a_models_name():
    """`pathlib` raises for a "~user" that there is not."""
    assert find_model("~nobody-of-this-name/llama3-70b") == LlamaConfig.llama3_70b()


def test_a_checkpoint_that_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as folder:  # 0700, so that another user may not enter
        shutil.copy(DEMO / "config.json", folder)
        with as_another_user():
            for path in (folder, f"{folder}/config.json", f"{folder}/deeper"):
                with pytest.raises(UserError, match=f"{folder}.*Permission denied"):
                    find_model(path)


def test_an_unknown_model_gets_the_nearest_names():
    with pytest.raises(UserError, match=r"llama3-70b"):
        find_model("lama3-71b")


@pytest.mark.parametrize("content", ["[1]", "{", json.dumps({"model_type": "gpt2"})])
def test_what_is_no_llama_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError):
        find_model(str(path))


def test_weights_can_be_planned_in_another_format():
    for name in MODELS:
        assert with_weights(find_model(name), "fp8").quantization.format == "fp8"
    quantized = with_weights(LlamaConfig.llama3_8b(), "int4")
    assert with_weights(quantized, "int4") == quantized
    assert with_weights(LlamaConfig.llama3_8b(), "bf16") == LlamaConfig.llama3_8b()
    with pytest.raises(UserError):
        with_weights(quantized, "fp8")
