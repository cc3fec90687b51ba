"""Distributions of the lengths of prompts and answers. Imports no JAX."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sharding.errors import UserError

MAX_TOKENS = 1_000_000  # in a prompt or an answer


class LengthError(UserError):
    """A text describes no distribution of lengths."""


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, each at least 1.

    Attributes:
      kind: "constant", "uniform", "normal", "lognormal" or "empirical".
      numbers: the length; the least and the greatest; the mean and the standard deviation; the
        median and the standard deviation of the logarithm; all observed lengths.
    """

    kind: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Parses `256`, `64-512`, `normal:256,64`, `lognormal:256,0.6` or `empirical:FILE`.

        Raises:
          LengthError: the text has another form, a number is out of range, or the file is broken.
        """
        if text.startswith("empirical:"):
            return cls("empirical", _read(Path(text.removeprefix("empirical:"))))
        number = r"(\d+(?:\.\d+)?)"
        forms = {
            "constant": r"(\d+)",
            "uniform": r"(\d+)-(\d+)",
            "normal": f"normal:{number},{number}",
            "lognormal": f"lognormal:{number},{number}",
        }
        for kind, form in forms.items():
            if match := re.fullmatch(form, text.strip(), re.ASCII):
                numbers = tuple(map(float, match.groups()))
                lengths = numbers if kind == "uniform" else numbers[:1]
                if (
                    min(lengths) < 1
                    or max(lengths) > MAX_TOKENS
                    or list(lengths) != sorted(lengths)
                ):
                    raise LengthError(
                        f"{text!r} is no range of lengths: they are between 1 and {MAX_TOKENS} "
                        "tokens, the least before the greatest."
                    )
                return cls(kind, numbers)
        raise LengthError(
            f"{text!r} is no length: write 256, 64-512, normal:256,64 (mean, standard deviation), "
            "lognormal:256,0.6 (median, standard deviation of the logarithm) or empirical:FILE "
            "(one length a line)."
        )

    def __str__(self) -> str:
        if self.kind == "empirical":
            return f"{len(self.numbers)} observed lengths"
        numbers = ("-" if self.kind == "uniform" else ",").join(f"{n:g}" for n in self.numbers)
        return numbers if self.kind in ("constant", "uniform") else f"{self.kind}:{numbers}"

    @property
    def mean(self) -> float:
        """The mean of the distribution, in tokens."""
        if self.kind == "lognormal":
            median, deviation = self.numbers
            return min(float(MAX_TOKENS), median * math.exp(min(deviation**2 / 2, 100.0)))
        if self.kind == "normal":
            return self.numbers[0]
        return sum(self.numbers) / len(self.numbers)

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Draws lengths `[size]` int64."""
        a, b = (*self.numbers, 0.0)[:2]
        values: dict[str, Callable[[], np.ndarray]] = {
            "constant": lambda: np.full(size, a),
            "uniform": lambda: rng.integers(int(a), int(b) + 1, size),
            "normal": lambda: rng.normal(a, b, size),
            "lognormal": lambda: a * np.exp(np.minimum(rng.normal(0, b, size), 100)),
            "empirical": lambda: rng.choice(np.asarray(self.numbers), size),
        }
        rounded: np.ndarray = np.rint(values[self.kind]())
        return rounded.clip(1, MAX_TOKENS).astype(np.int64)


def reason(error: OSError | UnicodeDecodeError) -> str:
    """Why a text file cannot be read."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "it is not text in UTF-8 (a compressed file has to be unpacked first)"


def _read(path: Path) -> tuple[float, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LengthError(f"The lengths in {path} cannot be read: {reason(error)}.") from error
    numbers = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not re.fullmatch(r"\s*\d{1,7}\s*", line, re.ASCII) or not 1 <= int(line) <= MAX_TOKENS:
            raise LengthError(
                f"{path}, line {number}: {line.strip()!r} is no length from 1 to {MAX_TOKENS}."
            )
        numbers.append(float(line))
    if not numbers:
        raise LengthError(f"{path} holds no length: write one a line.")
    return tuple(numbers)
