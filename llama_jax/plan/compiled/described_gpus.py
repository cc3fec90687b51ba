"""Describes the GPUs of the table to XLA's compiler, which then needs none. Imports no JAX.

A description is a `GpuTargetConfigProto` in text form, as XLA writes it beside its dumps
(`*.gpu_target_config.pbtxt`) where it runs on a GPU. XLA has some of its own in
https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs.
"""

import math
from dataclasses import dataclass

from llama_jax.costs.gpus import Gpu
from sharding.errors import UserError

KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Description:
    """What XLA must know of a GPU, beside its memory and bandwidth.

    Attributes:
      kind: its name, as its driver reports it.
      compute_capability: major and minor version.
      cores: multiprocessors.
      float32_units: of each multiprocessor.
      threads: that a multiprocessor holds.
      shared_memory: bytes of each multiprocessor.
      l2_cache: bytes.
      clock_ghz: the highest clock rate.
      source: where the figures come from.
    """

    kind: str
    compute_capability: tuple[int, int]
    cores: int
    float32_units: int
    threads: int
    shared_memory: int
    l2_cache: int
    clock_ghz: float
    source: str


_XLA = "XLA's target_config/specs/"
# What `Gpu.name` names → its description.
DESCRIPTIONS: dict[str, Description] = {
    "h100-sxm": Description("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228 * KIB, 50 * MIB,
        1.98, _XLA + "h100_sxm.txtpb"),
    "h100-pcie": Description("NVIDIA H100 PCIe", (9, 0), 114, 128, 2048, 228 * KIB, 50 * MIB,
        1.755, _XLA + "h100_pcie.txtpb"),
    "h200": Description("NVIDIA H200", (9, 0), 132, 128, 2048, 228 * KIB, 60 * MIB,
        1.98, "the description that XLA wrote on an H200 (jax 0.11.2)"),
    "a100-40": Description("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 164 * KIB, 40 * MIB,
        1.41, _XLA + "a100_sxm_40.txtpb"),
    "a100-80": Description("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164 * KIB, 40 * MIB,
        1.41, _XLA + "a100_sxm_80.txtpb"),
    "l40s": Description("NVIDIA L40S", (8, 9), 142, 128, 1536, 100 * KIB, 96 * MIB,
        2.52, "NVIDIA Ada GPU architecture, AD102; CUDA programming guide, capability 8.9"),
    "b200": Description("NVIDIA B200", (10, 0), 148, 128, 2048, 228 * KIB, 132_644_864,
        1.965, _XLA + "b200.txtpb"),
    "rtx6000-pro": Description("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 128, 1536, 100 * KIB,
        128 * MIB, 2.6, _XLA + "rtx6000pro.txtpb; CUDA programming guide, capability 12.0"),
}  # fmt: skip

_RESERVED = KIB  # bytes of the shared memory that a thread block cannot have
_USABLE = 0.8  # of a described GPU's memory (`GetSchedulerMemoryLimit` in gpu_hlo_schedule.cc)
_ACCELERATED = (9, 10)  # generations with instructions of their own, such as wgmma


def find_description(gpu: Gpu) -> Description:
    """The description of a GPU.

    Raises:
      UserError: XLA's GPU compiler cannot compile for it.
    """
    if gpu.name not in DESCRIPTIONS:
        raise UserError(
            f"XLA's GPU compiler has no description of {gpu.name}: "
            f"compile for one of {', '.join(sorted(DESCRIPTIONS))}."
        )
    return DESCRIPTIONS[gpu.name]


def target_config(gpu: Gpu, allowed: int) -> str:
    """A `GpuTargetConfigProto` in text form.

    Args:
      gpu: to describe.
      allowed: bytes of its memory that JAX may take. JAX tells them to the compiler where it has a
        GPU. Of a described one, the compiler takes 80 % of the memory, and it would change programs
        whose arguments alone are more.

    Raises:
      UserError: XLA's GPU compiler cannot compile for this GPU.
    """
    d = find_description(gpu)
    major, minor = d.compute_capability
    extension = "ACCELERATED_FEATURES" if major in _ACCELERATED else "NONE"
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {d.shared_memory}
  threads_per_core_limit: {d.threads}
  core_count: {d.cores}
  fpus_per_core: {d.float32_units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {round(gpu.bandwidth)}
  l2_cache_size: {d.l2_cache}
  clock_rate_ghz: {d.clock_ghz}
  device_memory_size: {math.ceil(allowed / _USABLE)}
  shared_memory_per_block_optin: {d.shared_memory - _RESERVED}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{d.kind}"
"""
