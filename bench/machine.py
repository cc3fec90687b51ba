"""The machine and the package versions of a measurement."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine() -> dict[str, str | int | float | bool | None]:
    """Describes the system, its CPUs, and the accelerators that this process uses through JAX."""
    found = {"system": platform.system(), "cpu": _cpu(), "cpus": len(os.sched_getaffinity(0))}
    if jax := sys.modules.get("jax"):  # a process that has not loaded JAX measured none
        devices = jax.local_devices()
        if devices[0].platform != "cpu":
            found |= {"accelerator": devices[0].device_kind, "accelerators": len(devices)}
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.split(":")[1].strip() for line in lines if "model name" in line)
    return next(names, platform.machine() or "unknown")


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of these packages; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def describe(*packages: str) -> dict[str, dict]:
    """The machine and the versions."""
    return {"machine": machine(), "versions": versions(*packages)}
