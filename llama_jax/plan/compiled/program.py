"""Compiles one program for a mesh, and keeps what XLA writes about it."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.engine.programs import Programs
from llama_jax.plan.compiled.buffers import Buffer, find_assignment, temporaries
from llama_jax.plan.compiled.thunks import Thunks, find_dump, read_thunks
from llama_jax.ring.sizes import Bucket


class ProgramMemory(NamedTuple):
    """The bytes of a program on each device.

    Attributes:
      arguments: weights, state and packet.
      outputs: the results that do not take over the memory of an argument.
      temporaries: what it needs while it runs.
    """

    arguments: int
    outputs: int
    temporaries: int

    @classmethod
    def of(cls, compiled: Any) -> "ProgramMemory":
        """The memory of a `jax.stages.Compiled`."""
        stats = compiled.memory_analysis()
        return cls(
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes - stats.alias_size_in_bytes,
            stats.temp_size_in_bytes,
        )


class CompiledTick(NamedTuple):
    """The program of a bucket, compiled.

    Attributes:
      bucket: rows and chunk.
      hlo: the optimized HLO of one device.
      thunks: what the host launches.
      memory: its bytes.
      temporaries: the arrays in the memory of temporaries, the largest first.
      seconds: that lowering and compiling took.
    """

    bucket: Bucket
    hlo: str
    thunks: Thunks
    memory: ProgramMemory
    temporaries: list[Buffer]
    seconds: float


def compile_tick(
    programs: Programs, bucket: Bucket, options: Mapping[str, Any] | None = None
) -> CompiledTick:
    """Compiles the very program that an engine runs for a bucket.

    Args:
      programs: of an engine on a mesh of described GPUs.
      bucket: rows and chunk.
      options: more options for the compiler.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        dump: dict[str, Any] = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        lowered = programs.lowered(bucket)
        compiled = lowered.compile(compiler_options={**(options or {}), **dump})
        thunks = read_thunks(find_dump(Path(directory)))
        buffers = temporaries(find_assignment(Path(directory)))
    seconds = time.perf_counter() - start
    memory = ProgramMemory.of(compiled)
    return CompiledTick(bucket, compiled.as_text() or "", thunks, memory, buffers, seconds)
