"""What the command lines of the server and of `convert` share. Imports no JAX."""

import argparse
import re
from typing import NoReturn

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that ends with exit code 2 and one line where it is used wrongly."""

    def error(self, message: str) -> NoReturn:
        """One line, not the usage in front of it: --help says more."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def size(text: str) -> int:
    """Bytes, from a number with or without a unit: "2GiB", "500MB", "1.5 GiB", "1000000".

    Raises:
      ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not 1 <= float(match[1]) * unit < 2**63:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: write bytes, or a number with KB, MB, GB, KiB, MiB or GiB, "
            "such as 2GiB"
        )
    return int(float(match[1]) * unit)
