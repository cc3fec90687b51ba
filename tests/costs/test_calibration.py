"""The calibration file: what is written is read again, and anything broken is refused."""

import json
from dataclasses import replace

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.costs.calibration import (
    BadCalibration,
    Calibration,
    MeasuredCollective,
    MeasuredStreams,
    MeasuredTick,
    model_sizes,
)
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import find_gpu
from llama_jax.plan.model import with_weights

MEASURED = Calibration(
    device="NVIDIA H200",
    mesh="4x2",
    model=model_sizes(LlamaConfig.llama3_70b()),
    weights="bfloat16",
    kv_cache_dtype="bf16",
    ticks=(MeasuredTick(8, 2048, 256, 0, 0.006), MeasuredTick(1, 128, 0, 0, 0.004)),
    host_seconds_per_tick=0.0,
    host_seconds_per_token=1e-5,
    host_seconds_per_request=0.0,
    front_seconds=0.01,
    host_source="a test",
    streams=(MeasuredStreams(8, 32, 48, 0.1, 0.01),),
    copy_bytes_per_second=4.13e12,
    matrix_flops_per_second={"bfloat16": 6.9e14},
    collectives=(MeasuredCollective("all_reduce", 2, 16384, 5e-6),),
    versions={"jax": "0.11.2"},
    source="a test",
)


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "new" / "calibration.json"
    MEASURED.write(path)
    assert Calibration.read(path) == MEASURED
    sparse = replace(MEASURED, ticks=(), collectives=(), host_seconds_per_tick=None)
    sparse.write(path)
    assert Calibration.read(path) == sparse


def test_times_of_fp8_products_hold_for_no_other_program(tmp_path):
    config = with_weights(LlamaConfig.llama3_70b(), "fp8")
    for on in (False, True):
        measured = replace(MEASURED, weights="fp8", fp8_activations=on)
        measured.write(tmp_path / "calibration.json")
        measured = Calibration.read(tmp_path / "calibration.json")
        for planned in (False, True):
            deployment = Deployment(config, find_gpu("h200"), Layout(4, 2), "bf16", planned)
            assert (measured.mismatch(deployment) is None) == (planned == on)


def test_a_file_from_before_fp8_products_was_measured_without(tmp_path):
    path = tmp_path / "calibration.json"
    MEASURED.write(path)
    content = json.loads(path.read_text())
    del content["fp8_activations"]
    path.write_text(json.dumps(content))
    assert Calibration.read(path) == MEASURED


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("format",), "llama_jax calibration 0"),
        (("mesh",), "4"),
        (("mesh",), "0x2"),
        (("model",), {"embed_dim": 8}),
        (("model", "num_layers"), 0),
        (("versions",), {"jax": 1}),
        (("with_collectives",), 1),
        (("fp8_activations",), "on"),
        (("copy_bytes_per_second",), 0),
        (("host_seconds_per_tick",), -1e-3),
        (("host_seconds_per_token",), "fast"),
        (("front_seconds",), float("inf")),
        (("host_source",), 1),
        (("front_seconds",), 10**400),
        (("streams", 0, "streams"), 0),
        (("streams", 0, "token_seconds"), 0),
        (("streams",), None),
        (("matrix_flops_per_second",), {"bfloat16": "fast"}),
        (("matrix_flops_per_second", "bfloat16"), 0),
        (("surprise",), 1),
        (("ticks",), None),
        (("ticks", 0), []),
        (("ticks", 0, "rows"), 1.5),
        (("ticks", 0, "rows"), True),
        (("ticks", 1, "rows"), 0),
        (("ticks", 0, "seconds"), float("nan")),
        (("ticks", 0, "seconds"), 0),
        (("ticks", 0, "seconds"), 1e308),
        (("ticks", 0, "seconds"), 1e-300),
        (("ticks", 0, "surprise"), 1),
        (("collectives", 0, "kind"), "gossip"),
        (("collectives", 0, "bytes"), 0),
    ],
)
def test_a_wrong_value_is_refused(tmp_path, keys, value):
    path = tmp_path / "calibration.json"
    MEASURED.write(path)
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(BadCalibration):
        Calibration.read(path)


def test_a_missing_key_and_a_file_that_is_no_json_are_refused(tmp_path):
    path = tmp_path / "calibration.json"
    MEASURED.write(path)
    content = json.loads(path.read_text())
    for broken in (
        {key: value for key, value in content.items() if key != "mesh"},
        content | {"ticks": [{"rows": 1}]},
        [],
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(BadCalibration):
            Calibration.read(path)
    for text in ("{", "", 100_000 * "["):
        path.write_text(text)
        with pytest.raises(BadCalibration):
            Calibration.read(path)
    with pytest.raises(BadCalibration):
        Calibration.read(tmp_path / "missing.json")
