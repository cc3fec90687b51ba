"""Reads XLA's assignment of buffers: what the memory of temporaries holds."""

import re
from pathlib import Path
from typing import NamedTuple

_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (.*)")
_VALUE = re.compile(r" value: <\d+ ([\w.-]+)(?:\{[\d,]*\})? @\d+> \(size=(\d+),offset=\d+\): (.*)")


class Buffer(NamedTuple):
    """A temporary array.

    Attributes:
      name: the instruction that writes it.
      shape: as HLO writes it.
      size: bytes.
    """

    name: str
    shape: str
    size: int


def find_assignment(directory: Path) -> str:
    """The text of the buffer assignment in a directory of `xla_dump_to` for one program."""
    for file in directory.glob("*buffer-assignment.txt"):
        return file.read_text()
    raise FileNotFoundError(f"XLA has written no buffer assignment to {directory}.")


def temporaries(text: str) -> list[Buffer]:
    """The arrays in the memory that XLA reserves for temporaries, the largest first.

    They share this memory: those that are not needed at the same time overlap.
    """
    found: list[Buffer] = []
    temporary = False
    for line in text.splitlines():
        if allocation := _ALLOCATION.match(line):
            temporary = "preallocated-temp" in allocation[2]
        elif temporary and (value := _VALUE.match(line)):
            found.append(Buffer(value[1], value[3], int(value[2])))
    return sorted(found, key=lambda buffer: (-buffer.size, buffer.name))
