"""The GPUs that a plan can be made for. Imports no JAX."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from sharding.errors import UserError

GB, TB = 10**9, 10**12


@dataclass(frozen=True)
class Gpu:
    """One kind of accelerator, by its data sheet.

    Attributes:
      name: as on the command line, such as "h100-sxm".
      memory_bytes: of the device; what its driver reports, where that is known.
      bandwidth: of the device memory, in bytes/s.
      flops: dense FLOP/s of matrix products by the dtype of their inputs: "bfloat16", and "fp8" and
        "int8" where it has them.
      link_bandwidth: to the other devices of a host, in bytes/s in each direction.
      source: where the figures come from.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops: Mapping[str, float]
    link_bandwidth: float
    source: str


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-sxm", 84_942_979_072, 3.35 * TB, {"bfloat16": 989 * TB, "fp8": 1979 * TB,
            "int8": 1979 * TB}, 450 * GB, "NVIDIA H100 data sheet"),
        Gpu("h200", 151_397_597_184, 4.8 * TB, {"bfloat16": 989 * TB, "fp8": 1979 * TB,
            "int8": 1979 * TB}, 450 * GB, "NVIDIA H200 data sheet"),
    )
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """The GPU of this name.

    Raises:
      UserError: there is none; the message has the nearest names.
    """
    if name in GPUS:
        return GPUS[name]
    near = get_close_matches(name.lower(), GPUS, n=3, cutoff=0.3) or sorted(GPUS)
    raise UserError(f"There is no GPU {name!r} in the table: did you mean {', '.join(near)}?")
