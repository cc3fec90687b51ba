"""What is simulated: one engine on its GPUs, with the options of its server. Imports no JAX."""

from collections.abc import Callable
from dataclasses import dataclass

from llama_jax.costs.work import Work
from llama_jax.engine.chunk_choice import ChunkChoice
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import GPU_RESULTS_LATE
from llama_jax.ring.sizes import RingSizes

# Of the engine's own work in a tick with 64 decode rows: `python -m bench engine`.
HOST_SECONDS = 0.0005

MAX_QUEUE = EngineOptions(path="").max_queue
MAX_QUEUE_TOKENS = 2**19  # the server's default


@dataclass(frozen=True)
class TickTime:
    """How long a stage takes for its work.

    Attributes:
      seconds: in all.
      communication: the part in which the ranks exchange data.
    """

    seconds: float
    communication: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """One engine and the front of its server.

    Attributes:
      num_stages: P.
      sizes: of its ring, from `engine.sizing.choose_sizes`.
      max_model_len: maximum tokens of a sequence.
      tick_time: the time of a tick in which the slowest stage has this work.
      chunks: makes what chooses the chunks of an engine (`engine.latency_targets.choose_chunks`).
      prefix_caching: whether prompts that begin alike share pages.
      results_late: ticks that the host dispatches ahead of the oldest unread result.
      host_seconds: the host's work in a tick.
      waits: whether a call returns only when its tick has ended, as on a CPU.
      max_queue: requests that may wait for a slot.
      max_queue_tokens: tokens of the prompts that may wait for their first token.
    """

    num_stages: int
    sizes: RingSizes
    max_model_len: int
    tick_time: Callable[[Work], TickTime]
    chunks: Callable[[], ChunkChoice | None] = lambda: None
    prefix_caching: bool = True
    results_late: int = GPU_RESULTS_LATE
    host_seconds: float = HOST_SECONDS
    waits: bool = False
    max_queue: int = MAX_QUEUE
    max_queue_tokens: int = MAX_QUEUE_TOKENS
