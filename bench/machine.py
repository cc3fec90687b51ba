"""The machine and the package versions of a measurement."""

import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe(*packages: str) -> dict[str, dict[str, str | int]]:
    """Describes the machine and the versions of Python and of these packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    return {
        "machine": {"system": platform.system(), "cpu": cpu, "cpus": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
