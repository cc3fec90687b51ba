"""The sampling defaults of a checkpoint, from its generation_config.json."""

import json

import pytest

from llama_jax.config import ConfigError
from llama_jax.config.huggingface import read_checkpoint_config
from tests.support.tiny_checkpoint import write_checkpoint


@pytest.fixture
def defaults_of(tmp_path):
    write_checkpoint(tmp_path)

    def defaults_of(content):
        if content is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(content))
        return read_checkpoint_config(tmp_path).generation_defaults()

    return defaults_of


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, (0.0, 0, 1.0, 0.0)),
        ({"temperature": 0.6, "top_p": 0.9}, (0.0, 0, 0.9, 0.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, (0.6, 0, 0.9, 0.0)),
        ({"do_sample": True, "top_k": 40, "min_p": 0.05}, (1.0, 40, 1.0, 0.05)),
        ({"do_sample": True, "top_k": None, "num_beams": 1}, (1.0, 0, 1.0, 0.0)),
        ({"do_sample": True, "temperature": None, "top_p": None}, (1.0, 0, 1.0, 0.0)),
        ({"do_sample": None, "temperature": 0.6}, (0.0, 0, 1.0, 0.0)),
    ],
)
def test_default_sampling_is_the_checkpoints(defaults_of, content, expected):
    params = defaults_of(content)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == expected
    assert params.typical_p == 1


def test_every_filter_of_the_checkpoint_is_applied(defaults_of):
    filters = {"top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.7, "repetition_penalty": 1.5}
    params = defaults_of({"do_sample": True, **filters})
    assert {name: getattr(params, name) for name in filters} == filters


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"do_sample": True, "temperature": "hot"}, "temperature"),
        ({"do_sample": True, "temperature": 10**400}, "temperature"),
        ({"do_sample": "yes"}, "do_sample"),
        ({"do_sample": True, "top_k": 2.5}, "top_k"),
        ({"stop_strings": ["###"]}, "stop_strings"),
        ({"token_healing": True}, "token_healing"),
        ({"top_p": 0}, "top_p"),
        ({"typical_p": 0}, "typical_p"),
    ],
)
def test_unsupported_sampling_is_refused(defaults_of, content, field):
    with pytest.raises(ConfigError, match=field) as caught:
        defaults_of(content)
    assert "generation_config.json" in str(caught.value)
