"""What a plan assumes of a machine, and the verdict on each assumption. Imports no JAX."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

from llama_jax.costs.gpus import Gpu, gpu_of_device
from llama_jax.engine.sizing import CPU_CACHE_BYTES
from llama_jax.plan.machine.exit_codes import Exit

# Of the data sheet, below which something is wrong: a copy reaches 0.9 on H100 and H200, and a
# product of large random matrices 0.8 on an H200.
LEAST_COPY, LEAST_MATRIX, LEAST_LINK = 0.80, 0.60, 0.50
MOST_ALL_REDUCE = 30e-6  # seconds of one token's all-reduce; 6 to 10 µs are usual
MOST_SPREAD = 0.05  # between the GPUs of a ring, which is as fast as its slowest
SIZE_TOLERANCE = 0.02  # of a GPU's memory: drivers differ in what they reserve
MOST_USED = 0.02  # of a GPU's memory, by drivers and displays alone
GPU_HOST_MEMORY = 8 << 30  # bytes that the processes of a server take on a host with GPUs
CPU_WEIGHTS = 2  # bytes in memory by bytes of a checkpoint in 16 bits, since a CPU takes 32
JAX_VERSIONS = ((0, 10), (0, 13))  # from, and before


class Verdict(StrEnum):
    """Whether an assumption holds."""

    HOLDS = "holds"
    FAILS = "fails"
    NOTE = "note"  # unusual, but no failure
    SEEN = "seen"  # nothing was assumed
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
      what: in words.
      found: on this machine.
      planned: what the plan assumed; "" for nothing.
      verdict: whether it holds.
      code: the exit code if it fails.
      advice: what is wrong and what to do, in one sentence; "" unless it fails or is a note.
    """

    what: str
    found: str
    planned: str
    verdict: Verdict
    code: Exit
    advice: str = ""

    @classmethod
    def of(cls, what: str, found: str, planned: str, fits: bool, code: Exit, advice: str) -> Self:
        """One that fails unless it fits, and is only seen where nothing was planned."""
        verdict = Verdict.FAILS if not fits else Verdict.HOLDS if planned else Verdict.SEEN
        return cls(what, found, planned, verdict, code, "" if fits else advice)


@dataclass(frozen=True)
class Expectation:
    """What a plan assumes.

    Attributes:
      mesh: (stages, ranks) of one replica.
      gpus: of this host; 0 for CPUs, or for as many as the mesh needs if there are
        any.
      gpu: their kind; None for whatever there is.
      checkpoint_bytes: that loading reads; 0 if unknown.
      load_seconds: in which the checkpoint must be read; None for any time.
    """

    mesh: tuple[int, int]
    gpus: int = 0
    gpu: Gpu | None = None
    checkpoint_bytes: int = 0
    load_seconds: float | None = None

    @property
    def for_cpu(self) -> bool:
        """Whether CPUs were planned for."""
        return self.gpu is not None and self.gpu.platform == "cpu"

    @property
    def host_bytes(self) -> int:
        """The bytes that the host must have free."""
        if self.gpus:
            return GPU_HOST_MEMORY
        return CPU_WEIGHTS * self.checkpoint_bytes + CPU_CACHE_BYTES

    def on(self, kinds: Sequence[str]) -> "Expectation":
        """The same on a host with these GPUs, if it was planned for whatever there is.

        Then the mesh takes as many of them as it needs, and all must be as the first.
        """
        if self.gpus or self.for_cpu or not kinds:
            return self
        return replace(self, gpus=math.prod(self.mesh), gpu=gpu_of_device(kinds[0]))

    @property
    def mesh_text(self) -> str:
        """The mesh as "4x2"."""
        return "{}x{}".format(*self.mesh)


def exit_code(checks: list[Check]) -> Exit:
    """The code of the first failure, in the order of `Exit`."""
    failed = [check.code for check in checks if check.verdict is Verdict.FAILS]
    return min(failed, default=Exit.HOLDS)
