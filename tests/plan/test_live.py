"""A prediction beside what a server reports: drift, other meshes, no traffic."""

import json
import math
from dataclasses import replace

import pytest

from llama_jax.costs.deployment import Layout
from llama_jax.costs.figure import Band
from llama_jax.costs.gpus import find_gpu
from llama_jax.costs.work import Work
from llama_jax.engine.interface import ProgramStats, StageStats, Stats
from llama_jax.plan import live
from llama_jax.plan.__main__ import main
from llama_jax.plan.live import check_answers, check_model, comparison, drift
from llama_jax.plan.model import find_model
from llama_jax.plan.plan import Plan, Question, make_plan
from llama_jax.plan.server_metrics import ComparisonError, Latency, Seen
from llama_jax.plan.targets import Targets, Workload
from llama_jax.ring.sizes import Bucket
from tests.plan.test_server_metrics import Served, serving


def a_plan(**changes) -> Plan:
    question = Question(
        "llama3-70b",
        find_model("llama3-70b"),
        find_gpu("h100-sxm"),
        8,
        Workload(1024, 256, 8.0),
        Targets(0.5, 0.05, 0.85),
    )
    return make_plan(replace(question, **changes))


def compared(seen, url="http://h/metrics", layout=None, **changes):
    load = Workload(round(seen.prompt_tokens), round(seen.output_tokens), seen.rate)
    return comparison(a_plan(workload=load, layout=layout), seen, url, **changes)


def what_was_seen(**changes) -> Seen:
    latency = Latency(800, 0.1, Band(0.08, 0.1, 0.25), Band(0.1, 0.2, 0.25))
    seen = Seen(
        requests=800,
        seconds=100.0,
        prompt_tokens=1000.4,
        output_tokens=250.0,
        ttft=latency,
        tpot=replace(latency, mean=0.03),
        running=64,
        pool=0.07,
        slots_used=0.7,
        stages_busy=1.0,
        ticks={Bucket(16, 0): (9000, 0.0078), Bucket(16, 256): (3000, 0.1)},
        num_stages=4,
        num_devices=8,
        pool_tokens=1_000_000,
    )
    return replace(seen, **changes)


def rows(report, section, table):
    found = next(s for s in report.sections if s.name == section)
    wanted = next(t for t in found.tables if t.name == table)
    return {row[0]: dict(zip(wanted.columns, row, strict=True)) for row in wanted.rows}


def test_each_figure_has_its_prediction_and_its_drift():
    report = compared(what_was_seen(), planned=Workload(1024, 256, 8.0))
    load = rows(report, "load", "load")
    assert load["prompt tokens, mean"]["drift"] == "-2 %" and load["requests/s"]["drift"] == "+0 %"
    figures = rows(report, "figures", "figures")
    tpot = figures["mean TPOT"]
    expected = tpot["predicted"].value.expected
    assert tpot["drift"] == f"{100 * (0.03 / expected - 1):+.0f} %"
    assert tpot["seen"].value == Band.exactly(0.03)
    assert figures["KV pool in use"]["predicted"].value.expected == pytest.approx(
        figures["running"]["predicted"].value.expected * (1000 + 125) / 1e6
    )
    ticks = rows(report, "ticks", "ticks")
    assert ticks["16 rows"]["band"] == "inside" and ticks["16 rows + 256"]["band"] == "outside"
    # 32 sequences in four packets, each in the middle of its answer.
    layout = Layout(4, 2)
    few = rows(compared(what_was_seen(running=32), layout=layout), "ticks", "ticks")["16 rows"]
    model = a_plan(layout=layout).question.tick_model(layout)
    assert few["predicted"].value == model.seconds(Work(16, 0, 8 * (1000 + 125)))


def test_the_prediction_is_for_the_load_that_was_seen():
    slow, fast = (rows(compared(what_was_seen(seconds=s)), "figures", "figures") for s in (800, 60))
    running = [r["running"]["predicted"].value.expected for r in (slow, fast)]
    assert running[1] > 10 * running[0]


def test_a_percentile_is_compared_only_with_the_same_one():
    seen = what_was_seen()
    load = Workload(round(seen.prompt_tokens), round(seen.output_tokens), seen.rate)
    plans = [
        a_plan(workload=load, layout=Layout(4, 2), targets=Targets(0.5, 0.05, 0.85, inside))
        for inside in (0.99, 0.9)
    ]
    names = [rows(comparison(plan, seen, "u"), "figures", "figures") for plan in plans]
    assert names[0].keys() - names[1].keys() == {"TTFT, p99", "TPOT, p99"}
    # Of the server only a bucket is known: 0.1 to 0.25 s, and the prediction lies below or in it.
    assert names[0]["TPOT, p99"]["predicted"].value.high < 0.1
    assert names[0]["TPOT, p99"]["band"] == "outside"
    assert names[0]["TTFT, p99"]["band"] == "inside"
    fast = replace(seen, ttft=replace(seen.ttft, p99=Band(0.0, 0.003, 0.005)))
    below = rows(compared(fast, layout=Layout(4, 2)), "figures", "figures")
    assert below["TTFT, p99"]["band"] == "outside"
    means, tails = (names[0][name]["predicted"].value for name in ("mean TTFT", "TTFT, p99"))
    assert means.expected < tails.expected


def test_the_command_plans_for_what_was_seen(capsys, monkeypatch):
    seen = what_was_seen(seconds=1e4, prompt_tokens=500.4)
    monkeypatch.setattr(live, "observe", lambda *_: seen)
    assert main(["--compare", "http://h", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)["sections"]
    found = sections["figures"]["tables"]["figures"]
    assert "planned" not in sections["load"]["tables"]["load"][0]  # nothing was said of it
    expected = rows(compared(seen, layout=Layout(4, 2)), "figures", "figures")
    for row in found:
        predicted = expected[row["figure"]]["predicted"].value.expected
        assert row["predicted"]["expected"] == pytest.approx(predicted)


def test_the_mesh_of_the_server_is_looked_for_among_the_layouts():
    report = compared(what_was_seen(num_stages=2, num_devices=8))
    assert "2x4" in report.title
    report = compared(what_was_seen(num_stages=8, num_devices=0))
    assert "8x1" in report.title
    # A server is one of the replicas, and what it reports is its own load.
    half = what_was_seen(num_stages=2, num_devices=4)
    report = compared(half)
    assert "2x2" in report.title and "replicas" not in report.title
    running = rows(report, "figures", "figures")["running"]["predicted"].value
    load = Workload(round(half.prompt_tokens), round(half.output_tokens), half.rate)
    alone = a_plan(workload=load, gpus=4, layout=Layout(2, 2)).best
    assert running == alone.band("live")
    with pytest.raises(ComparisonError):
        compared(what_was_seen(num_stages=3))


@pytest.mark.parametrize("changes", [{"requests": 0}, {"prompt_tokens": math.nan}])
def test_a_server_without_answers_cannot_be_compared(changes):
    with pytest.raises(ComparisonError):
        check_answers(what_was_seen(**changes), "u")


@pytest.mark.parametrize(
    ("band", "seen", "expected"),
    [
        (Band(1, 2, 3), 3, ("+50 %", "inside")),
        (Band(1, 2, 3), 4, ("+100 %", "outside")),
        (Band(1, 2, 3), 0.5, ("-75 %", "outside")),
        (Band(1, 2, 3), 400, ("× 200", "outside")),
        (Band(1, 2, 3), 1.999, ("+0 %", "inside")),
        (Band.exactly(math.inf), 1, ("", "overloaded")),
        (Band.exactly(0), 1, ("", "")),
    ],
)
def test_the_drift_is_a_share_of_the_expected_value(band, seen, expected):
    assert drift(band, seen) == expected


def test_a_server_of_another_model_is_refused():
    question = a_plan().question
    for name in ("", "checkpoint", "Meta-Llama-3.1-70B-Instruct", "llama3-70b"):
        check_model(question, what_was_seen(model=name), "u")
    with pytest.raises(ComparisonError, match="--model Llama-3-8B"):
        check_model(question, what_was_seen(model="Llama-3-8B"), "u")
    report = compared(what_was_seen(model="mine"))
    assert "“mine”" in report.sections[0].text[0] and "llama3-70b" in report.sections[0].text[0]


def test_the_command_compares_with_a_server(capsys, monkeypatch):
    server = Served()
    server.stats = replace(
        server.stats,
        stages=(StageStats(1, 0),) * 4,
        memory=server.stats.memory * 2,
        programs=(ProgramStats(8, 0, 20, 0.2),),
    )
    for _ in range(3):
        server.answer(0.1, 0.03, tokens=11)
    with serving(server.text, key="k") as (url, _):
        assert main(["--compare", url, "--api-key", "k", "--layout", "4x2", "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert main(["--compare", url, "--layout", "4x2"]) == 2
        with monkeypatch.context() as environment:
            environment.setenv("OPENAI_API_KEY", "k")
            assert main(["--compare", url, "--layout", "4x2"]) == 0
            capsys.readouterr()
        assert main(["--compare", url, "--api-key", "k", "--layout", "8x1"]) == 2
        assert main(["--compare", url, "--api-key", "k"]) == 0
        assert "4x2" in capsys.readouterr().out  # the server's own mesh
        server.stats = Stats()
        server.metrics = Served().metrics
        assert main(["--compare", url, "--api-key", "k"]) == 2  # no request yet
    found = content["sections"]["figures"]["tables"]["figures"]
    tpot = next(row for row in found if row["figure"] == "mean TPOT")
    assert tpot["seen"]["expected"] == pytest.approx(0.03)
    assert tpot["seen"]["evidence"] == "measured here"
    assert content["sections"]["ticks"]["tables"]["ticks"][0]["program"] == "8 rows"
