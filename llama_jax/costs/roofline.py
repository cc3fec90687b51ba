"""Shares of a device's peak that kernels reach, where none was measured. Imports no JAX.

Every figure here is an assumption, stated as (low, expected, high) time. A time from a roofline is
its floor divided by a share, so it is never below what the device can do.
"""

from typing import NamedTuple

from llama_jax.costs.figure import Band


class Shares(NamedTuple):
    """What kernels reach: shares of peak, and fixed seconds; each for low, expected, high time.

    Attributes:
      bandwidth: share of the bandwidth of the device memory.
      flops: share of the arithmetic of matrix products.
      kernel: seconds that any kernel takes at least.
      attention: seconds that attention takes at least in each layer.
      small_kernels: kernels of a layer beside products, attention and collectives.
      sampling: seconds from the logits to the next tokens.
      launch: seconds of a tick in which the device waits for the host.
      hop: seconds of a collective for each step along its ring, without its bytes.
      link: share of the bandwidth of the links.
    """

    bandwidth: tuple[float, float, float]
    flops: tuple[float, float, float]
    kernel: tuple[float, float, float]
    attention: tuple[float, float, float]
    small_kernels: tuple[int, int, int]
    sampling: tuple[float, float, float]
    launch: tuple[float, float, float]
    hop: tuple[float, float, float]
    link: tuple[float, float, float]


# Bandwidth: 68 % of it is published for torch.compile on an A100, 70 to 78 % on an H100 at batch 1,
# and 85 % of it is what products alone reach in the measured kernels.
GPU_SHARES = Shares(
    bandwidth=(0.92, 0.82, 0.65),
    flops=(0.85, 0.70, 0.50),
    kernel=(1e-6, 2e-6, 4e-6),
    attention=(6e-6, 10e-6, 16e-6),
    small_kernels=(4, 5, 7),
    sampling=(10e-6, 30e-6, 60e-6),
    launch=(0.0, 0.5e-3, 1e-3),
    hop=(2e-6, 4e-6, 8e-6),
    link=(0.9, 0.7, 0.5),
)
# A TPU runs a tick as one program, which fetches the next weights while it computes. In a whole
# step, jax-llm-examples reach 85 % of the bandwidth of a v5e, so products alone must reach more.
TPU_SHARES = GPU_SHARES._replace(
    bandwidth=(0.98, 0.92, 0.80),
    kernel=(0.2e-6, 0.5e-6, 1e-6),
    attention=(1e-6, 2e-6, 4e-6),
    launch=(0.0, 0.1e-3, 0.3e-3),
    hop=(0.5e-6, 1e-6, 2e-6),
)
CPU_SHARES = GPU_SHARES._replace(
    bandwidth=(0.9, 0.6, 0.3), flops=(0.9, 0.5, 0.15), kernel=(2e-6, 10e-6, 50e-6)
)
# Between hosts: 400 Gbit/s for each GPU, and the time of a message over RDMA.
NETWORK_BANDWIDTH = 50e9
NETWORK_HOP = (8e-6, 15e-6, 30e-6)
PCIE_HOP = (5e-6, 10e-6, 20e-6)  # without NVLink, data goes through the host's bridges


def shares_of(platform: str, link: str = "NVLink") -> Shares:
    """The assumed shares of a platform, "gpu", "tpu" or "cpu", with these links."""
    shares = {"gpu": GPU_SHARES, "tpu": TPU_SHARES, "cpu": CPU_SHARES}[platform]
    return shares._replace(hop=PCIE_HOP) if link == "PCIe" else shares


def band(values: tuple[float, float, float]) -> Band:
    """The band of three times."""
    return Band(*values)
