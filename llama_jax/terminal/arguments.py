"""What the command lines of the server, the converter and the planner share."""

import argparse
import math
import re
from typing import NoReturn

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports wrong usage in one line and exits with code 2.

    Attributes:
      source: where the arguments come from, if it is not the command line.
    """

    source = ""

    def error(self, message: str) -> NoReturn:
        """Prints one line instead of the whole usage, which --help shows."""
        source = f"{self.source}: " if self.source else ""
        self.exit(2, f"{self.prog}: {source}{message} (see --help)\n")


def size(text: str) -> int:
    """Parses a number of bytes, with or without a unit: "2GiB", "500MB", "1.5 GiB", "1000000".

    Raises:
      ArgumentTypeError: the text is not a size of at least one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not 1 <= float(match[1]) * unit < 2**63:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: give a number of bytes, or a number with a unit (KB, MB, GB, "
            "KiB, MiB, GiB), such as 2GB"
        )
    return int(float(match[1]) * unit)


def duration(text: str) -> float:
    """Parses a duration with its unit to seconds: "500ms", "0.5s", "250 us", "1 min".

    Raises:
      ArgumentTypeError: it has another form, or is zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zµ]+)", text.strip().lower())
    unit = _SECONDS.get(match[2]) if match else None
    if match is None or unit is None or not 0 < float(match[1]) < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a duration: give a number and a unit, such as 500ms or 0.5s"
        )
    return float(match[1]) * unit
