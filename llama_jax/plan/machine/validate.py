"""Looks at this machine and says whether it is what a plan assumed: `--validate`.

The driver is asked first; then a process of its own measures with JAX, while the clocks of the GPUs
are watched: only under load does a GPU show that it is hot or short of power.
"""

import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_jax.plan.machine import measurement
from llama_jax.plan.machine.device_checks import host_checks, jax_checks, rate_checks
from llama_jax.plan.machine.exit_codes import Exit
from llama_jax.plan.machine.expectation import Check, Expectation, Verdict, exit_code
from llama_jax.plan.machine.gpu_checks import clock_checks, driver_check, gpu_checks
from llama_jax.plan.machine.host import available_memory, read_rate
from llama_jax.plan.machine.measurement import Measurement, MeasurementFailed
from llama_jax.plan.machine.nvml import GpuReading, Nvml, NvmlMissing, visible

WATCH_SECONDS = 0.1


@dataclass(frozen=True)
class Validation:
    """What was looked at.

    Attributes:
      checks: in the order in which they are shown.
      measurement: of JAX; None if it failed.
    """

    checks: list[Check]
    measurement: Measurement | None

    @property
    def code(self) -> Exit:
        """The exit code."""
        return exit_code(self.checks)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON."""
        return {
            "exit_code": int(self.code),
            "checks": [
                asdict(check) | {"code": int(check.code), "verdict": str(check.verdict)}
                for check in self.checks
            ],
            "measurement": None if self.measurement is None else asdict(self.measurement),
        }


def validate(expected: Expectation, checkpoint: Path | None = None) -> Validation:
    """Looks at this machine.

    Args:
      expected: what was planned.
      checkpoint: whose directory is read; None to leave the disk out.
    """
    disk = None if checkpoint is None else read_rate(checkpoint)
    memory = available_memory()
    with ExitStack() as stack:
        try:
            nvml = stack.enter_context(Nvml())
            reading = nvml.read()
        except NvmlMissing as error:
            checks, seen = _measured(expected, None, ())
            if seen is not None and seen.platform == "gpu":
                expected = expected.on(seen.devices)
            verdict = Verdict.FAILS if expected.gpus else Verdict.SEEN
            advice = str(error) if expected.gpus else ""
            driver = Check("driver", "none", "", verdict, Exit.DRIVER, advice)
            return Validation([driver, *checks, *host_checks(memory, disk, expected)], seen)
        gpus = visible(reading)
        expected = expected.on([gpu.name or "" for gpu in gpus])
        checks, seen = _measured(expected, nvml, gpus[: expected.gpus])
        versions = seen.versions if seen is not None else measurement.versions()
        before = [driver_check(reading, versions), *gpu_checks(reading, gpus, expected)]
        return Validation([*before, *checks, *host_checks(memory, disk, expected)], seen)


def _measured(
    expected: Expectation, nvml: Nvml | None, gpus: tuple[GpuReading, ...]
) -> tuple[list[Check], Measurement | None]:
    """Measures with JAX, and watches the clocks meanwhile."""
    process = measurement.start(expected.mesh_text)
    slowed: dict[int, frozenset[str]] = {}
    clocks: dict[int, int] = {}
    indices = tuple(gpu.index for gpu in gpus)
    end = time.monotonic() + measurement.SECONDS
    while nvml is not None and process.poll() is None and time.monotonic() < end:
        for index, now in nvml.clocks(indices).items():
            slowed[index] = slowed.get(index, frozenset()) | now.slowed_by
            clocks[index] = max(clocks.get(index, 0), now.sm or 0)
        time.sleep(WATCH_SECONDS)
    watched = clock_checks(gpus, slowed, {i: clock for i, clock in clocks.items() if clock})
    try:
        seen = measurement.finish(process, max(0.0, end - time.monotonic()))
    except MeasurementFailed as error:
        code = Exit.COLLECTIVES if error.stuck else Exit.JAX
        failed = Check("JAX", "does not run", "runs", Verdict.FAILS, code, str(error))
        return [failed, *watched], None
    return [*jax_checks(seen, expected), *watched, *rate_checks(seen, expected)], seen


def show(validation: Validation) -> None:
    """Prints a table of what was found, and every failure with what to do."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    styles = {Verdict.FAILS: "bold red", Verdict.NOTE: "yellow", Verdict.HOLDS: "green"}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("", "found", "planned", "verdict"):
        table.add_column(column, overflow="fold")
    for check in validation.checks:
        style = styles.get(check.verdict, "")
        verdict = f"[{style}]{check.verdict}[/]" if style else str(check.verdict)
        table.add_row(check.what, check.found, check.planned, verdict)
    Console().print(table)
    for check in validation.checks:
        if check.verdict is Verdict.NOTE:
            print(f"note: {check.advice}")
    for check in validation.checks:
        if check.verdict is Verdict.FAILS:
            print(f"error {int(check.code)}: {check.advice}", file=sys.stderr)
    if validation.code is Exit.HOLDS:
        print("This machine is what was planned.")
