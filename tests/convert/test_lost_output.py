"""Reports and progress that cannot be written: what exit code tells of them."""

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "code"), [("> /dev/full", 1), ("2> /dev/full >&-", 0), ("| true", 0)]
)
def test_a_report_that_is_lost(redirection: str, code: int) -> None:
    command = f'"$0" -m convert inspect demo/checkpoint {redirection}; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code
    assert "Traceback" not in done.stderr
