"""The GPUs that a plan can be made for. Imports no JAX.

A new one is a row in `GPUS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from sharding.errors import UserError

GB, TB = 10**9, 10**12
XLA = "XLA target_config/specs/{}.txtpb, which describes what the driver reports"
TPU = "Cloud TPU documentation, docs.cloud.google.com/tpu/docs/{}"


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
      sources: field → where it comes from, if that is another place.
      link: what the devices of a host are joined by: "NVLink", "PCIe", "ICI" or "memory".
      device_kinds: parts of the names that JAX gives it.
      measured_as: the system in the measured kernels that it is, or that its chip is closest to;
        None if its times come from a roofline.
      platform: "gpu", "tpu" or "cpu".
      joined: how many devices the links join; larger meshes need a network between hosts.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    flops: Mapping[str, float]
    link_bandwidth: float
    source: str
    sources: Mapping[str, str] = field(default_factory=dict)
    link: str = "NVLink"
    device_kinds: tuple[str, ...] = ()
    measured_as: str | None = None
    platform: str = "gpu"
    joined: int = 8

    def __hash__(self) -> int:
        return hash(self.name)

    def source_of(self, figure: str) -> str:
        """Where a field comes from, such as "bandwidth"."""
        return self.sources.get(figure, self.source)


def _flops(
    bfloat16: float, fp8: float | None = None, int8: float | None = None
) -> dict[str, float]:
    """FLOP/s by dtype, of TFLOP/s."""
    rates = {"bfloat16": bfloat16, "fp8": fp8, "int8": int8}
    return {name: rate * TB for name, rate in rates.items() if rate}


def _driver(name: str, *figures: str) -> dict[str, str]:
    return dict.fromkeys(figures or ("memory_bytes",), XLA.format(name))


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-sxm", 84_942_979_072, 3.35 * TB, _flops(989, 1979, 1979), 450 * GB,
            "NVIDIA H100 data sheet, column SXM", _driver("h100_sxm"), "NVLink",
            ("H100 80GB HBM3",), "h100_sxm"),
        Gpu("h100-pcie", 84_942_979_072, 2.04 * TB, _flops(756, 1513, 1513), 64 * GB,
            "NVIDIA H100 data sheet, column PCIe; links without the NVLink bridge between pairs",
            _driver("h100_pcie", "memory_bytes", "bandwidth"), "PCIe", ("H100 PCIe",), "h100_sxm"),
        Gpu("h200", 151_397_597_184, 4.8 * TB, _flops(989, 1979, 1979), 450 * GB,
            "NVIDIA H200 data sheet", _driver("h200"), "NVLink", ("H200",), "h200_sxm"),
        Gpu("a100-40", 42_331_013_120, 1.555 * TB, _flops(312, None, 624), 300 * GB,
            "NVIDIA A100 data sheet, 40 GB SXM", _driver("a100_sxm_40"), "NVLink",
            ("A100-SXM4-40GB",)),
        Gpu("a100-80", 85_100_068_864, 2.039 * TB, _flops(312, None, 624), 300 * GB,
            "NVIDIA A100 data sheet, 80 GB SXM", _driver("a100_sxm_80"), "NVLink",
            ("A100-SXM4-80GB",)),
        Gpu("l40s", 48 * GB, 0.864 * TB, _flops(362, 733, 733), 32 * GB,
            "NVIDIA L40S data sheet; PCIe 4.0 x16", link="PCIe", device_kinds=("L40S",)),
        Gpu("b200", 191_514_411_008, 7.67232 * TB, _flops(2250, 4500, 4500), 900 * GB,
            "NVIDIA HGX B200 data sheet, an eighth of the board",
            _driver("b200", "memory_bytes", "bandwidth"), "NVLink", ("B200",)),
        Gpu("rtx6000-pro", 103_079_215_104, 1.792 * TB, _flops(503, 1007, 1007), 64 * GB,
            "NVIDIA RTX PRO 6000 Blackwell data sheet, Workstation Edition; PCIe 5.0 x16",
            _driver("rtx6000pro", "memory_bytes", "bandwidth"), "PCIe", ("RTX PRO 6000",)),
        Gpu("tpu-v5e", 16 * GB, 0.819 * TB, _flops(197, None, 393), 200 * GB, TPU.format("v5e"),
            {"link_bandwidth": TPU.format("v5e") + ": 400 GB/s in both directions together"},
            "ICI", ("TPU v5 lite", "TPU v5e"), platform="tpu", joined=256),
        Gpu("tpu-v6e", 32 * GB, 1.638 * TB, _flops(918, None, 1836), 400 * GB, TPU.format("v6e"),
            {"link_bandwidth": TPU.format("v6e") + ": 800 GB/s in both directions together"},
            "ICI", ("TPU v6 lite", "TPU v6e"), platform="tpu", joined=256),
    )
}  # fmt: skip

# Not in the table of what can be planned for: its rates differ too much. A calibration file says
# what this machine does; without one, the times for it are a guess.
CPU = Gpu(
    "cpu", 8 * GB, 20 * GB, {"bfloat16": 0.05 * TB, "float32": 0.1 * TB}, 5 * GB,
    "a guess, for two cores", link="memory", device_kinds=("cpu",), platform="cpu",
)  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """The GPU of this name, in upper or lower case.

    Raises:
      UserError: there is none; the message has the nearest names.
    """
    known = GPUS | {"cpu": CPU}
    plain = name.strip().lower()
    if plain in known:
        return known[plain]
    begun = [gpu for gpu in known if plain and (gpu.startswith(plain) or plain.startswith(gpu))]
    if (device := gpu_of_device(name)) is not None:
        begun = [device.name]
    near = begun or get_close_matches(plain, known, n=3, cutoff=0.3) or sorted(GPUS)
    raise UserError(f"There is no GPU {name!r} in the table: did you mean {', '.join(near)}?")


def gpu_of_device(device_kind: str) -> Gpu | None:
    """The GPU that JAX calls `device_kind`, such as "NVIDIA H200"; None if there is none."""
    found = [
        gpu
        for gpu in (*GPUS.values(), CPU)
        if any(part.lower() in device_kind.lower() for part in gpu.device_kinds)
    ]
    return found[0] if found else None
