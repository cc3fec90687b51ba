"""Amounts as text."""

import argparse

import pytest

from llama_jax.terminal.arguments import duration, size
from llama_jax.terminal.units import bytes_text, count_text, duration_text, layers_text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1.00 kB"),  # as of a rate
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960_000, "100 MB"),
        (999_600_000, "1.00 GB"),
        (17_639_000_000, "17.6 GB"),
        (141_107_412_992, "141 GB"),
        (2.5e12, "2.50 TB"),
        (5e15, "5000 TB"),
    ],
)
def test_bytes_have_three_digits_and_decimal_units(number: float, text: str) -> None:
    assert bytes_text(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (4.24, "4.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (725, "12:05 min"),
        (3600, "1:00:00 h"),
        (11240, "3:07:20 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_counts_and_layers() -> None:
    assert [count_text(n, "file") for n in (0, 1, 1024)] == ["0 files", "1 file", "1,024 files"]
    ranges = ([], [4], [0, 1, 2, 3], range(20, 40))
    assert list(map(layers_text, ranges)) == [
        "no layers",
        "layer 4",
        "layers 0-3",
        "layers 20-39",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000", 1000),
        ("10B", 10),
        ("2GiB", 2 * 1024**3),
        ("2 gib", 2 * 1024**3),
        ("20GB", 20 * 10**9),
        ("1.5KiB", 1536),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_parsed(text: str, expected: int) -> None:
    assert size(text) == expected


@pytest.mark.parametrize(
    "text", ["", "0", "0.9", "0GB", "-1", "2GX", "1e3", "nan", "2 GB free", str(2**63), "9" * 400]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("50ms", 0.05),
        (".5 s", 0.5),
        ("1.5S", 1.5),
        ("49ms", 0.049),
        ("250us", 0.00025),
        ("250µs", 0.00025),
        ("2min", 120.0),
    ],
)
def test_durations_with_units(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", "0", "0.05", "0ms", "-1", "fast", "5 lightyears", "nan", "1e3", "ms", "9" * 400 + "s"],
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        duration(text)
