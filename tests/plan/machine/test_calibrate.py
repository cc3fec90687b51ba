"""`--calibrate`: the ticks of a real engine, and of random weights, as the planner reads them."""

import json

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.costs.calibration import Calibration
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import CPU
from llama_jax.costs.tick_time import TickModel
from llama_jax.plan.__main__ import WRONG, main
from llama_jax.plan.machine import calibrate
from tests.support.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("random", [False, True], ids=["checkpoint", "random weights"])
def test_the_planner_uses_what_was_measured(tmp_path, random, capsys):
    checkpoint = tmp_path / "model"
    write_checkpoint(checkpoint)
    model = checkpoint / "config.json" if random else checkpoint
    file = tmp_path / "calibration.json"
    batches = ["1@16", "2@48", "2@16+64@32"]
    flags = ["--model", str(model), "--layout", "2x2", "--max-chunk", "64", "--batches", *batches]
    validate = [] if random else ["--validate", "--gpu", "auto"]
    assert main(["--calibrate", str(file), *validate, *flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["written"] == str(file) and ("checks" in printed) == bool(validate)
    found = Calibration.read(file)
    assert [str(tick).replace(" ", "") for tick in found.ticks] == batches
    assert all(tick.seconds > 0 for tick in found.ticks)
    assert found.mesh == "2x2" and found.device == "cpu" and found.with_collectives
    assert {(entry.kind, entry.ranks) for entry in found.collectives} == {
        ("all_reduce", 2), ("ppermute", 2)
    }  # fmt: skip
    assert found.host_seconds_per_tick > 0 and found.host_seconds_per_request > 0
    assert found.copy_bytes_per_second > 0
    config = LlamaConfig.from_pretrained(checkpoint)
    model_of_ticks = TickModel(Deployment(config, CPU, Layout(2, 2), "auto"), found)
    for tick in found.ticks:
        assert model_of_ticks.expected(tick.work) == pytest.approx(tick.seconds, rel=1e-6)


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_timed(tmp_path, capsys):
    write_checkpoint(tmp_path / "model")
    file = tmp_path / "calibration.json"
    model = str(tmp_path / "model" / "config.json")
    assert main(["--calibrate", str(file), "--model", model, "--batches", "1@16", "5000@16"]) == 2
    assert not file.exists() and "5000@16" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused_before_they_are_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "available_memory", lambda: 10**9)
    monkeypatch.setattr(calibrate, "random_params", None)
    assert main(["--calibrate", str(tmp_path / "file"), "--model", "llama3.2-1b"]) == WRONG
    error = capsys.readouterr().err
    # 1.236 billion parameters of 4 bytes, and 1 GB of memory
    assert "llama3.2-1b take 4.94 GB" in error and "1.00 GB free" in error and "--model" in error


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(tmp_path, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "in a file"):
        assert main(["--calibrate", str(path), "--json"]) == WRONG
        captured = capsys.readouterr()
        assert str(path) in captured.err and "error" in json.loads(captured.out)


def test_fp8_products_are_refused_on_devices_without_them(tmp_path, capsys):
    write_checkpoint(tmp_path / "model")
    file = tmp_path / "calibration.json"
    flags = ["--model", str(tmp_path / "model" / "config.json"), "--weights", "fp8"]
    assert main(["--calibrate", str(file), *flags, "--fp8-activations"]) == WRONG
    assert not file.exists() and "fp8_activations" in capsys.readouterr().err


def test_weights_that_a_checkpoint_does_not_store_are_refused(tmp_path, capsys):
    write_checkpoint(tmp_path / "model")
    flags = ["--model", str(tmp_path / "model"), "--weights", "int8"]
    assert main(["--calibrate", str(tmp_path / "file"), *flags]) == WRONG
    assert not (tmp_path / "file").exists() and "int8" in capsys.readouterr().err
