"""What JAX sees and measures of this machine's devices: `python -m ...machine.measurement`.

`--validate` runs it in a process of its own: XLA ends the process for an unknown flag, and NCCL may
wait forever for a GPU that does not answer. The last line that it prints is the measurement, as
JSON.
"""

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from sharding.errors import UserError
from sharding.mesh_name import MeshError, parse_mesh

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy")
SECONDS = 600.0  # after which a measurement is stuck


class MeasurementFailed(UserError):
    """JAX could not measure the devices. `stuck` says that it did not end."""

    def __init__(self, message: str, stuck: bool = False) -> None:
        super().__init__(message)
        self.stuck = stuck


@dataclass(frozen=True)
class Measurement:
    """What JAX sees and measures.

    Attributes:
      platform: "cpu" or "gpu".
      devices: what JAX calls each device that it sees.
      versions: of Python and of the packages that matter.
      copy_rates: bytes/s that a copy reads and writes, by device of the mesh.
      matrix_rates: FLOP/s of a bfloat16 product (float32 on CPU), by device of the mesh.
      collectives: the fields of `CollectiveTime`, small arrays before large ones.
    """

    platform: str
    devices: list[str]
    versions: dict[str, str]
    copy_rates: list[float] = field(default_factory=list)
    matrix_rates: list[float] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
      copy: bytes to copy.
      side: of the square matrices.
      small, large: bytes of the arrays of collectives: of one token, and enough to fill the links.
      chain: collectives in the short and the long program.
      seconds: of each timing.
    """

    copy: int
    side: int
    small: int
    large: int
    chain: tuple[int, int]
    seconds: float


GPU = Sizes(1 << 30, 8192, 16 << 10, 64 << 20, (4, 36), 0.3)
CPU = Sizes(64 << 20, 512, 16 << 10, 1 << 20, (1, 5), 0.1)


def versions() -> dict[str, str]:
    """The versions of Python and of `PACKAGES`; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def measure(shape: str, sizes: Sizes | None = None) -> Measurement:
    """Measures the devices of a mesh, as many of them as there are.

    Args:
      shape: of the mesh, such as "4x2". If there are too few devices for it, only each one alone is
        measured.
      sizes: how much; None for what fits the platform.
    """
    import jax
    import jax.numpy as jnp

    from llama_jax.engine.core import configure_jax
    from llama_jax.plan.machine.collectives import ALL_REDUCE, PPERMUTE, time_collective
    from llama_jax.plan.machine.rates import copy_rate, matrix_rate
    from sharding.mesh import make_mesh

    configure_jax()
    try:
        mesh = make_mesh(shape)
    except MeshError:
        mesh = None
    devices = jax.devices()
    cpu = devices[0].platform == "cpu"
    sizes = sizes or (CPU if cpu else GPU)
    own = devices[:1] if cpu else list(devices if mesh is None else mesh.devices.flat)
    dtype = jnp.float32 if cpu else jnp.bfloat16
    found = Measurement(
        platform="cpu" if cpu else "gpu",
        devices=[device.device_kind for device in devices],
        versions=versions(),
        copy_rates=[copy_rate(device, sizes.copy, sizes.seconds) for device in own],
        matrix_rates=[matrix_rate(device, sizes.side, sizes.seconds, dtype) for device in own],
    )
    if mesh is not None:
        for size in (sizes.small, sizes.large):
            for kind in (ALL_REDUCE, PPERMUTE):
                timed = time_collective(mesh, kind, size, sizes.chain, sizes.seconds)
                if timed is not None:
                    found.collectives.append(timed._asdict())
    return found


def start(shape: str) -> "subprocess.Popen[str]":
    """Starts `measure` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "llama_jax.plan.machine.measurement", shape],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]", seconds: float) -> Measurement:
    """The measurement of a process that `start` returned.

    Raises:
      MeasurementFailed: it ended without one, or does not end; the message has what it said.
    """
    try:
        output, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise MeasurementFailed(
            f"JAX did not finish its measurement in {seconds:g} s: a GPU or a link does not "
            "answer; see dmesg for Xid errors.",
            stuck=True,
        ) from None
    lines = output.strip().splitlines()
    if process.returncode or not lines:
        said = said.split("*** Check failure stack trace")[0]  # which XLA prints as it aborts
        words = [line.strip() for line in said.splitlines() if line.strip()] or ["nothing"]
        raise MeasurementFailed(
            f"JAX does not run on this machine: its process ended with code {process.returncode} "
            f"and said {words[-1]!r}."
        )
    return Measurement(**json.loads(lines[-1]))


def main(argv: list[str] | None = None) -> int:
    """Measures and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mesh", help="stages x ranks, such as 4x2")
    mesh = parser.parse_args(argv).mesh
    parse_mesh(mesh)
    print(json.dumps(asdict(measure(mesh))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
