"""Compiles the programs of a deployment that matter, and says what its GPUs would hold and do."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.costs.deployment import Deployment
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.programs import Programs
from llama_jax.engine.sizing import GPU_MEMORY_SHARE, choose_results_late
from llama_jax.model.controls import CONTROL_WIDTH
from llama_jax.plan.compiled.engine_programs import engine_programs
from llama_jax.plan.compiled.program import ProgramMemory, compile_tick
from llama_jax.plan.compiled.tick_figures import TickFigures, read_tick
from llama_jax.ring.choosing import filter_step, sample_step
from llama_jax.ring.kv_cache import page_bytes
from llama_jax.ring.sizes import Bucket
from llama_jax.ring.steps import LOGITS_SPEC
from llama_jax.ring.tick import StepOutput
from sharding.memory import shard_bytes
from sharding.stages import round_up

_REPLICATED = P()
CONTEXT = 2048  # tokens that each row and tile attends to, in the bytes moved


class MemoryMap(NamedTuple):
    """Bytes on each GPU, as the compiler counts them.

    Attributes:
      weights, kv_cache: arguments of every tick.
      state: the ring's packets, the tokens of the slots, and their history, for penalties.
      results: of the ticks that the host has not read yet.
      temporaries: of the program that needs most.
    """

    weights: int
    kv_cache: int
    state: int
    results: int
    temporaries: int


@dataclass(frozen=True)
class CompiledDeployment:
    """What the compiler says of a deployment.

    Attributes:
      deployment: that was compiled, one replica of it.
      programs: of its engine.
      allowed: bytes of each GPU that everything together may take.
      ticks: what the compiled ticks do.
      sampling: bytes of temporaries of the program that follows a tick if a row is not greedy.
      memory: of each GPU.
    """

    deployment: Deployment
    programs: Programs
    allowed: int
    ticks: list[TickFigures]
    sampling: int
    memory: MemoryMap

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of the KV cache on each GPU."""
        p = self.programs
        return page_bytes(p.config, p.mesh, p.sizes.page_size, p.cache_dtype)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache that the engine would allocate."""
        return self.programs.sizes.num_pages * self.programs.sizes.page_size

    @property
    def fitting_kv_tokens(self) -> int:
        """Tokens in the largest KV cache that fits beside everything else."""
        rest = self.allowed - (sum(self.memory) - self.memory.kv_cache)
        return max(0, rest // self.page_bytes) * self.programs.sizes.page_size


def compile_deployment(deployment: Deployment, options: EngineOptions) -> CompiledDeployment:
    """Compiles the largest program with a chunk and the largest without one.

    Those that the engine has beside them are smaller. `prepare_jax` must have been called.

    Args:
      deployment: one replica of it is compiled.
      options: of the engine.

    Raises:
      UserError: the engine would refuse the options, or the model does not fit into the GPUs.
    """
    share = options.gpu_memory_utilization or GPU_MEMORY_SHARE
    allowed = int(deployment.gpu.memory_bytes * share)
    programs = engine_programs(deployment, options, allowed)
    sizes = programs.sizes
    context = min(CONTEXT, sizes.pages_per_sequence * sizes.page_size)
    ticks = [
        read_tick(programs, compile_tick(programs, bucket), context)
        for bucket in reversed(sizes.largest())
    ]
    sampling = max(memory.temporaries for memory in compile_sampling(programs, sizes.largest()[0]))
    unread = choose_results_late(options, "gpu") + 1
    memory = MemoryMap(
        weights=ticks[0].arguments.weights,
        kv_cache=ticks[0].arguments.kv_cache,
        state=max(tick.arguments.state for tick in ticks) + shard_bytes(programs.shapes().history),
        results=unread * max(tick.memory.outputs for tick in ticks),
        temporaries=max(sampling, *(tick.memory.temporaries for tick in ticks)),
    )
    return CompiledDeployment(deployment, programs, allowed, ticks, sampling, memory)


def compile_sampling(programs: Programs, bucket: Bucket) -> Iterator[ProgramMemory]:
    """Compiles the programs that follow a tick of a bucket if a row is not greedy."""
    mesh, sizes, n = programs.mesh, programs.sizes, programs.sizes.num_segments(bucket)

    def array(
        shape: tuple[int, ...], dtype: jnp.dtype, spec: P = _REPLICATED
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    chosen, vocab = array((n,), jnp.int32), round_up(programs.config.vocab_size, mesh.size)
    output = StepOutput(array((n, vocab), jnp.float32, LOGITS_SPEC), chosen, chosen)
    tokens, controls = array((sizes.num_slots,), jnp.int32), array((n, CONTROL_WIDTH), jnp.int32)
    filtering: Any = filter_step(mesh)
    sampling: Any = sample_step(mesh)
    yield ProgramMemory.of(filtering.lower(output, controls).compile())
    yield ProgramMemory.of(sampling.lower(tokens, output, controls).compile())
