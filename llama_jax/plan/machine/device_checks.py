"""Checks what JAX sees and measures, and the host, against a plan. Imports no JAX."""

import os
import re
from collections.abc import Mapping, Sequence

from llama_jax.costs.gpus import Gpu
from llama_jax.plan.machine.exit_codes import Exit
from llama_jax.plan.machine.expectation import (
    JAX_VERSIONS,
    LEAST_COPY,
    LEAST_LINK,
    LEAST_MATRIX,
    MOST_ALL_REDUCE,
    MOST_SPREAD,
    Check,
    Expectation,
    Verdict,
)
from llama_jax.plan.machine.host import DiskRate
from llama_jax.plan.machine.measurement import Measurement
from llama_jax.terminal.units import bytes_text, duration_text

# Variables that change what JAX does, and how they spoil a server: values that do no harm are "".
SPOILING = {
    "JAX_DISABLE_JIT": "nothing is compiled",
    "JAX_DEBUG_NANS": "every result is checked on the host",
    "JAX_ENABLE_X64": "numbers take 64 bits",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "memory comes from the driver in every call",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "NCCL_P2P_DISABLE": "GPUs exchange data through the host",
}
HARMLESS = ("", "0", "false", "default", "bfc")


def jax_checks(
    seen: Measurement, expected: Expectation, environment: Mapping[str, str] = os.environ
) -> list[Check]:
    """The version of JAX, its devices and its flags."""
    text = seen.versions.get("jax", "unknown")
    numbers = tuple(map(int, re.findall(r"\d+", text)[:2]))
    low, high = ("{}.{}".format(*numbers) for numbers in JAX_VERSIONS)
    fits = JAX_VERSIONS[0] <= numbers < JAX_VERSIONS[1]
    checks = [
        Check(
            "JAX", text, f"{low} or newer, before {high}",
            Verdict.HOLDS if fits else Verdict.FAILS, Exit.JAX,
            "" if fits else f"JAX {text} was never tried: install a version from {low} on, before "
            f"{high}.",
        )
    ]  # fmt: skip
    kinds = dict.fromkeys(seen.devices)
    found = f"{len(seen.devices)} x {', '.join(kinds)}"
    planned, enough = "", True
    if expected.gpus:
        planned = f"{expected.gpus} GPUs"
        enough = seen.platform == "gpu" and len(seen.devices) >= expected.gpus
    advice = "JAX sees fewer GPUs than planned: see the driver and CUDA_VISIBLE_DEVICES."
    if seen.platform == "cpu":
        advice = (
            "JAX sees no GPU: install llama-jax[cuda12] and see that JAX_PLATFORMS does not name "
            "the CPU."
        )
    checks.append(Check.of("devices in JAX", found, planned, enough, Exit.JAX, advice))
    flags = environment.get("XLA_FLAGS", "")
    checks.append(Check("XLA_FLAGS", flags or "none", "", Verdict.SEEN, Exit.JAX))
    for name, harm in SPOILING.items():
        if (value := environment.get(name, "")).lower() not in HARMLESS:
            text = f"With {name}={value}, {harm}: unset it."
            checks.append(Check(name, value, "not set", Verdict.NOTE, Exit.JAX, text))
    return checks


def rate_checks(seen: Measurement, expected: Expectation) -> list[Check]:
    """Copy and matrix rates, and collectives, against the data sheet of the planned GPU."""
    gpu = expected.gpu if seen.platform == "gpu" else None  # of a CPU, nothing is known
    copy = None if gpu is None else LEAST_COPY * gpu.bandwidth
    matrix = None if gpu is None else LEAST_MATRIX * gpu.flops["bfloat16"]
    checks = [
        _rate("copy bandwidth", seen.copy_rates, copy, "B/s", Exit.COPY_RATE),
        _rate("matrix rate", seen.matrix_rates, matrix, "FLOP/s", Exit.MATRIX_RATE),
    ]
    for what, rates, code in (
        ("copy bandwidth", seen.copy_rates, Exit.COPY_RATE),
        ("matrix rate", seen.matrix_rates, Exit.MATRIX_RATE),
    ):
        if len(rates) > 1:
            checks.append(_spread(what, rates, code))
    return checks + _collectives(seen, expected.mesh, gpu)


def host_checks(memory: int | None, disk: DiskRate | None, expected: Expectation) -> list[Check]:
    """The memory of the host, and how fast it reads the checkpoint."""
    planned = f"{bytes_text(expected.host_bytes)} free"
    if memory is None:
        checks = [Check("host memory", "not reported", planned, Verdict.UNKNOWN, Exit.HOST_MEMORY)]
    else:
        advice = (
            f"The host has {bytes_text(memory)} free, and the server needs about "
            f"{bytes_text(expected.host_bytes)}: end other programs, or add memory."
        )
        fits = memory >= expected.host_bytes
        found = f"{bytes_text(memory)} free"
        checks = [Check.of("host memory", found, planned, fits, Exit.HOST_MEMORY, advice)]
    if disk is None:
        return checks
    seconds = disk.bytes_all / disk.rate
    found = f"{bytes_text(disk.rate)}/s: {bytes_text(disk.bytes_all)} in {duration_text(seconds)}"
    limit = expected.load_seconds
    planned = "" if limit is None else f"in {duration_text(limit)}"
    advice = (
        f"Reading the checkpoint takes {duration_text(seconds)}: put it on a faster disk, or plan "
        "a longer restart."
    )
    fits = limit is None or seconds <= limit
    return [*checks, Check.of("disk", found, planned, fits, Exit.DISK, advice)]


def _rate(what: str, rates: Sequence[float], least: float | None, unit: str, code: Exit) -> Check:
    if not rates:
        return Check(what, "not measured", "", Verdict.UNKNOWN, code)
    slowest = min(rates)
    found, planned = _rate_text(slowest, unit), "" if least is None else _rate_text(least, unit)
    advice = (
        f"The {what} of device {rates.index(slowest)} is {found}, below the {planned} that every "
        "plan for this GPU assumes: see the clocks, the power limit and ECC."
    )
    found += " at least" if len(rates) > 1 else ""
    fits = least is None or slowest >= least
    return Check.of(what, found, planned, fits, code, advice)


def _rate_text(rate: float, unit: str) -> str:
    prefix, factor = ("T", 1e12) if rate >= 1e12 else ("G", 1e9)
    return f"{rate / factor:.3g} {prefix}{unit}"


def _spread(what: str, rates: Sequence[float], code: Exit) -> Check:
    """Whether all devices are equally fast: the ring is as fast as its slowest."""
    spread = 1 - min(rates) / max(rates)
    slowest = rates.index(min(rates))
    advice = f"Device {slowest} is {spread:.1%} slower than the fastest, and slows the whole ring."
    found, planned = f"{spread:.1%}", f"{MOST_SPREAD:.0%}"
    return Check.of(f"{what}, spread", found, planned, spread <= MOST_SPREAD, code, advice)


def _collectives(seen: Measurement, mesh: tuple[int, int], gpu: Gpu | None) -> list[Check]:
    checks = []
    sizes = [entry["bytes"] for entry in seen.collectives]
    for entry in seen.collectives:
        ranks, size, seconds = entry["ranks"], entry["bytes"], entry["seconds"]
        share = 2 * (ranks - 1) / ranks if entry["kind"] == "all_reduce" else 1.0
        bandwidth = share * size / seconds
        what = f"{entry['kind']} over {ranks}, {bytes_text(size)}"
        small = size == min(sizes)
        found = f"{1e6 * seconds:.1f} µs" if small else f"{bandwidth / 1e9:.3g} GB/s"
        planned, fits = "", True
        if gpu is not None and small:
            planned, fits = f"{1e6 * MOST_ALL_REDUCE:.0f} µs", seconds <= MOST_ALL_REDUCE
        elif gpu is not None:
            least = LEAST_LINK * gpu.link_bandwidth
            planned, fits = f"{least / 1e9:.3g} GB/s", bandwidth >= least
        advice = (
            f"The {what} takes {found}, and the plan assumes {planned}: see the NVLinks and peer "
            "access above, and NCCL_DEBUG=INFO for the way that the data takes."
        )
        checks.append(Check.of(what, found, planned, fits, Exit.COLLECTIVES, advice))
    if mesh != (1, 1) and not checks:
        what = "collectives over {}x{}".format(*mesh)
        checks.append(Check(what, "too few devices", "", Verdict.UNKNOWN, Exit.COLLECTIVES))
    return checks
