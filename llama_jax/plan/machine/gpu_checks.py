"""Checks what NVIDIA's driver says against a plan. Imports no JAX."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from llama_jax.costs.gpus import gpu_of_device
from llama_jax.plan.machine.exit_codes import Exit
from llama_jax.plan.machine.expectation import (
    MOST_USED,
    SIZE_TOLERANCE,
    Check,
    Expectation,
    Verdict,
)
from llama_jax.plan.machine.nvml import GpuReading, Reading
from llama_jax.terminal.units import bytes_text

SLOWDOWNS = {
    "hardware slowdown", "temperature, by software", "temperature, by hardware", "power brake",
}  # fmt: skip
LEAST_CLOCK = 0.7  # of the greatest, while a GPU multiplies matrices


def driver_check(reading: Reading, versions: Mapping[str, str]) -> Check:
    """Whether the driver is new enough for the CUDA that JAX brings."""
    wheels = {"jax-cuda12-plugin": 12, "jax-cuda13-plugin": 13}
    needed = max((cuda for name, cuda in wheels.items() if name in versions), default=0)
    fits = reading.cuda[0] >= needed
    return Check(
        "driver",
        f"{reading.driver}, CUDA {reading.cuda[0]}.{reading.cuda[1]}",
        f"CUDA {needed} or newer" if needed else "",
        (Verdict.HOLDS if needed else Verdict.SEEN) if fits else Verdict.FAILS,
        Exit.DRIVER,
        "" if fits else f"The driver is too old for JAX with CUDA {needed}: update the driver, or "
        "install the JAX plugin of an older CUDA.",
    )  # fmt: skip


def gpu_checks(reading: Reading, gpus: Sequence[GpuReading], expected: Expectation) -> list[Check]:
    """Checks the GPUs that programs see.

    Args:
      reading: all GPUs of the host.
      gpus: the visible ones, in their order; the mesh takes the first of them, and the others do
        not count.
      expected: what was planned.
    """
    used = gpus[: expected.gpus]
    checks = [_count(reading, gpus, expected), *_each("GPU", used, _model, expected)]
    readable = [gpu for gpu in used if gpu.error is None]
    for what, check in (
        ("instances (MIG)", _mig), ("GPU memory", _memory), ("ECC", _ecc), ("power limit", _power),
    ):  # fmt: skip
        checks += _each(what, readable, check, expected)
    return checks + _links(reading, readable, expected)


def clock_checks(
    gpus: Sequence[GpuReading], slowed: Mapping[int, frozenset[str]], clocks: Mapping[int, int]
) -> list[Check]:
    """Checks how fast the GPUs ran while they were measured.

    Args:
      gpus: those of the mesh.
      slowed: all reasons that were seen, by index.
      clocks: the greatest MHz that was seen, by index.
    """
    rows = []
    for gpu in gpus:
        reasons, clock = slowed.get(gpu.index, frozenset()), clocks.get(gpu.index)
        planned = "" if gpu.max_sm is None else f"up to {gpu.max_sm} MHz"
        found = "" if clock is None else f"{clock} MHz"
        if reasons:
            found += f" ({', '.join(sorted(reasons))})"
        verdict, advice = Verdict.HOLDS, ""
        if clock is None:
            verdict, found = Verdict.UNKNOWN, "not reported"
        elif bad := sorted(reasons & SLOWDOWNS):
            verdict = Verdict.FAILS
            advice = (
                f"GPU {gpu.index} slowed down under load ({', '.join(bad)}): check its cooling and "
                "power supply."
            )
        elif gpu.max_sm is not None and clock < LEAST_CLOCK * gpu.max_sm:
            verdict = Verdict.FAILS
            advice = (
                f"GPU {gpu.index} ran at {clock} of {gpu.max_sm} MHz under load: look for locked "
                "clocks (nvidia-smi --reset-gpu-clocks) and for a low power limit."
            )
        rows.append((found, planned, verdict, advice))
    return _joined("clocks under load", [gpu.index for gpu in gpus], rows, Exit.GPU_CLOCKS)


def _count(reading: Reading, gpus: Sequence[GpuReading], expected: Expectation) -> Check:
    fits = len(gpus) >= expected.gpus
    hidden = len(reading.gpus) - len(gpus)
    found = f"{len(gpus)}" + (f" ({hidden} more are hidden by CUDA_VISIBLE_DEVICES)" * (hidden > 0))
    advice = f"The plan needs {expected.gpus} GPUs, and programs see {len(gpus)}: " + (
        "show them in CUDA_VISIBLE_DEVICES." if hidden else "plan a smaller mesh, or add GPUs."
    )
    planned = str(expected.gpus) if expected.gpus else ""
    return Check.of("GPUs", found, planned, fits, Exit.GPU_COUNT, advice)


_Row = tuple[str, str, Verdict, str]  # found, planned, verdict, advice


def _each(what: str, gpus: Sequence[GpuReading], check, expected: Expectation) -> list[Check]:  # type: ignore[no-untyped-def]
    code = {_model: Exit.GPU_MODEL, _mig: Exit.GPU_MIG, _memory: Exit.GPU_MEMORY,
            _ecc: Exit.GPU_ECC, _power: Exit.GPU_CLOCKS}[check]  # fmt: skip
    return _joined(what, [gpu.index for gpu in gpus], [check(gpu, expected) for gpu in gpus], code)


def _joined(what: str, indices: Sequence[int], rows: Sequence[_Row], code: Exit) -> list[Check]:
    """One check for all GPUs of which the same is true, so that 8 good GPUs are one line."""
    groups: dict[tuple[str, str, Verdict], list[int]] = {}
    advice: dict[tuple[str, str, Verdict], str] = {}
    for index, (found, planned, verdict, text) in zip(indices, rows, strict=True):
        groups.setdefault((found, planned, verdict), []).append(index)
        advice.setdefault((found, planned, verdict), text)
    return [
        Check(f"{what} of {_numbers(numbers)}", *key, code, advice[key])
        for key, numbers in groups.items()
    ]


def _numbers(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"GPU {numbers[0]}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"GPUs {numbers[0]}-{numbers[-1]}"
    return f"GPUs {', '.join(map(str, numbers))}"


def _model(gpu: GpuReading, expected: Expectation) -> _Row:
    planned = expected.gpu.name if expected.gpu else ""
    if gpu.error is not None:
        advice = f"GPU {gpu.index} cannot be used ({gpu.error}): reset it or restart the machine."
        return gpu.error, planned, Verdict.FAILS, advice
    if gpu.name is None:
        return "not reported", planned, Verdict.UNKNOWN, ""
    if expected.gpu is None:
        return gpu.name, "", Verdict.SEEN, ""
    if gpu_of_device(gpu.name) == expected.gpu:
        return gpu.name, planned, Verdict.HOLDS, ""
    advice = f"GPU {gpu.index} is another than planned: plan anew with --gpu for {gpu.name}."
    return gpu.name, planned, Verdict.FAILS, advice


def _mig(gpu: GpuReading, expected: Expectation) -> _Row:
    if gpu.mig is None:
        return "not supported", "off", Verdict.HOLDS, ""
    advice = f"GPU {gpu.index} is divided into instances: turn MIG off (nvidia-smi -mig 0)."
    return ("on", "off", Verdict.FAILS, advice) if gpu.mig else ("off", "off", Verdict.HOLDS, "")


def _memory(gpu: GpuReading, expected: Expectation) -> _Row:
    if gpu.memory_bytes is None or gpu.memory_used is None:
        return "not reported", "", Verdict.UNKNOWN, ""
    planned = bytes_text(expected.gpu.memory_bytes) if expected.gpu else ""
    size, used = bytes_text(gpu.memory_bytes), bytes_text(gpu.memory_used)
    if expected.gpu and gpu.memory_bytes < (1 - SIZE_TOLERANCE) * expected.gpu.memory_bytes:
        advice = f"GPU {gpu.index} has less memory than planned: plan anew for this GPU."
        return size, planned, Verdict.FAILS, advice
    if gpu.memory_used > MOST_USED * gpu.memory_bytes:
        advice = (
            f"Other programs have taken {used} of GPU {gpu.index}: end them (nvidia-smi lists "
            "them), or show only free GPUs in CUDA_VISIBLE_DEVICES."
        )
        return f"{size}, {used} taken", planned, Verdict.FAILS, advice
    return size, planned, Verdict.HOLDS if planned else Verdict.SEEN, ""


def _ecc(gpu: GpuReading, expected: Expectation) -> _Row:
    planned = "no uncorrected errors"
    if gpu.uncorrected:
        advice = (
            f"GPU {gpu.index} has had errors in its memory that could not be corrected: reset it, "
            "and replace it if they come again."
        )
        return f"{gpu.uncorrected} uncorrected errors", planned, Verdict.FAILS, advice
    if gpu.rows_failed:
        advice = f"GPU {gpu.index} has defective memory rows and no spare ones: replace the GPU."
        return "rows could not be replaced", planned, Verdict.FAILS, advice
    if gpu.rows_pending:
        advice = f"GPU {gpu.index} must be reset to replace defective memory rows."
        return "rows wait to be replaced", planned, Verdict.FAILS, advice
    if gpu.ecc is None:
        return "not supported", planned, Verdict.UNKNOWN, ""
    if not gpu.ecc:
        advice = (
            f"GPU {gpu.index} does not correct errors of its memory: a flipped bit changes answers "
            "unseen (nvidia-smi -e 1 and a restart turn ECC on)."
        )
        return "off", planned, Verdict.NOTE, advice
    return "on, no errors" if gpu.uncorrected == 0 else "on", planned, Verdict.HOLDS, ""


def _power(gpu: GpuReading, expected: Expectation) -> _Row:
    if gpu.power_limit is None or gpu.power_default is None:
        return "not reported", "", Verdict.UNKNOWN, ""
    found, planned = f"{gpu.power_limit:g} W", f"{gpu.power_default:g} W"
    if gpu.power_limit < gpu.power_default:
        advice = f"GPU {gpu.index} may use less power than it was made for: it may run slower."
        return found, planned, Verdict.NOTE, advice
    return found, planned, Verdict.HOLDS, ""


def _links(reading: Reading, gpus: Sequence[GpuReading], expected: Expectation) -> list[Check]:
    if len(gpus) < 2:
        return []
    nvlink = expected.gpu is not None and expected.gpu.link == "NVLink"
    planned = "all up" if nvlink else ""
    rows: list[_Row] = []
    for gpu in gpus:
        up = gpu.links > 0 and gpu.links_active == gpu.links
        advice = (
            f"GPU {gpu.index} has {gpu.links_active} of {gpu.links} NVLinks up: restart the "
            "machine, check nvidia-smi nvlink -s, and on SXM boards that the fabric manager runs."
        )
        bad = (nvlink and not up) or gpu.links_active < gpu.links
        verdict = Verdict.FAILS if bad else Verdict.HOLDS if nvlink else Verdict.SEEN
        rows.append(
            (f"{gpu.links_active} of {gpu.links} up", planned, verdict, advice if bad else "")
        )
    checks = _joined("NVLinks", [gpu.index for gpu in gpus], rows, Exit.GPU_LINKS)
    pairs = [(a.index, b.index) for a, b in combinations(gpus, 2)]
    peers = {pair: reading.peers.get((min(pair), max(pair)), (None, None)) for pair in pairs}
    if all(reads is None for reads, _ in peers.values()):
        none = Check("peer access", "not reported", "", Verdict.UNKNOWN, Exit.GPU_LINKS)
        return [*checks, none]
    cut = [pair for pair, (reads, over) in peers.items() if not reads or (nvlink and over is False)]
    names = ", ".join(f"{a}-{b}" for a, b in cut[:4]) + (" and more" if len(cut) > 4 else "")
    over = " over NVLink" if nvlink else ""
    advice = (
        f"The GPUs {names} do not reach each other's memory{over}: see nvidia-smi topo -m, and "
        "turn IOMMU or ACS off in virtual machines and firmware."
    )
    found = f"all {len(pairs)} pairs" if not cut else f"{len(cut)} of {len(pairs)} pairs cut off"
    planned = f"every pair{over}"
    verdict = Verdict.HOLDS if not cut else Verdict.FAILS if nvlink else Verdict.NOTE
    text = advice if cut else ""
    return [*checks, Check("peer access", found, planned, verdict, Exit.GPU_LINKS, text)]
