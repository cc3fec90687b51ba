"""What every measurement returns, and the one format of the files in `bench/results`.

A subcommand of `python -m bench` is a module with two functions:

- `add_arguments(parser)` adds its options, and
- `run(args)` measures and returns a `Result`, which `Result.measured` makes.

The rest (table, JSON file, plot, exit status) is the same for all. Imports nothing heavy.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.machine import machine, versions
from sharding.errors import UserError

Scalar = str | int | float | bool | None
Row = dict[str, Scalar]

# Options of the frame: they say nothing about a measurement.
_NOT_FLAGS = {"command", "output"}
# Variables of the environment that change what is measured.
_ENVIRONMENT = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "OMP_NUM_THREADS")


class BadResult(UserError):
    """A file that is not a result, or results that cannot be compared."""


@dataclass(frozen=True)
class Target:
    """A limit that a figure is held against.

    Attributes:
      what: the figure, in words.
      value: what was measured, in `unit`.
      limit: the limit, in `unit`.
      bound: whether `limit` is the least ("min") or the greatest ("max") value that meets it.
      unit: "" for a ratio.
    """

    what: str
    value: float
    limit: float
    bound: Literal["min", "max"]
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the value is within the limit; NaN is not."""
        return self.value >= self.limit if self.bound == "min" else self.value <= self.limit


@dataclass(frozen=True)
class Plot:
    """A picture of a result's rows. Rows that lack `x` or all of `y` are left out.

    Attributes:
      title: one line.
      x: the column of the horizontal axis: numbers for lines, names for bars. Several columns name
        a bar together.
      y: the columns of figures to draw, all of one unit.
      by: columns whose values get a line, or a color, each.
      kind: "line" or "bar".
      log: the logarithmic axes of lines: "", "x", "y" or "xy".
    """

    title: str
    x: str | tuple[str, ...]
    y: tuple[str, ...]
    by: tuple[str, ...] = ()
    kind: Literal["line", "bar"] = "line"
    log: Literal["", "x", "y", "xy"] = ""

    @property
    def places(self) -> tuple[str, ...]:
        """The columns of `x`."""
        return (self.x,) if isinstance(self.x, str) else self.x


@dataclass(frozen=True)
class Result:
    """The outcome of one measurement.

    Attributes:
      name: the subcommand.
      what: what was measured, in a sentence.
      machine: system, CPU and number of CPUs, and accelerators if there are any.
      versions: of Python and of the packages that matter.
      flags: the options, and the variables of the environment that change what is measured.
      units: the unit of each column that holds a figure; "" for a ratio or a count. The other
        columns identify a row.
      rows: each maps columns to scalars. Rows may differ in their columns: each set of columns is a
        table of its own.
      targets: the limits, met or not.
      plots: the pictures to draw.
    """

    name: str
    what: str
    machine: dict[str, Scalar]
    versions: dict[str, str]
    flags: dict[str, Any]
    units: dict[str, str]
    rows: list[Row]
    targets: tuple[Target, ...] = ()
    plots: tuple[Plot, ...] = field(default=())

    @classmethod
    def measured(
        cls,
        name: str,
        what: str,
        *,
        args: Mapping[str, Any],
        packages: Sequence[str],
        units: Mapping[str, str],
        rows: Sequence[Mapping[str, Scalar]],
        targets: Sequence[Target] = (),
        plots: Sequence[Plot] = (),
    ) -> "Result":
        """Makes the result of a measurement on this machine.

        Args:
          name: the subcommand.
          what: what was measured, in a sentence.
          args: the options, `vars(args)`.
          packages: the packages that matter; those that are not installed are left out.
          units: see the class.
          rows: see the class.
          targets: see the class.
          plots: see the class.
        """
        flags = {
            option: value.name if isinstance(value, Path) else value
            for option, value in args.items()
            if option not in _NOT_FLAGS and value is not None
        }
        environment = {name: _without_dumps(os.environ.get(name, "")) for name in _ENVIRONMENT}
        flags |= {name: value for name, value in environment.items() if value}
        return cls(
            name,
            what,
            machine(),
            versions(*packages),
            flags,
            dict(units),
            [dict(row) for row in rows],
            tuple(targets),
            tuple(plots),
        )

    @property
    def met(self) -> bool:
        """Whether every target is met."""
        return all(target.met for target in self.targets)

    def write(self, path: Path) -> None:
        """Writes the JSON file, and the folder it lies in if that is missing.

        A process that is stopped meanwhile leaves the file that was there before.
        """
        content = asdict(self)
        for target, entry in zip(self.targets, content["targets"], strict=True):
            entry["met"] = target.met
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.new")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(path)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Reads what `write` wrote.

        Raises:
          BadResult: the text is something else.
        """
        try:
            content = json.loads(text)
            targets = [
                Target(**{key: value for key, value in target.items() if key != "met"})
                for target in content.pop("targets")
            ]
            plots = [
                Plot(**{k: tuple(v) if isinstance(v, list) else v for k, v in plot.items()})
                for plot in content.pop("plots")
            ]
            result = cls(**content, targets=tuple(targets), plots=tuple(plots))
            _check(result)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadResult("is not a result of python -m bench") from error
        return result

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Reads a file that `write` wrote.

        Raises:
          BadResult: the file cannot be read, or is something else.
        """
        try:
            return cls.from_json(path.read_text())
        except BadResult as error:
            raise BadResult(f"{path} {error}; name a JSON file that it wrote") from error
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise BadResult(f"{path} cannot be read: {reason}") from error


def _without_dumps(flags: str) -> str:
    """Flags of XLA without those that say where its files go: they change nothing measured."""
    return " ".join(flag for flag in flags.split() if not flag.startswith("--xla_dump_"))


def _check(result: Result) -> None:
    """Raises ValueError or TypeError unless every field has its type."""
    if not all(isinstance(text, str) for text in (result.name, result.what)):
        raise TypeError("name or what")
    for table in (result.machine, result.versions, result.flags, result.units, *result.rows):
        if not isinstance(table, dict):
            raise TypeError("a table")
    scalars = [value for row in (result.machine, *result.rows) for value in row.values()]
    if not all(isinstance(value, Scalar) for value in scalars):
        raise TypeError("a row")
    if not all(
        isinstance(unit, str) for unit in (*result.units.values(), *result.versions.values())
    ):
        raise TypeError("a unit")
    for target in result.targets:
        if not all(isinstance(number, int | float) for number in (target.value, target.limit)):
            raise TypeError("a target")
        if target.bound not in ("min", "max") or not isinstance(target.unit, str):
            raise ValueError("a target")
    for plot in result.plots:
        columns = (*plot.places, *plot.y, *plot.by)
        if not all(isinstance(column, str) for column in columns):
            raise TypeError("a plot")
        if plot.kind not in ("line", "bar") or plot.log not in ("", "x", "y", "xy"):
            raise ValueError("a plot")
