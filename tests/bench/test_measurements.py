"""Measurements at toy size: each gives the rows, units and targets that it promises."""

from pathlib import Path

import pytest

from bench import peers
from bench.__main__ import main
from bench.result import Result


def measured(tmp_path: Path, *argv: str) -> Result:
    """Runs a measurement; a missed target is no failure here, since other programs run too."""
    path = tmp_path / "result.json"
    assert main([*argv, "--output", str(path)]) in (0, 1)
    return Result.read(path)


def columns(result: Result) -> list[tuple[str, ...]]:
    """The sets of columns of the rows, each once."""
    return list(dict.fromkeys(tuple(row) for row in result.rows))


def test_scheduler(tmp_path):
    found = measured(tmp_path, "engine", "--parts", "scheduler", "--ticks", "4")
    assert columns(found) == [("decoding", "per tick", "per row"), ("waiting", "per tick")]
    assert len(found.targets) == len(found.plots) == 2 and found.flags["ticks"] == 4


def test_simulation(tmp_path):
    found = measured(tmp_path, "simulation", "--seconds", "3", "--levels", "low", "high")
    plan, low, high = found.rows
    assert plan["run"] == "plan" and low["requests"] == high["requests"] > 0
    for row, target in zip((low, high), found.targets, strict=True):
        assert 0 < row["tokens"] == 256 * row["requests"]  # each is answered to its end
        assert target.value == pytest.approx(row["cpu"] * 1200)


def test_peers(tmp_path, monkeypatch):
    """With given times: only what is made of them is tested here."""
    times = {"llama-jax": 1.0, "transformers": 1.2, "tunix": 3.0}
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    monkeypatch.setattr(peers, "write_model", lambda path: 5)
    monkeypatch.setattr(peers, "in_turns", lambda *_: dict(times))
    found = measured(tmp_path, "peers")
    assert [(row["weights"], row.get("batch", row.get("prompt"))) for row in found.rows] == [
        (dtype, number) for dtype in ("float32", "bfloat16") for number in (1, 8, 32, 512)
    ]
    assert {row["transformers / llama-jax"] for row in found.rows} == {1.2}
    met = {target.what: target.met for target in found.targets}
    assert len(met) == 2 * (3 + 1 + 1)
    assert not met["transformers / llama-jax: decode at batch 8, float32"]
    assert met["transformers / llama-jax: prefill of 512, bfloat16"]
    assert met["tunix / llama-jax: decode at batch 8, float32"]


@pytest.mark.slow
def test_engine(tmp_path):
    sizes = ("--ticks", "20", "--tokens", "8", "--repeats", "1")
    found = measured(tmp_path, "engine", "--parts", "host", "http", *sizes)
    assert [row.get("requests") for row in found.rows[:2]] == ["greedy", "sampled"]
    stub, engine = found.rows[2:]
    assert 0 < engine["least share"] <= engine["share"] <= engine["greatest share"]
    assert all(row["server's CPU"] > 0 and row["reader's CPU"] > 0 for row in (stub, engine))
    assert engine["its CPU"] < engine["server's CPU"] and "share" not in stub
    assert {"jax", "starlette"} <= set(found.versions) and len(found.targets) == 5


@pytest.mark.slow
def test_scaling(tmp_path):
    found = measured(
        tmp_path, "scaling", "--batches", "1", "2", "--contexts", "128", "256",
        "--prompts", "512", "1024", "--pages", "64", "256", "--seconds", "0", "--ticks", "4",
    )  # fmt: skip
    memory = [row for row in found.rows if "pages" in row]
    assert memory[1]["KV cache"] == 4 * memory[0]["KV cache"]
    assert memory[1]["temporaries"] < 1.1 * memory[0]["temporaries"]
    assert len(found.targets) == 6 and len(found.plots) == 6


@pytest.mark.slow
def test_sampling(tmp_path):
    found = measured(tmp_path, "sampling", "--toy", "--rounds", "1", "--meshes", "2x2", "1x1")
    assert columns(found) == [("mesh", "logits", "kind", "time", "least")]
    assert len(found.rows) == 2 * 2 * 9 and all(row["time"] > 0 for row in found.rows)
