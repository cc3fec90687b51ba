"""Options of an engine: what each may be, and the documentation that derives from them."""

import dataclasses

import msgspec
import pytest

from llama_jax import LLM
from llama_jax.engine.options import OPTIONS, EngineOptions, OptionError
from llama_jax.model.kv_storage import KV_DTYPES

FIELDS = [field.name for field in dataclasses.fields(EngineOptions)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"mesh": None},
        {"mesh": 4},
        {"dtype": "float16"},
        {"kv_cache_dtype": "fp4"},
        {"kv_cache_dtype": None},
        {"max_model_len": 1},
        {"max_num_seqs": 0},
        {"max_num_seqs": "4"},
        {"max_num_seqs": True},
        {"max_num_seqs": 4.0},
        {"max_queue": -1},
        {"kv_cache_memory": 0},
        {"kv_cache_memory": 2**63},
        {"gpu_memory_utilization": 0},
        {"gpu_memory_utilization": 1.1},
        {"gpu_memory_utilization": float("nan")},
        {"gpu_memory_utilization": "0.9"},
        {"gpu_memory_utilization": True},
        {"page_size": 0},
        {"max_chunk": 0},
        {"tpot_slo": 0},
        {"tpot_slo": 50},
        {"tpot_slo": "50ms"},
        {"ttft_slo": 500},
        {"ttft_slo": float("nan")},
        {"results_late": -1},
        {"fp8_activations": "yes"},
        {"strict_config": 1},
        {"strict_config": None},
    ],
)
def test_a_wrong_value_is_refused_by_name(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(OptionError, match=f"^{name} must"):
        EngineOptions(path="x", **wrong).check()


def test_defaults_and_limits_are_valid() -> None:
    EngineOptions(path="x").check()
    for option in OPTIONS:
        for value in (option.minimum, option.maximum, *(option.choices or ())):
            if value is not None:
                dataclasses.replace(EngineOptions(path="x"), **{option.name: value}).check()


def test_the_dtypes_of_the_kv_cache_are_those_that_it_can_have() -> None:
    (option,) = (option for option in OPTIONS if option.name == "kv_cache_dtype")
    assert option.choices == ("auto", *KV_DTYPES)


def test_every_option_is_declared_and_documented() -> None:
    assert [option.name for option in OPTIONS] == [name for name in FIELDS if name != "path"]
    for doc in (EngineOptions.__doc__, LLM.__init__.__doc__):
        for option in OPTIONS:
            assert f"{option.name}: " in doc and option.default_text.split()[0] in doc
        assert "{options}" not in doc


def test_options_survive_the_way_to_the_engine() -> None:
    options = EngineOptions(path="x", mesh="4x2", max_queue=7, kv_cache_memory=2**40)
    assert msgspec.json.decode(msgspec.json.encode(options), type=EngineOptions) == options
