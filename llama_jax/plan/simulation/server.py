"""What is simulated: one engine on its GPUs, with the options of its server. Imports no JAX."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from llama_jax.costs.memory import page_bytes
from llama_jax.costs.tick_time import TickModel
from llama_jax.costs.work import Work
from llama_jax.engine.chunk_choice import ChunkChoice
from llama_jax.engine.latency_targets import choose_chunks
from llama_jax.engine.options import EngineOptions
from llama_jax.engine.sizing import (
    GPU_RESULTS_LATE,
    choose_page_size,
    choose_results_late,
    choose_sizes,
)
from llama_jax.plan.replica import LEVELS
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
      host_seconds: the host's work in a tick, whatever it holds.
      host_seconds_per_token: for each token that the tick gives, in addition.
      host_seconds_per_request: for each request that has arrived since the tick before.
      front_seconds: from the arrival of a request until it is in the engine.
      waits: whether a call returns only when its tick has ended, as on a CPU.
      shares_cores: whether all stages run on the same cores, as virtual CPU devices do. Their work
        then adds up, while stages on devices of their own wait for the slowest.
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
    host_seconds_per_token: float = 0.0
    host_seconds_per_request: float = 0.0
    front_seconds: float = 0.0
    waits: bool = False
    shares_cores: bool = False
    max_queue: int = MAX_QUEUE
    max_queue_tokens: int = MAX_QUEUE_TOKENS


def server_for(
    model: TickModel, options: EngineOptions, cache_bytes: int, level: str = "expected"
) -> Server:
    """The server that these options start, with the sizes and programs that it would choose.

    Args:
      model: the times of its ticks.
      options: of its engine.
      cache_bytes: for the KV cache on each GPU.
      level: which of a tick's times count: one of `LEVELS`.

    Raises:
      SizingError: the cache is too small for the options.
    """
    deployment = model.deployment
    stages, platform = deployment.layout.num_stages, deployment.gpu.platform
    page = page_bytes(deployment, choose_page_size(options, platform))
    sizes, longest = choose_sizes(
        options, deployment.config, stages, page, cache_bytes, platform, model
    )
    index = LEVELS.index(level)
    calibration = model.calibration
    communication: dict[tuple[int, int], float] = {}

    def tick_time(work: Work) -> TickTime:
        program = work.rows, work.chunk
        if program not in communication:
            part = model.parts(Work(*program))["communication"]
            communication[program] = getattr(part, level)
        return TickTime(model.times(work)[index], communication[program])

    server = Server(
        num_stages=stages,
        sizes=sizes,
        max_model_len=longest,
        tick_time=tick_time,
        chunks=lambda: choose_chunks(options, sizes, platform, model),
        prefix_caching=options.prefix_caching,
        results_late=choose_results_late(options, platform),
        waits=platform == "cpu",
        shares_cores=platform == "cpu",
        max_queue=options.max_queue,
    )
    if calibration is None or calibration.host_seconds_per_tick is None:
        return server
    return replace(
        server,
        host_seconds=calibration.host_seconds_per_tick,
        host_seconds_per_token=calibration.host_seconds_per_token or 0.0,
        host_seconds_per_request=calibration.host_seconds_per_request or 0.0,
        front_seconds=calibration.front_seconds or 0.0,
    )
