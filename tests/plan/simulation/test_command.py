"""The command line of the simulation: the same output in every process, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from llama_jax.config import LlamaConfig
from llama_jax.costs.work import Work
from llama_jax.plan.__main__ import main
from llama_jax.plan.command_line import make_parser, read_question
from llama_jax.plan.plan import make_plan
from llama_jax.plan.planned_load import DEFAULT_LOAD, planned_load
from llama_jax.plan.simulation.beyond_one_load import daily, highest_section
from llama_jax.plan.simulation.daily import CurveError, Point, Policy, rate_at, read_curve, scale
from llama_jax.plan.simulation.highest_rate import HighestRate
from llama_jax.plan.simulation.lengths import Lengths
from llama_jax.plan.simulation.scenario import Scenario, scenario
from llama_jax.plan.targets import Targets, Workload
from sharding.errors import UserError
from tests.support.paths import ROOT

SHORT = ["--layout", "4x2", "--rate", "6", "--output-tokens", "16", "--duration", "8s", "--json"]


def run(capsys, *arguments: str) -> tuple[int, dict]:
    code = main([*SHORT, *arguments])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_same_json_in_every_process():
    """Byte for byte, whatever the hash seed, and whatever else runs at the same time."""
    command = [sys.executable, "-m", "llama_jax.plan", *SHORT, "--simulate", "--outage", "2s"]
    command += ["--duration", "2s", "--retry"]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    outputs = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    (output,) = outputs
    found = json.loads(output)
    assert found["met"] is True
    outages = found["sections"]["failure"]["tables"]["failure"][-1]
    assert outages["found"] == "any number: none loses a request"  # clients send again


def test_a_missed_target_is_an_exit_code(capsys):
    code, found = run(capsys, "--simulate", "--ttft", "1ms")
    assert code == 1 and found["met"] is False


def test_users_find_a_slot_each(capsys):
    """At a rate that two slots would do for, 40 users do not wait for each other's answers."""
    arguments = ["--simulate", "--users", "40", "--rate", "0.1", "--output-tokens", "64"]
    _, found = run(capsys, *arguments, "--think", "500ms")
    assert found["title"].endswith("a closed loop of 40 users with pauses of 0.5 s")
    rows = {row["latency"]: row for row in found["sections"]["latencies"]["tables"]["latencies"]}
    answer = rows["e2e"]["p50"]["expected"] - rows["ttft"]["p50"]["expected"]
    assert rows["queueing"]["p50"]["expected"] < answer / 4


def test_figures_are_bands_that_say_how_they_are_known(capsys):
    code, found = run(capsys, "--simulate")
    rows = found["sections"]["latencies"]["tables"]["latencies"]
    assert code == 0 and [row["latency"] for row in rows] == ["ttft", "tpot", "e2e", "queueing"]
    for row in rows[:3]:
        figure = row["p50"]
        assert 0 < figure["low"] < figure["expected"] < figure["high"]
        assert figure["evidence"] == "simulated"


def test_the_cache_of_a_device_has_the_share_of_its_memory_that_was_planned():
    """That of a TPU, too, whose server has no flag for it."""
    asked = make_parser().parse_args(["--gpu", "tpu-v6e", "--users", "512", "--simulate"])
    plan = make_plan(read_question(asked))
    sizes = scenario(asked, plan).server().sizes
    assert 0 < sizes.num_pages * sizes.page_size <= plan.best.memory.tokens


def test_the_cache_is_that_of_the_command_line():
    flags = (
        "--model 8b --gpus 1 --gpu b200 --rate 100 --prompt-tokens 8 --output-tokens 400 --tpot 1s"
    )
    asked = make_parser().parse_args([*flags.split(), "--simulate", "--duration", "1s"])
    plan = make_plan(read_question(asked))
    found = scenario(asked, plan)
    sizes, token = found.server().sizes, plan.best.memory.token
    left = found.options.kv_cache_memory
    assert sizes.num_pages == left // (sizes.page_size * token) < plan.best.memory.tokens // 64


def asked_for(*flags: str) -> Scenario:
    asked = make_parser().parse_args(["--layout", "4x2", "--duration", "1s", *flags])
    return scenario(asked, make_plan(read_question(asked)))


def test_what_is_simulated_is_what_was_asked_for(tmp_path):
    found = asked_for("--seed", "7", "--prefix-tokens", "64", "--prefixes", "3", "--simulate")
    drawn = (found.draw.seed, found.draw.prefix_tokens, found.draw.prefixes, found.draw.duration)
    assert drawn == (7, 64, 3, 1.0)
    assert replace(found, max_queue_tokens=5).server().max_queue_tokens == 5
    others = replace(found.options, prefix_caching=False, max_queue=3)
    server = replace(found, options=others).server("high")
    assert (server.prefix_caching, server.max_queue) == (False, 3)
    model, work = found.plan.best.replica.model, Work.of(8, 1000)
    assert server.tick_time(work).seconds == model.seconds(work).high
    users = asked_for("--users", "41", "--gpus", "16", "--rate", "0.1")
    assert users.load.until == 1.0 and users.options.max_num_seqs == 21  # of each replica
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,1\n0.5,9000,9\n1,10,1\n")
    traced = asked_for("--trace", str(trace))
    assert [request.prompt_tokens for request in traced.load.requests] == [10, 9000]
    assert traced.options.max_model_len == LlamaConfig.llama3_70b().max_context


def test_a_trace_says_what_arrives(capsys, tmp_path):
    trace = tmp_path / "trace.jsonl"
    line = {"timestamp": 0, "input_length": 1500, "output_length": 4, "hash_ids": [5, 6, 7]}
    trace.write_text("\n".join(json.dumps(line | {"timestamp": 500 * i}) for i in range(4)))
    _, found = run(capsys, "--trace", str(trace))
    rows = {row["figure"]: row["found"] for row in found["sections"]["engine"]["tables"]["engine"]}
    assert rows["requests"]["expected"] == 4
    assert 0.7 < rows["cached"]["expected"] < 0.75  # three of four prompts, but their last page


@pytest.mark.parametrize(
    "flags",
    [
        ["--trace", "none.csv"],
        ["--simulate", "--think", "1s"],
        ["--simulate", "--retry"],
        ["--simulate", "--prefixes", "3"],
        ["--simulate", "--users", "3", "--arrivals", "poisson"],
        ["--highest-rate", "--users", "3"],
        ["--outage", "3s", "--users", "3"],
        ["--daily", "none.csv"],
        ["--simulate", "--layout", "1x1"],  # does not fit
    ],
)
def test_flags_that_make_no_sense_are_refused(capsys, flags):
    assert run(capsys, *flags)[0] == 2


@pytest.mark.parametrize("flag", ["--highest-rate", "--prompt-lengths=3", "--prefix-tokens=3"])
def test_flags_that_contradict_a_trace_are_refused(capsys, tmp_path, flag):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,3\n")
    assert run(capsys, "--trace", str(trace), flag)[0] == 2


CURVE = [Point(0, 10), Point(3600, 100), Point(7200, 10)]


def test_a_load_curve_is_followed():
    assert [rate_at(CURVE, at) for at in (0, 1800, 3600, 5400, 9000)] == [10, 55, 100, 55, 10]
    found = scale(CURVE, 10.0, Policy(load=0.8, start=60, patience=300))
    assert found.fixed == 10 and found.overloaded == 0
    # By brute force: so many at 80 % of 10 requests/s, by the mean rate of the last minute.
    assert 12 <= found.most <= 13 and found.moments[0].ready == 2
    for moment in found.moments:
        assert moment.ready * 10.0 >= moment.rate
    assert found.moments[-1].ready < 6 and 5 < found.mean < 12
    slow = scale(CURVE, 10.0, Policy(load=1.0, start=600, patience=300))
    assert slow.overloaded > 0 and slow.worst.rate / slow.worst.ready > 10


def test_replicas_follow_the_rate_by_hand():
    """10 requests/s each: 29 come from 110 s on, 30 from 300, 10 from 410, but 30 at 440 s."""
    rates = {0: 10, 100: 10, 110: 29, 290: 29, 300: 30, 400: 30, 410: 10, 430: 10, 440: 30, 450: 10}
    curve = [Point(at, rate) for at, rate in (rates | {700: 10}).items()]
    policy = Policy(load=1.0, window=10, start=30, patience=60)
    found = scale(curve, 10.0, policy)
    # Two are started at 110 s. Only from 450 s on does one suffice for a minute.
    ready = {m.at: 3 if 140 <= m.at < 510 else 1 for m in found.moments}
    assert {m.at: m.ready for m in found.moments} == ready
    assert (found.most, found.fixed, found.overloaded) == (3, 3, 30)
    assert found.worst[:3] == (110, 29, 1)
    # By the mean of three looks, which are 10 s apart.
    slower = scale(curve, 10.0, replace(policy, window=30))
    assert [m.wanted for m in slower.moments if 100 <= m.at <= 130] == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a,b\n", 1),
        ("time_s,requests_per_s\n0,1\n0,2\n", 3),
        ("time_s,requests_per_s\n0,x\n", 2),
        ("time_s,requests_per_s\n0,1\n60,1e300\n", 3),
        ("time_s,requests_per_s\n0,1\n604801,1\n", 3),  # more than a week
        ("time_s,requests_per_s\n0,1\n1e308,1\n", 3),
    ],
)
def test_a_broken_load_curve_is_refused_with_its_line(tmp_path, text, line):
    file = tmp_path / "curve.csv"
    file.write_text(text)
    with pytest.raises(CurveError, match=rf"line {line}\b"):
        read_curve(file)


def test_a_week_may_begin_at_any_time(tmp_path):
    file = tmp_path / "curve.csv"
    file.write_text("time_s,requests_per_s\n1e9,1\n1000604800,1\n")
    assert read_curve(file) == [Point(1e9, 1), Point(1e9 + 7 * 86400, 1)]


def test_a_peak_that_needs_more_gpus_than_a_plan_has_is_refused():
    """Each of 3e8 replicas would be an entry of a list."""
    plan = make_plan(read_question(asked := make_parser().parse_args([*SHORT, "--simulate"])))
    curve, rate = [Point(0, 1), Point(60, 1e9)], HighestRate((5.0, 5.0, 5.0), 100)
    with pytest.raises(UserError, match="at its peak"):
        daily(curve, scenario(asked, plan), plan.question.targets, rate)


def test_a_file_that_is_no_csv_is_no_load_curve(tmp_path):
    file = tmp_path / "curve.csv"
    file.write_text("time_s,requests_per_s\n0,1\n")
    with pytest.raises(CurveError, match="1 points"):
        read_curve(file)
    file.write_text("[" + "1" * 200_000 + "]")  # a longer field than `csv` takes
    with pytest.raises(CurveError, match=r"curve\.csv"):
        read_curve(file)


def test_a_trace_decides_what_is_planned_for(tmp_path):
    """The server has room for the requests of the trace, and a flag overrides what it says."""
    trace = tmp_path / "trace.csv"
    lines = [f"{number / 2},{3000 + number},{100 + number}" for number in range(21)]
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines))
    asked = make_parser().parse_args(["--trace", str(trace)])
    assert planned_load(asked) == Workload(3010, 110, 2.0)
    asked = make_parser().parse_args(["--trace", str(trace), "--rate", "5", "--duration", "4500ms"])
    assert planned_load(asked) == Workload(3004, 104, 5.0)


def test_a_trace_whose_requests_all_but_coincide_has_no_rate(tmp_path):
    """A quotient of their number and next to no time would be infinite."""
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n1e-320,10,5\n")
    asked = make_parser().parse_args(["--trace", str(trace)])
    assert planned_load(asked) == Workload(10, 5, DEFAULT_LOAD.rate)


def test_lengths_decide_what_is_planned_for():
    flags = ["--prompt-lengths", "lognormal:900,0.5", "--prefix-tokens", "100"]
    asked = make_parser().parse_args([*flags, "--output-lengths", "10-31"])
    assert planned_load(asked) == Workload(100 + 1020, 21, 8.0)  # 900 exp(0.125) = 1,019.8
    (mean,) = {Lengths.parse(text).mean for text in ("256", "normal:256,64", "12-500")}
    assert mean == 256


def test_a_target_that_only_simulated_answers_have_is_not_dropped(tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,1\n1,10,2\n")

    def asked(*flags: str) -> Workload:
        return planned_load(make_parser().parse_args(["--output-tokens", "1", *flags]))

    for simulated in (["--output-lengths", "10-31"], ["--trace", str(trace)]):
        with pytest.raises(UserError, match="--tpot"):
            asked(*simulated)
        assert not asked(*simulated, "--tpot", "none").has_tpot
    assert not asked("--output-lengths", "1").has_tpot
    assert not asked().has_tpot


@pytest.mark.parametrize("flag", [["--seed=-1"], ["--prefix-tokens=5000"]])
def test_numbers_that_make_no_sense(capsys, flag):
    try:
        code = main([*SHORT, "--simulate", *flag])
    except SystemExit as stop:
        code = stop.code
    assert code == 2


def test_a_share_is_named_as_it_was_asked_for():
    section = highest_section(HighestRate((5.0, 5.0, 5.0), 100), Targets(0.5, 0.05, inside=0.995))
    assert " 99.5%" in section.text[0]
