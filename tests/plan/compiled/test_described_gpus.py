"""The descriptions of GPUs, against one that XLA wrote on a real H200."""

import re
from pathlib import Path

import pytest

from llama_jax.costs.gpus import GPUS, find_gpu
from llama_jax.plan.compiled.described_gpus import DESCRIPTIONS, target_config
from sharding.errors import UserError

REAL = Path(__file__).parents[2] / "data" / "target_configs" / "h200.pbtxt"


def fields(text: str) -> dict[str, str]:
    """The scalar fields of a text proto; of several with one name, the first."""
    found: dict[str, str] = {}
    for name, value in re.findall(r"(\w+): (\"[^\"]*\"|\S+)", text):
        found.setdefault(name, value)
    return found


def test_an_h200_is_described_as_it_describes_itself():
    real = fields(REAL.read_text())
    ours = fields(target_config(find_gpu("h200"), allowed=120_000_000_000))
    # The rates of a data sheet are rounded, and the compiler gets its memory by other ways there.
    rounded = {"memory_bandwidth", "device_memory_size", "minor", "runtime_version", "major"}
    assert {name: ours[name] for name in ours.keys() & real.keys() - rounded} == {
        name: real[name] for name in ours.keys() & real.keys() - rounded
    }
    assert len(ours.keys() & real.keys() - rounded) >= 15
    assert float(ours["memory_bandwidth"]) == pytest.approx(
        float(real["memory_bandwidth"]), rel=0.01
    )
    assert "major: 9" in REAL.read_text()


def test_the_compiler_may_use_what_jax_may():
    """XLA takes 80 % of a described device's memory as the limit of a program."""
    for allowed in (72_201_532_211, 1):
        described = int(fields(target_config(find_gpu("h100-sxm"), allowed))["device_memory_size"])
        assert allowed <= described * 0.8 < allowed + 1


def test_every_nvidia_gpu_of_the_table_is_described():
    assert DESCRIPTIONS.keys() == {name for name, gpu in GPUS.items() if gpu.platform == "gpu"}
    for name, description in DESCRIPTIONS.items():
        text = target_config(GPUS[name], 1)
        assert f"core_count: {description.cores}\n" in text
        assert text.count("{") == text.count("}")


def test_a_tpu_is_refused():
    with pytest.raises(UserError):
        target_config(find_gpu("tpu-v5e"), 1)
