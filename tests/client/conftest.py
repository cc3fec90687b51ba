"""A temporary directory in which no engine may leave its own directory behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import private_temporary_directory


@pytest.fixture
def temporary_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    tmp_path_factory.getbasetemp()  # pytest's own directory must not be created inside this one
    with private_temporary_directory(monkeypatch) as directory:
        yield directory
