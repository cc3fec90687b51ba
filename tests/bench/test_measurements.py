"""Measurements at toy size: each gives the rows, units and targets that it promises."""

import math
from pathlib import Path

import pytest

from bench import contexts, host_time, peers, scheduler_time, streaming
from bench.__main__ import main
from bench.peer_engines import Moment, Times
from bench.result import Result
from bench.streaming import Watch


def measured(tmp_path: Path, *argv: str) -> Result:
    """Runs a measurement; a missed target is no failure here, since other programs run too."""
    path = tmp_path / "result.json"
    assert main([*argv, "--output", str(path)]) in (0, 1)
    return Result.read(path)


def columns(result: Result) -> list[tuple[str, ...]]:
    """The sets of columns of the rows, each once."""
    return list(dict.fromkeys(tuple(row) for row in result.rows))


def test_scheduler(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler_time, "SEQUENCES", (64, 128))
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


CLOCKS = {"llama-jax 1x1": 1.0, "llama-jax 1x2": 0.8, "transformers": 1.2, "flax": 3.0}


class FakeWorker:
    """Engines with given times: only what is made of them is tested here."""

    def __init__(self, engine: str, *_: str):
        self.clock = CLOCKS[engine]

    def prepare(self, batch: int, prompt: int, new_tokens: int) -> None:
        self.decodes = new_tokens > 1

    def answer(self) -> Times:
        self.clock += 0.1  # so the first round is the least
        moment = Moment(self.clock, self.clock / 2)
        return Times(moment, moment if self.decodes else None)

    def close(self) -> None:
        pass


def test_peers(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "Worker", FakeWorker)
    monkeypatch.setattr(peers, "write_model", lambda path: 5)
    found = measured(tmp_path, "peers", "--flax", "python", "--rounds", "2")
    assert [(row["weights"], row.get("batch", row.get("prompt"))) for row in found.rows] == [
        (dtype, number)
        for dtype in ("float32", "bfloat16")
        for number in (1, 1, 8, 8, 8, 8, 32, 32, 512, 512)
    ]
    assert [(row["mesh"], row["peer"]) for row in found.rows[2:6]] == [
        ("1x1", "transformers"), ("1x1", "flax"), ("1x2", "transformers"), ("1x2", "flax")
    ]  # fmt: skip
    first = found.rows[0]
    assert (first["ours"], first["peer's"]) == pytest.approx((1.1, 1.3))
    assert (first["ratio"], first["CPU ratio"]) == pytest.approx((1.3 / 1.1, 1.3 / 1.1))
    assert (first["least"], first["greatest"]) == pytest.approx((1.4 / 1.2, 1.3 / 1.1))
    met = {target.what: target.met for target in found.targets}
    assert len(met) == len(found.rows)
    assert not met["transformers / llama-jax 1x1: decode at batch 8, float32"]
    assert met["transformers / llama-jax 1x1: prefill of 512, bfloat16"]
    assert met["transformers / llama-jax 1x2: decode at batch 8, float32"]
    assert met["flax / llama-jax 1x1: decode at batch 8, float32"]


@pytest.mark.slow
def test_peers_with_real_engines(tmp_path):
    found = measured(
        tmp_path, "peers", "--toy", "--rounds", "1", "--batches", "2", "--dtypes", "bfloat16"
    )
    assert [row.get("batch", row.get("prompt")) for row in found.rows] == [2, 2, 512, 512]
    assert all(row["ours"] > 0 and row["peer's"] > 0 for row in found.rows)


def test_the_steady_rate_leaves_out_the_begin_and_the_end():
    watch = Watch(progress={})
    now = 0.0
    for tokens in range(300, 1301, 10):  # 300 before, and 1,000 of these streams
        watch.progress[tokens] = now
        now += 0.1 if 400 <= tokens < 1200 else 3.0
    assert watch.steady_rate(1000) == pytest.approx(100)
    assert math.isnan(Watch(progress={300: 0.0, 1300: 9.0}).steady_rate(1000))


@pytest.mark.slow
def test_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(host_time, "SEQUENCES", 16)
    monkeypatch.setattr(streaming, "STREAMS", 4)
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


def test_what_one_long_context_adds(tmp_path, monkeypatch):
    monkeypatch.setattr(contexts, "OneDevice", lambda *_: None)
    monkeypatch.setattr(contexts, "ticks", lambda device, rows, longest: list)
    # As if every row cost what the longest of its half does.
    halves = lambda lengths: 2 * sum(max(lengths[half::2]) for half in (0, 1))  # noqa: E731
    monkeypatch.setattr(
        contexts, "least_times", lambda call, _: {"time": 9.0, "CPU time": halves(call())}
    )
    found = measured(tmp_path, "contexts", "--rows", "4", "--short", "10", "--long", "50")
    assert [(row["long rows"], row["keys"]) for row in found.rows] == [(0, 40), (1, 80), (4, 200)]
    [target] = found.targets
    assert target.value == pytest.approx(1 / 2) and not target.met


@pytest.mark.slow
def test_contexts(tmp_path):
    found = measured(
        tmp_path, "contexts", "--rows", "3", "--short", "5", "--long", "40", "--seconds", "0"
    )
    assert columns(found) == [("rows", "long rows", "keys", "time", "CPU time")]
    assert all(row["time"] > 0 for row in found.rows)


@pytest.mark.slow
def test_sampling(tmp_path):
    found = measured(tmp_path, "sampling", "--toy", "--rounds", "1", "--meshes", "2x2", "1x1")
    assert columns(found) == [("mesh", "logits", "kind", "time", "least")]
    assert len(found.rows) == 2 * 2 * 9 and all(row["time"] > 0 for row in found.rows)
