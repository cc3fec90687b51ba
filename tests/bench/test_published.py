"""The planner against published measurements: the errors that are promised, and the limits."""

import pytest

from bench.__main__ import main
from bench.published import UNITS, compare, measurements
from bench.report import RESULTS
from bench.result import Result


@pytest.fixture(scope="module")
def rows():
    return [(case, compare(case)) for case in measurements()]


def test_the_promised_errors_hold(rows):
    errors = {(case.what, case.figure): row["error"] for case, row in rows if case.limit}
    nim = [error for (what, _), error in errors.items() if what.startswith("NIM")]
    assert len(nim) == 4 and all(abs(error) <= 0.15 for error in nim)
    (h200,) = (error for (what, _), error in errors.items() if "H200" in what)
    assert abs(h200) <= 0.20


def test_no_roofline_and_no_measurement_beats_the_device(rows):
    for case, row in rows:
        suffix = UNITS[case.unit]
        sign = 1 if case.unit == "s" else -1  # rates are at most the limit
        limit = sign * row[f"limit{suffix}"]
        for name in ("published", "low", "expected", "high", "roofline"):
            assert sign * row[f"{name}{suffix}"] >= limit, (case.what, name)
        low, expected, high = (row[f"{name}{suffix}"] for name in ("low", "expected", "high"))
        assert low <= expected <= high


def test_the_committed_result_is_what_the_command_prints(tmp_path):
    path = tmp_path / "published.json"
    assert main(["published", "--output", str(path)]) == 0
    found, committed = Result.read(path), Result.read(RESULTS / "published.json")
    assert len(found.rows) == len(committed.rows)
    for new, old in zip(found.rows, committed.rows, strict=True):
        assert new == {
            name: pytest.approx(value) if isinstance(value, float) else value
            for name, value in old.items()
        }
