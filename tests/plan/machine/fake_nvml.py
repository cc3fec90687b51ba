"""A fake of NVIDIA's `libnvidia-ml.so.1`, behind the real bindings.

It stands where the C library does: functions take a handle and pointers, write through the pointers
and return an error code. So whatever the project asks passes through the real `pynvml`.
"""

import ctypes
from dataclasses import dataclass, field

SUCCESS, INVALID_ARGUMENT, NOT_SUPPORTED, NOT_FOUND = 0, 2, 3, 6
GPU_IS_LOST, LIBRARY_NOT_FOUND, DRIVER_NOT_LOADED, VERSION_MISMATCH = 15, 12, 9, 18
SOME_HANDLE = 0x1000


@dataclass(eq=False)  # each is itself
class FakeGpu:
    """A healthy H100; fields that are None are not supported."""

    name: str = "NVIDIA H100 80GB HBM3"
    total: int | None = 85_520_809_984
    used: int = 500_000_000
    ecc: tuple[int, int] | None = (1, 1)
    uncorrected: int | None = 0
    remapped: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    mig: tuple[int, int] | None = (0, 0)
    clock: int | None = 1980
    max_clock: int | None = 1980
    reasons: int | None = 1  # idle
    limit: int | None = 700_000
    default_limit: int | None = 700_000
    links: list[int] = field(default_factory=lambda: [1] * 18)
    lost: bool = False


class FakeLibrary:
    """The library: its functions are attributes, as of a `ctypes.CDLL`.

    Args:
      gpus: of the host.
      init: what `nvmlInit` returns.
      missing: names of functions that an older driver lacks.
      peers: {(i, j): (read, nvlink)} of pairs that differ from (0, 0), which is "OK" for both.
    """

    def __init__(self, gpus, init=SUCCESS, missing=(), peers=None, cuda=12080):
        self.gpus, self.init, self.missing = gpus, init, set(missing)
        self.peers, self.cuda = peers or {}, cuda
        self.open = 0

    def __getattr__(self, name):
        function = type(self).__dict__.get(f"call_{name}")
        if function is None or name in self.missing:
            raise AttributeError(name)  # as CDLL does
        return lambda *arguments: function(self, *arguments)

    def gpu(self, handle) -> FakeGpu:
        return self.gpus[ctypes.cast(handle, ctypes.c_void_p).value - SOME_HANDLE]

    def call_nvmlInitWithFlags(self, flags):
        self.open += self.init == SUCCESS
        return self.init

    def call_nvmlShutdown(self):
        self.open -= 1
        return SUCCESS

    def call_nvmlSystemGetDriverVersion(self, text, size):
        text.value = b"570.86.15"
        return SUCCESS

    def call_nvmlSystemGetCudaDriverVersion(self, out):
        return put(out, self.cuda)

    def call_nvmlDeviceGetCount_v2(self, out):
        return put(out, len(self.gpus))

    def call_nvmlDeviceGetHandleByIndex_v2(self, index, out):
        if not 0 <= index.value < len(self.gpus):
            return INVALID_ARGUMENT
        if self.gpus[index.value].lost:
            return GPU_IS_LOST
        address = ctypes.c_void_p(SOME_HANDLE + index.value)
        ctypes.memmove(ctypes.addressof(out._obj), ctypes.addressof(address), 8)
        return SUCCESS

    def call_nvmlDeviceGetName(self, handle, text, size):
        text.value = self.gpu(handle).name.encode()
        return SUCCESS

    def call_nvmlDeviceGetUUID(self, handle, text, size):
        text.value = f"GPU-{self.gpus.index(self.gpu(handle)):08x}".encode()
        return SUCCESS

    def call_nvmlDeviceGetMemoryInfo(self, handle, out):
        gpu = self.gpu(handle)
        if gpu.total is None:
            return NOT_SUPPORTED
        out._obj.total, out._obj.used = gpu.total, gpu.used
        out._obj.free = gpu.total - gpu.used
        return SUCCESS

    def call_nvmlDeviceGetEccMode(self, handle, *outs):
        return put_all(outs, self.gpu(handle).ecc)

    def call_nvmlDeviceGetMigMode(self, handle, *outs):
        return put_all(outs, self.gpu(handle).mig)

    def call_nvmlDeviceGetRemappedRows(self, handle, *outs):
        return put_all(outs, self.gpu(handle).remapped)

    def call_nvmlDeviceGetTotalEccErrors(self, handle, kind, counter, out):
        assert (kind.value, counter.value) == (1, 0)  # uncorrected, volatile
        return put(out, self.gpu(handle).uncorrected)

    def call_nvmlDeviceGetEnforcedPowerLimit(self, handle, out):
        return put(out, self.gpu(handle).limit)

    def call_nvmlDeviceGetPowerManagementDefaultLimit(self, handle, out):
        return put(out, self.gpu(handle).default_limit)

    def call_nvmlDeviceGetClockInfo(self, handle, kind, out):
        assert kind.value == 1  # of the multiprocessors
        return put(out, self.gpu(handle).clock)

    def call_nvmlDeviceGetMaxClockInfo(self, handle, kind, out):
        return put(out, self.gpu(handle).max_clock)

    def call_nvmlDeviceGetCurrentClocksEventReasons(self, handle, out):
        return put(out, self.gpu(handle).reasons)

    def call_nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, out):
        return put(out, self.gpu(handle).reasons)

    def call_nvmlDeviceGetNvLinkState(self, handle, link, out):
        links = self.gpu(handle).links
        if not links:
            return NOT_SUPPORTED
        return put(out, links[link]) if link < len(links) else INVALID_ARGUMENT

    def call_nvmlDeviceGetP2PStatus(self, one, other, capability, out):
        pair = tuple(self.gpus.index(self.gpu(handle)) for handle in (one, other))
        return put(out, self.peers.get(pair, (0, 0, 0))[capability])


def put(out, value):
    """Writes a figure through a pointer; one that is None is not supported."""
    if value is None:
        return NOT_SUPPORTED
    out._obj.value = value
    return SUCCESS


def put_all(outs, values):
    if values is None:
        return NOT_SUPPORTED
    for out, value in zip(outs, values, strict=True):
        put(out, value)
    return SUCCESS
