"""`python -m llama_jax.plan`: what it answers, what it refuses, and its exit codes."""

import argparse
import json
import re
import subprocess
import sys
from importlib import import_module

import pytest

from llama_jax.costs.figure import Evidence
from llama_jax.costs.gpus import GPUS, find_gpu
from llama_jax.plan import modes
from llama_jax.plan.__main__ import DEFECT, MET, MISSED, WRONG, main
from llama_jax.plan.command_line import make_parser
from llama_jax.plan.modes import Mode
from llama_jax.terminal.arguments import duration
from sharding.errors import UserError
from tests.support.paths import ROOT

SMALL = ["--model", "8b", "--gpus", "2"]


def answer(capsys, *arguments: str) -> tuple[int, dict]:
    code = main([*SMALL, *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_plan_is_printed(capsys):
    assert main([*SMALL, "--cost-per-gpu-hour", "2.5"]) == MET
    printed = capsys.readouterr().out
    assert "2 * 1x1" in printed and "disaggregated" in printed
    assert "Its ticks" in printed and "Its collectives" not in printed  # the best is 1x1
    assert max(map(len, printed.splitlines())) <= 80


def test_the_json_has_a_figure_for_everything(capsys):
    code, content = answer(capsys, "--cost-per-gpu-hour", "2.5")
    assert code == MET and content["met"] is True
    layouts = {entry["layout"]: entry for entry in content["layouts"]}
    assert set(layouts) == {"2x1", "1x2", "2 replicas of 1x1"}
    known = {evidence.value for evidence in Evidence}
    for entry in layouts.values():
        assert {"weights", "decode tick", "TPOT", "TTFT"} <= entry["figures"].keys()
        assert "cost of a million output tokens" in entry["figures"]
        for figure in entry["figures"].values():
            assert figure["low"] <= figure["expected"] <= figure["high"]
            assert figure["evidence"] in known and figure["source"]
    sent = {entry["kind"] for entry in layouts["1x2"]["collectives"]["decode tick"]}
    assert sent == {"all-reduce", "all-gather"}
    assert content["frontier"] and content["breaks_first"] and content["out_of_scope"]


def test_the_same_question_has_the_same_answer_byte_for_byte(capsys):
    texts = []
    for _ in range(2):
        main([*SMALL, "--json"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_units_and_shares_are_understood(capsys):
    _, content = answer(capsys, "--ttft", "0.75s", "--tpot", "30 ms", "--memory", "90%")
    question = content["question"]
    assert question["ttft_seconds"] == 0.75
    assert question["tpot_seconds"] == pytest.approx(0.03)
    assert question["memory_share"] == 0.9


@pytest.mark.parametrize(
    ("text", "seconds"), [("500ms", 0.5), ("0.5s", 0.5), ("250 us", 250e-6), ("1min", 60.0)]
)
def test_durations(text, seconds):
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["500", "ms", "-1s", "0ms", "1h", "1e400s", ""])
def test_what_is_no_duration(text):
    with pytest.raises(argparse.ArgumentTypeError):
        duration(text)


def test_targets_that_no_layout_meets_say_what_is_missing(capsys):
    code, content = answer(capsys, "--tpot", "3ms", "--rate", "1")
    assert code == MISSED and content["met"] is False
    missed = content["layouts"][0]["missed"][0]
    assert missed["target"] == "TPOT" and missed["value"] > missed["bound"] == 0.003
    assert missed["excess"] == pytest.approx(missed["value"] / 0.003)
    nearest = [entry["missed"][0]["excess"] for entry in content["layouts"]]
    assert nearest == sorted(nearest)
    assert main([*SMALL, "--tpot", "3ms", "--rate", "1"]) == MISSED


def test_a_model_that_does_not_fit_misses_the_memory(capsys):
    code = main(["--model", "70b", "--gpus", "1", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert code == MISSED
    assert [missed["target"] for missed in content["layouts"][0]["missed"]] == ["memory"]


def test_a_share_of_no_bytes_misses_the_memory(capsys):
    code, content = answer(capsys, "--memory", "1e-12")
    assert code == MISSED
    (missed,) = content["layouts"][0]["missed"]
    assert (missed["bound"], missed["excess"]) == (0, None)


def test_answers_of_one_token_have_no_time_per_token(capsys):
    for ttft in ("500ms", "1ms"):
        _, content = answer(capsys, "--output-tokens", "1", "--ttft", ttft, "--tpot", "1us")
        assert "TPOT" not in content["verdict"] + " ".join(content["why"])
        assert content["question"]["tpot_seconds"] is None and content["frontier"] == []
        for layout in content["layouts"]:
            assert "TPOT" not in {missed["target"] for missed in layout["missed"]}
            empty = {name for name, figure in layout["figures"].items() if figure is None}
            assert empty == {
                *("TPOT", "mean TPOT", "TPOT while prompts never cease", "output rate of a user"),
            }
    main([*SMALL, "--output-tokens", "1"])
    [row] = re.findall(r"^2x1 .* kept", capsys.readouterr().out, re.MULTILINE)
    assert row.split()[2:4] == ["-", "-"] and float(row.split()[1]) > 0
    _, content = answer(capsys, "--output-tokens", "2")
    assert None not in content["layouts"][0]["figures"].values() and content["frontier"]


def test_the_json_has_the_server_of_a_plan_that_holds(capsys):
    _, content = answer(capsys)
    main([*SMALL, "--server-command"])
    assert capsys.readouterr().out.splitlines()[0] == content["server"]["command"]
    assert answer(capsys, "--tpot", "3ms")[1]["server"] is None


def test_a_frontier_without_layouts_is_drawn_without_a_warning(tmp_path, capsys, recwarn):
    save = tmp_path / "empty.svg"
    assert main(["--model", "70b", "--gpus", "1", "--frontier", str(save)]) == MISSED
    assert save.is_file() and not recwarn.list


def test_a_layout_alone_is_planned_with_its_replicas(capsys):
    _, content = answer(capsys, "--layout", "1x1")
    assert [entry["layout"] for entry in content["layouts"]] == ["2 replicas of 1x1"]


def test_the_fewest_gpus_are_found(capsys):
    code = main(["--model", "8b", "--rate", "60", "--recommend", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert code == MET
    assert content["recommendation"]["gpus"] == content["question"]["gpus"] > 1
    assert content["question"]["requests_per_second"] == 60
    assert main(["--model", "405b", "--recommend", "--json"]) == MISSED
    content = json.loads(capsys.readouterr().out)
    assert content["question"]["requests_per_second"] == 8  # the layouts are for one request alone
    assert content["recommendation"]["layouts_at_requests_per_second"] < 0.01


@pytest.mark.parametrize(
    "arguments",
    [
        ["--gpu", "h1000"],
        ["--model", "gpt-5"],
        ["--model", "8b", "--layout", "33x1"],
        ["--layout", "1x3"],
        ["--layout", "4x2", "--gpus", "12"],
        ["--layout", "4x2", "--gpus", "8", "--replicas", "2"],
        ["--layout", "4x4"],
        ["--replicas", "2"],
        ["--recommend", "--gpus", "8"],
        ["--recommend", "--rate", "1e6", "--layout", "1x8"],
        ["--recommend", "--validate"],
        ["--recommend", "--calibrate", "file.json"],
        ["--recommend", "--compare", "http://localhost:1"],
        ["--layout", "4x2", "--gpus", "8000"],
        ["--prompt-tokens", "9000"],
        ["--gpus", "7000"],
        ["--calibration", "missing.json"],
        ["--fp8-activations"],
        ["--fp8-activations", "--weights", "fp8", "--gpu", "a100-80"],
        ["--users", "5"],  # without --simulate
        ["--simulate", "--validate"],
        ["--simulate", "--frontier", "frontier.svg"],
        ["--frontier", "frontier"],  # matplotlib would write frontier.png
        ["--frontier", "frontier.pdf"],
        ["--frontier", "frontier.svg", "--output-tokens", "1"],
        ["--max-chunk", "2000000000"],  # which no GPU has the memory for
        ["--model", "~nobody-of-this-name/llama"],
    ],
)
def test_wrong_questions_are_refused_in_one_sentence(arguments, capsys):
    assert main(arguments) == WRONG
    captured = capsys.readouterr()
    assert not captured.out and captured.err.count("\n") == 1
    assert main([*arguments, "--json"]) == WRONG
    assert json.loads(capsys.readouterr().out).keys() == {"error"}


@pytest.mark.parametrize("mode", ["--simulate", "--server-command", "--report=never"])
def test_what_no_number_of_gpus_can_do_is_not_gone_into(mode, capsys):
    """It would be about the requests that are alone, of which the nearest layout is found."""
    assert main([*SMALL[:2], "--recommend", "--ttft", "1ms", mode]) == MISSED
    captured = capsys.readouterr()
    assert not captured.out and "No number of h100-sxm" in captured.err


@pytest.mark.parametrize(
    "arguments",
    [["--ttft", "500"], ["--memory", "85"], ["--rate", "0"], ["--gpus", "-1"], ["--layout", "4"],
     ["--rate", "nan"], ["--rate", "1e308"], ["--rate", "1e-320"],
     ["--kv-cache-dtype", "int3"], ["--gpu-s", "8"]],
)  # fmt: skip
def test_arguments_that_cannot_be_read_end_with_the_same_code(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == WRONG
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_gpus_get_the_nearest_names(capsys):
    for name, near in {
        "h100": {"h100-sxm", "h100-pcie"},
        "h200-nvl": {"h200"},
        "NVIDIA H100 80GB HBM3": {"h100-sxm"},
        "tpu": {"tpu-v5e", "tpu-v6e"},
    }.items():
        assert main(["--gpu", name]) == WRONG
        error = capsys.readouterr().err
        assert {gpu for gpu in GPUS if gpu in error} == near
    assert find_gpu("H100-SXM") is GPUS["h100-sxm"]


@pytest.mark.slow
def test_the_frontier_is_drawn_the_same_each_time(tmp_path, capsys):
    paths = [tmp_path / name for name in ("one.svg", "two.svg")]
    for path in paths:
        assert main([*SMALL, "--frontier", str(path)]) == MET
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"2x1" in paths[0].read_bytes()
    assert main([*SMALL, "--frontier", str(tmp_path / "picture.txt")]) == WRONG
    assert main([*SMALL, "--frontier", str(tmp_path / "gone" / "a.svg")]) == WRONG
    capsys.readouterr()


def test_a_defect_is_no_wrong_question(monkeypatch, capsys):
    monkeypatch.setattr("llama_jax.plan.__main__.make_plan", lambda question: 1 / 0)
    assert main(SMALL) == DEFECT
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_mode_is_one_row_of_the_table(monkeypatch):
    """The first that is asked for runs, with the plan; others only if it includes them."""
    seen = []

    class Module:
        @staticmethod
        def add_arguments(parser):
            pass

        @staticmethod
        def run(arguments, plan):
            seen.append((arguments.report, plan.best.layout))
            return 7

    rows = (Mode("report", "one", includes=("simulate",)), Mode("simulate", "two"))
    monkeypatch.setattr(modes, "MODES", rows)
    monkeypatch.setattr(modes, "import_module", lambda name: Module)
    both = argparse.Namespace(report="DIR", simulate=True)
    assert modes.chosen_mode(both) == rows[0]
    assert modes.chosen_mode(argparse.Namespace(report=None, simulate=False)) is None
    monkeypatch.setattr(modes, "MODES", rows[::-1])
    with pytest.raises(UserError):
        modes.chosen_mode(both)


def test_every_mode_adds_its_flag_and_can_be_run():
    known = vars(make_parser().parse_args([]))
    for mode in modes.MODES:
        assert mode.flag in known and not mode.is_asked_for(argparse.Namespace(**known))
        assert callable(import_module(mode.module).run)
        assert set(mode.includes) <= known.keys()


def test_a_mode_that_needs_no_plan_runs_without_one(monkeypatch):
    class Module:
        @staticmethod
        def add_arguments(parser):
            pass

        @staticmethod
        def run(arguments, plan):
            return 3 if plan is None else 4

    monkeypatch.setattr(modes, "MODES", (Mode("json", "any", needs_plan=False),))
    monkeypatch.setattr(modes, "import_module", lambda name: Module)
    monkeypatch.setattr(modes, "add_modes", lambda parser: None)
    monkeypatch.setattr("llama_jax.plan.command_line.add_modes", lambda parser: None)
    assert main(["--json", "--gpu", "auto"]) == 3


def test_without_arguments_the_reference_deployment_is_judged(capsys):
    assert main([]) in (MET, MISSED)
    printed = capsys.readouterr().out
    for lengths in ("128/128", "1024/256", "2048/128", "1000/1000"):
        assert lengths in printed


@pytest.mark.slow
def test_the_judgment_of_the_reference_deployment_as_json(capsys):
    assert main(["--json"]) in (MET, MISSED)
    assert json.loads(capsys.readouterr().out)


def test_planning_loads_no_jax():
    program = (
        "import sys\nfrom llama_jax.plan.__main__ import main\n"
        "assert main(['--model', '8b', '--gpus', '1', '--json']) == 0\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stderr.split())
    assert "llama_jax.plan.steady_state" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "torch", "transformers", "matplotlib"}
