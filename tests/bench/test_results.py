"""Results: their files, tables, comparison, page and calibration."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.calibrate import calibration
from bench.compare import compare, differences
from bench.figures import fitting_unit, text
from bench.partial import keep, partial_path
from bench.plots import digest, draw, plot_paths, series, svg
from bench.report import PAGE, PLOTS, RESULTS, command, page, read_all
from bench.result import BadResult, Plot, Result, Target
from bench.table import Table, tables
from llama_jax.config import LlamaConfig, Quantization
from llama_jax.costs.calibration import Calibration, MeasuredTick
from llama_jax.costs.deployment import Deployment, Layout
from llama_jax.costs.gpus import find_gpu
from llama_jax.costs.tick_time import TickModel
from llama_jax.pictures.style import inches

RESULT = Result(
    name="step",
    what="a test",
    machine={"system": "Linux", "cpu": "a CPU", "cpus": 2},
    versions={"python": "3.11"},
    flags={"rounds": 3},
    units={"time": "ms", "rate": "bytes/s", "ratio": ""},
    rows=[
        {"batch": 1, "time": 20.0, "rate": 3.0e9, "ratio": 1.5},
        {"batch": 8, "time": 40.0, "rate": 1.5e9, "ratio": None},
        {"case": "a | b", "time": 5.0},
    ],
    targets=(Target("time", 40.0, 50.0, "max", "ms"), Target("ratio", 1.5, 2.0, "min")),
    plots=(Plot("Time", "batch", ("time",)), Plot("Rate", "batch", ("rate",), kind="bar")),
)


# --- files ---------------------------------------------------------------------------------------


def test_a_result_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "folder" / "a.json"
    RESULT.write(path)
    assert Result.read(path) == RESULT
    assert [target["met"] for target in json.loads(path.read_text())["targets"]] == [True, False]
    assert not RESULT.met and replace(RESULT, targets=RESULT.targets[:1]).met


def test_a_result_that_is_cut_off_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "a.partial.json"
    RESULT.write(path)

    def cut_off(self: Path, text: str) -> None:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        replace(RESULT, rows=[]).write(path)
    assert Result.read(path) == RESULT


CONTENT = json.loads(json.dumps(vars(RESULT), default=vars))


def test_a_target_is_met_up_to_its_limit():
    for bound, missed in (("max", 1.1), ("min", 0.9)):
        assert Target("a", 1.0, 1.0, bound).met and not Target("a", missed, 1.0, bound).met


@pytest.mark.parametrize(
    ("field", "key", "value"),
    [("targets", "bound", "about"), ("targets", "unit", 5), ("plots", "kind", "pie"),
     ("plots", "log", "z")],
)  # fmt: skip
def test_a_target_or_a_plot_of_no_known_kind_is_refused(field, key, value):
    entries = [entry | {key: value} for entry in CONTENT[field]]
    with pytest.raises(BadResult):
        Result.from_json(json.dumps(CONTENT | {field: entries}))


def test_a_target_that_is_not_a_number_is_missed():
    assert not Target("a", float("nan"), 1.0, "max").met
    assert not Target("a", float("nan"), 1.0, "min").met


VALUES = (None, True, 5, "x", [], [5], {}, {"a": 5}, {"a": []}, [{"a": []}], [{"a": "x"}], [{}])


@pytest.mark.parametrize("field", CONTENT)
def test_a_field_of_another_type_is_refused_or_can_be_shown(field):
    refused = 0
    for value in VALUES:
        try:
            found = Result.from_json(json.dumps(CONTENT | {field: value}))
        except BadResult:
            refused += 1
            continue
        assert page({Path("a.json"): found}) and differences(RESULT, found) is not None
    assert refused >= 5


@pytest.mark.parametrize("content", ["", "{}", "[]", "5", "[" * 100_000, '{"name": "step"}'])
def test_other_files_are_refused(content):
    with pytest.raises(BadResult):
        Result.from_json(content)


def test_flags_and_versions_name_no_path_and_no_missing_package(tmp_path):
    args = {"rounds": 3, "directory": tmp_path / "here", "output": tmp_path, "unset": None}
    found = Result.measured("a", "b", args=args, packages=("no-such",), units={}, rows=[])
    assert {k: v for k, v in found.flags.items() if k.islower()} == {
        "rounds": 3,
        "directory": "here",
    }
    assert list(found.versions) == ["python"] and found.machine["cpus"] >= 1


def test_where_xla_writes_its_dumps_is_no_condition(monkeypatch):
    """gpu.sh takes a new folder each time, and `compare` would warn of it."""
    args = {"args": {}, "packages": (), "units": {}, "rows": []}
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/here --xla_a=1  --xla_dump_hlo_as_text")
    assert Result.measured("a", "b", **args).flags["XLA_FLAGS"] == "--xla_a=1"
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/here ")
    assert "XLA_FLAGS" not in Result.measured("a", "b", **args).flags


def test_plots_that_have_no_rows_yet_are_left_out(tmp_path):
    later = replace(RESULT, plots=(*RESULT.plots, Plot("Later", "tokens", ("time",))))
    keep(later, tmp_path / "a.json")
    assert Result.read(partial_path(tmp_path / "a.json")) == RESULT


# --- tables --------------------------------------------------------------------------------------


def test_rows_with_other_columns_have_a_table_of_their_own():
    first, second = tables(RESULT)
    assert first.headings == ["batch", "time, ms", "rate, GB/s", "ratio"]
    assert first.rows == [["1", "20.0", "3.00", "1.50"], ["8", "40.0", "1.50", ""]]
    assert second.rows == [["a | b", "5.00"]] and second.numeric == [False, True]
    assert second.markdown().splitlines()[2] == "| a \\| b | 5.00 |"


def test_no_cell_is_cut():
    table = Table(["a long heading", "n"], [False, True], [["x" * 300, "1"], ["y", "10"]])
    *headings, rule, first, second = table.text().splitlines()
    assert [line.split() for line in headings] == [["a", "long", "heading", "n"]]
    assert first == f"{'x' * 300}   1" and second == f"y{' ' * 301}10" and set(rule) <= {"-", " "}


@given(st.floats(1e-9, 1e12))
def test_three_digits_are_shown(value):
    shown = float(text(value).replace(",", ""))
    assert shown == pytest.approx(value, rel=0.006, abs=1e-8)


def test_a_column_has_the_unit_that_fits_it():
    assert fitting_unit([0.02, 0.5, None, float("nan")], "s") == (1e-3, "ms")
    assert fitting_unit([0.0, 2.0], "s") == (1.0, "s")
    assert fitting_unit([3e9], "bytes") == (1e9, "GB")
    assert fitting_unit([3e13], "FLOP") == (1e12, "TFLOP")
    assert fitting_unit([0.02], "tokens/s") == (1.0, "tokens/s")
    assert fitting_unit([], "s") == (1.0, "s")


# --- compare -------------------------------------------------------------------------------------


def test_figures_stand_side_by_side_with_their_ratio():
    other = replace(
        RESULT,
        rows=[
            {"batch": 8, "time": 20.0, "rate": 1.5e9, "ratio": None},
            {"batch": 32, "time": 80.0},
        ],
    )
    lines = {(row, figure): values for row, figure, *values in compare(RESULT, other).rows}
    assert lines["batch 8", "time, ms"] == ["40.0", "20.0", "0.500"]
    assert lines["batch 8", "rate, GB/s"] == ["1.50", "1.50", "1.00"]
    assert lines["batch 8", "ratio"] == ["", "", ""]
    assert lines["batch 1", "time, ms"] == ["20.0", "", ""]
    assert lines["batch 32", "time, ms"] == ["", "80.0", ""]


@pytest.mark.parametrize(
    "change",
    [
        {"name": "decode"},
        {"units": {**RESULT.units, "time": "s"}},
        {"rows": [{"batch": 99, "time": 1.0}]},
    ],
    ids=["measurement", "unit", "rows"],
)
def test_what_cannot_be_compared_is_refused(change):
    with pytest.raises(BadResult):
        compare(RESULT, replace(RESULT, **change))


def test_rows_that_are_alike_are_matched_in_order():
    twice = replace(RESULT, rows=[{"time": 1.0}, {"time": 2.0}])
    assert [line[-1] for line in compare(twice, twice).rows] == ["1.00", "1.00"]


def test_other_conditions_are_warned_of():
    assert differences(RESULT, RESULT) == []
    other = replace(RESULT, machine={**RESULT.machine, "accelerator": "a GPU"}, flags={})
    assert len(differences(RESULT, other)) == 2


# --- plots and page ------------------------------------------------------------------------------


def test_the_same_rows_give_the_same_plot():
    for plot in RESULT.plots:
        assert svg(RESULT, plot) == svg(RESULT, plot) and digest(RESULT, plot) in svg(RESULT, plot)
    changed = replace(RESULT, rows=RESULT.rows[:2])
    assert digest(changed, RESULT.plots[0]) != digest(RESULT, RESULT.plots[0])


def test_a_plot_shows_the_figures():
    line = draw(RESULT, RESULT.plots[0]).axes[0].lines[0]
    assert line.get_xdata().tolist() == [1, 8] and line.get_ydata().tolist() == [20.0, 40.0]
    bars = draw(RESULT, RESULT.plots[1]).axes[0].patches
    assert [bar.get_width() for bar in bars] == [3.0, 1.5]  # GB/s


def test_a_plot_that_cannot_show_its_rows_is_refused():
    many = replace(RESULT, rows=[{"batch": 1, "kind": i, "time": 1.0} for i in range(9)])
    for result, plot in (
        (RESULT, Plot("Nothing", "batch", ("nothing",))),
        (many, Plot("Many", "batch", ("time",), by=("kind",))),
        (many, Plot("One over the other", "batch", ("time",))),
    ):
        with pytest.raises(BadResult):
            draw(result, plot)


def test_several_columns_may_distinguish_lines():
    rows = [{"batch": 1, "a": a, "b": b, "time": 1.0} for a in "xy" for b in (1, 2)]
    result = replace(RESULT, rows=rows)
    lines = series(result, Plot("Four", "batch", ("time",), by=("a", "b")), 1)
    assert list(lines) == ["x, 1", "x, 2", "y, 1", "y, 2"]


def test_several_columns_may_name_a_bar():
    rows = [{"kind": kind, "rows": n, "time": n + 0.5} for kind in "xy" for n in (1, 8)]
    plot = Plot("Four", ("kind", "rows"), ("time",), kind="bar")
    result = replace(RESULT, rows=[*rows, {"kind": "x", "time": 9.0}], plots=(plot,))
    axes = draw(result, plot).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "x, rows 1", "x, rows 8", "y, rows 1", "y, rows 8"
    ]  # fmt: skip
    assert [bar.get_width() for bar in axes.patches] == [1.5, 8.5, 1.5, 8.5]
    assert Result.from_json(json.dumps(vars(result), default=vars)).plots == (plot,)


def test_long_names_leave_room_for_their_bars():
    rows = [{"setting": "a long name " * 6, "time": 1.0}, {"setting": "a short one", "time": 2.0}]
    result = replace(RESULT, rows=rows)
    axes = draw(result, Plot("Two", "setting", ("time",), kind="bar")).axes[0]
    assert inches(axes)[0] > 3


def test_the_command_of_a_result_can_be_pasted():
    flags = {"extra_body": '{"temperature": 0}', "cases": ["a b", "c"], "toy": True, "fast": False}
    words = shlex.split(command(replace(RESULT, flags=flags)))
    assert words[3:] == [
        "step", "--extra-body", '{"temperature": 0}', "--cases", "a b", "c", "--toy"
    ]  # fmt: skip


def test_the_committed_page_shows_the_committed_results():
    results = read_all(RESULTS)
    assert (RESULTS / PAGE).read_text() == page(results), "run `python -m bench report`"
    shown = set()
    for path, result in results.items():
        for plot, file in zip(result.plots, plot_paths(result, path), strict=True):
            shown.add(RESULTS / PLOTS / file.name)
            drawn = (RESULTS / PLOTS / file.name).read_text()
            assert digest(result, plot) in drawn, f"run `python -m bench report`: {file.name}"
    assert set((RESULTS / PLOTS).iterdir()) == shown


# --- calibration ---------------------------------------------------------------------------------


STEP = replace(
    RESULT,
    machine={**RESULT.machine, "accelerator": "NVIDIA H200", "accelerators": 1},
    flags={"quantize": "fp8"},
    units={"time": "s"},
    rows=[
        {"batch": 8, "context": 2048, "time": 0.005},
        {"chunk": 512, "prefix": 1536, "time": 0.016},
    ],
)
ROOFLINE = replace(
    STEP,
    name="roofline",
    flags={},
    units={"copy_rate": "bytes/s", "matrix_rate": "FLOP/s"},
    rows=[
        {"operation": "copy", "copy_rate": 4.0e12},
        {"operation": "bfloat16 product", "matrix_rate": 7.0e14},
    ],
)


ENGINE = replace(
    RESULT,
    name="engine",
    machine={name: value for name, value in STEP.machine.items() if "accelerator" not in name},
    units={"host time": "s"},
    rows=[{"requests": "greedy", "host time": 5e-4}, {"requests": "sampled", "host time": 8e-4}],
)


def test_the_host_of_a_gpu_is_measured_without_it():
    for others, device in (([STEP, ROOFLINE], "NVIDIA H200"), ([], "cpu")):
        found = calibration([(Path("a.json"), result) for result in [ENGINE, *others]])
        assert found.host_seconds_per_tick == 0.0005 and found.device == device


def test_a_calibration_holds_what_was_measured(tmp_path):
    found = calibration([(Path("s.json"), STEP), (Path("r.json"), ROOFLINE)])
    assert found.ticks == (
        MeasuredTick(8, 2048, 0, 0, 0.005),
        MeasuredTick(0, 0, 512, 1536, 0.016),
    )
    assert found.copy_bytes_per_second == 4.0e12
    assert found.matrix_flops_per_second == {"bfloat16": 7.0e14}
    assert found.host_seconds_per_tick is None and not found.with_collectives
    assert (found.device, found.weights, found.source) == ("NVIDIA H200", "fp8", "s.json, r.json")
    path = tmp_path / "calibration.json"
    found.write(path)
    assert Calibration.read(path) == found
    config = replace(LlamaConfig.llama3_70b(), quantization=Quantization(format="fp8"))
    planned = Deployment(config, find_gpu("h200"), Layout(4, 2))
    model = TickModel(planned, found)
    tick = found.ticks[0]
    communication = model.parts(tick.work)["communication"].expected
    assert model.expected(tick.work) == pytest.approx(tick.seconds + communication)


def test_a_calibration_needs_one_result_of_each_kind():
    elsewhere = replace(ROOFLINE, machine=RESULT.machine)
    for results in ([], [STEP, STEP], [STEP, elsewhere]):
        with pytest.raises(BadResult):
            calibration([(Path(f"{n}.json"), result) for n, result in enumerate(results)])
    foreign = replace(ENGINE, machine={**ENGINE.machine, "cpu": "another CPU"})
    with pytest.raises(BadResult, match="hosts"):
        calibration([(Path("s.json"), STEP), (Path("e.json"), foreign)])
    strange = replace(STEP, units={**STEP.units, "time": "fortnights"})
    with pytest.raises(BadResult):
        calibration([(Path("a"), strange)])
