"""What NVIDIA's driver says of the GPUs of this host. The only module that imports `pynvml`.

NVML numbers the GPUs of a host by their place on the bus, and knows nothing of
`CUDA_VISIBLE_DEVICES`; `visible` applies it. A figure that a GPU or a driver does not report is
None: that is no failure.

Reference: https://docs.nvidia.com/deploy/nvml-api/
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from sharding.errors import UserError

T = TypeVar("T")

# What slows a GPU down: bits of `nvmlDeviceGetCurrentClocksEventReasons`. An idle GPU is no news.
SLOWED_BY = {
    0x02: "clocks set by an application",
    0x04: "power limit",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature, by software",
    0x40: "temperature, by hardware",
    0x80: "power brake",
}


class NvmlMissing(UserError):
    """NVML cannot be used on this machine."""


class Clocks(NamedTuple):
    """How fast a GPU runs at this moment.

    Attributes:
      sm: MHz of the multiprocessors now; None if unknown.
      slowed_by: values of `SLOWED_BY`.
    """

    sm: int | None
    slowed_by: frozenset[str]


@dataclass(frozen=True)
class GpuReading:
    """One GPU. None stands for what it does not report.

    Attributes:
      index: NVML's own.
      uuid: as in `CUDA_VISIBLE_DEVICES`.
      name: such as "NVIDIA H100 80GB HBM3".
      error: why it cannot be read at all, such as "GPU is lost"; the rest is empty then.
      memory_bytes, memory_used: in all, and taken by any process or by the driver.
      ecc: whether its memory corrects errors.
      uncorrected: errors since the driver was loaded that could not be corrected.
      rows_pending, rows_failed: whether rows of its memory wait for a reset to be replaced, and
        whether some could not be replaced.
      mig: whether it is divided into instances.
      max_sm: the greatest MHz of the multiprocessors.
      power_limit, power_default: in watts, as set and as made.
      links, links_active: NVLinks that it has, and those that are up.
    """

    index: int
    uuid: str | None = None
    name: str | None = None
    error: str | None = None
    memory_bytes: int | None = None
    memory_used: int | None = None
    ecc: bool | None = None
    uncorrected: int | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None
    mig: bool | None = None
    max_sm: int | None = None
    power_limit: float | None = None
    power_default: float | None = None
    links: int = 0
    links_active: int = 0


@dataclass(frozen=True)
class Reading:
    """All GPUs of a host.

    Attributes:
      driver: its version.
      cuda: (major, minor) of the newest CUDA that the driver runs.
      gpus: by index.
      peers: for pairs of indices (i < j), whether they reach each other's memory, and whether over
        NVLink; None if unknown.
    """

    driver: str
    cuda: tuple[int, int]
    gpus: tuple[GpuReading, ...]
    peers: dict[tuple[int, int], tuple[bool | None, bool | None]]


class Nvml:
    """An open connection to the driver; a context manager."""

    def __init__(self) -> None:
        """Opens it.

        Raises:
          NvmlMissing: the package, the library or the driver is missing or does not work.
        """
        try:
            import pynvml
        except ModuleNotFoundError as error:
            raise NvmlMissing(
                "The package nvidia-ml-py is not installed, so that the GPUs of this machine "
                "cannot be checked: install it with pip."
            ) from error
        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            reason = "the driver was replaced while it ran: restart the machine"
            if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
                reason = "libnvidia-ml.so.1, a part of NVIDIA's driver, is not on this machine"
            elif error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
                reason = "NVIDIA's driver is installed but not loaded: see dmesg"
            elif error.value != pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
                reason = f"NVML said: {error}"
            raise NvmlMissing(f"The GPUs of this machine cannot be read: {reason}.") from error

    def __enter__(self) -> "Nvml":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    def read(self) -> Reading:
        """Reads everything that does not change from moment to moment.

        Raises:
          NvmlMissing: the driver does not even say how many GPUs there are.
        """
        nvml = self._nvml
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            raise NvmlMissing(f"The GPUs of this machine cannot be counted: {error}.") from error
        handles = {index: self._handle(index) for index in range(count)}
        good = {i: handle for i, handle in handles.items() if not isinstance(handle, str)}
        version = self._ask(nvml.nvmlSystemGetCudaDriverVersion) or 0
        return Reading(
            driver=self._ask(nvml.nvmlSystemGetDriverVersion) or "unknown",
            cuda=(version // 1000, version % 1000 // 10),
            gpus=tuple(
                self._gpu(i, handle) if i in good else GpuReading(i, error=handle)
                for i, handle in handles.items()
            ),
            peers={
                (i, j): self._peers(good[i], good[j]) for i in good for j in good if i < j
            },
        )  # fmt: skip

    def clocks(self, indices: tuple[int, ...]) -> dict[int, Clocks]:
        """How fast these GPUs run now; one that cannot be read is left out."""
        nvml, found = self._nvml, {}
        for index in indices:
            handle = self._handle(index)
            if not isinstance(handle, str):
                # Drivers before 535 know only the older name.
                newer = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
                older = getattr(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None)
                answers = (self._ask(call, handle) for call in (newer, older) if call is not None)
                bits = next((bits for bits in answers if bits is not None), 0)
                sm = self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM)
                reasons = frozenset(name for bit, name in SLOWED_BY.items() if bits & bit)
                found[index] = Clocks(sm, reasons)
        return found

    def _handle(self, index: int) -> Any:
        """The handle of a GPU, or a text that says why there is none."""
        try:
            return self._nvml.nvmlDeviceGetHandleByIndex(index)
        except self._nvml.NVMLError as error:
            return str(error)

    def _ask(self, call: Callable[..., T], *arguments: Any) -> T | None:
        """The answer of NVML; None if it has none."""
        try:
            return call(*arguments)
        except self._nvml.NVMLError:
            return None

    def _gpu(self, index: int, handle: Any) -> GpuReading:
        nvml, ask = self._nvml, self._ask
        try:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED):
                return GpuReading(index, error=str(error))
            memory = None  # such as GPUs that share the host's memory
        ecc = ask(nvml.nvmlDeviceGetEccMode, handle)
        mig = ask(nvml.nvmlDeviceGetMigMode, handle)
        rows = ask(nvml.nvmlDeviceGetRemappedRows, handle)
        limit = ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        default = ask(nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)
        links = list(self._links(handle))
        return GpuReading(
            index=index,
            uuid=ask(nvml.nvmlDeviceGetUUID, handle),
            name=ask(nvml.nvmlDeviceGetName, handle),
            memory_bytes=memory and memory.total,
            memory_used=memory and memory.used,
            ecc=None if ecc is None else ecc[0] == nvml.NVML_FEATURE_ENABLED,
            uncorrected=ask(
                nvml.nvmlDeviceGetTotalEccErrors, handle,
                nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC,
            ),
            rows_pending=None if rows is None else bool(rows[2]),
            rows_failed=None if rows is None else bool(rows[3]),
            mig=None if mig is None else mig[0] == nvml.NVML_DEVICE_MIG_ENABLE,
            max_sm=ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
            power_limit=None if limit is None else limit / 1000,
            power_default=None if default is None else default / 1000,
            links=len(links),
            links_active=sum(links),
        )  # fmt: skip

    def _links(self, handle: Any) -> Iterator[bool]:
        """Whether each NVLink of a GPU is up; a GPU has no link past the first that is refused."""
        for link in range(self._nvml.NVML_NVLINK_MAX_LINKS):
            state = self._ask(self._nvml.nvmlDeviceGetNvLinkState, handle, link)
            if state is None:
                return
            yield state == self._nvml.NVML_FEATURE_ENABLED

    def _peers(self, one: Any, other: Any) -> tuple[bool | None, bool | None]:
        nvml = self._nvml
        # The bindings define NVML_P2P_CAPS_INDEX_READ as a tuple, by a comma too many.
        reads, nvlink = (
            self._ask(nvml.nvmlDeviceGetP2PStatus, one, other, capability)
            for capability in (0, nvml.NVML_P2P_CAPS_INDEX_NVLINK)
        )
        ok = nvml.NVML_P2P_STATUS_OK
        return (None if reads is None else reads == ok, None if nvlink is None else nvlink == ok)


def visible(reading: Reading, variable: str | None = None) -> tuple[GpuReading, ...]:
    """The GPUs that CUDA shows to programs, in their order.

    Args:
      reading: all GPUs.
      variable: the value of `CUDA_VISIBLE_DEVICES`; None for that of this process. As in CUDA, the
        list ends at the first entry that names no GPU.
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES") if variable is None else variable
    if text is None:
        return reading.gpus
    found: list[GpuReading] = []
    for entry in map(str.strip, text.split(",")):
        if entry.isdigit():
            named = [gpu for gpu in reading.gpus if gpu.index == int(entry)]
        else:  # a UUID may be cut short, as long as it names one GPU
            named = [g for g in reading.gpus if entry and g.uuid and g.uuid.startswith(entry)]
        if len(named) != 1:
            break
        found += named
    return tuple(found)
