"""The values that an engine returns: outputs, progress, facts and statistics. Imports no JAX.

They are plain Python. `messages` puts them on the wire.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from llama_jax.engine.errors import RequestError
from llama_jax.engine.prompt_logprobs import PromptLogprobs

FinishReason = Literal["stop", "length", "error"]


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one token, before penalties, biases, temperature and filters.

    Attributes:
      logprob: of the token.
      top: (token id, log-probability) of the most likely tokens, the likeliest first.
    """

    logprob: float
    top: list[tuple[int, float]]


class Output(NamedTuple):
    """One token of one request, or its end.

    Attributes:
      request_id: the request.
      token: the token, including the EOS or stop token that ends a request; None with "error".
      finish_reason: why the request ended, on its last output; else None.
      error: one sentence, if the finish reason is "error".
      param: the field of `SamplingParams` at fault, if there is an error and the request caused it.
      cached_tokens: tokens of the prompt that did not have to be computed, because a request before
        began with them; the same in every output of a request.
      queue_seconds: how long the request waited in the engine before its prompt was first computed;
        the same in every output of a request; None if it is not known.
      logprobs: if the request asks for them.
      prompt_logprobs: in the request's first output, if the request asks for them.
    """

    request_id: int
    token: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    queue_seconds: float | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    param: str | None = None

    @classmethod
    def of_error(cls, request_id: int, error: RequestError) -> "Output":
        """The end of a request that cannot go on, by a fault of its own."""
        return cls(request_id, None, "error", str(error), param=error.param)


@dataclass(frozen=True)
class Progress:
    """The progress of a start: `done` of `total` units of `phase`."""

    phase: Literal["starting", "loading", "compiling"]
    done: float
    total: float
    detail: str = ""

    @property
    def title(self) -> str:
        """The phase in words, for a display."""
        return {
            "starting": "Starting the engine",
            "loading": "Loading weights",
            "compiling": "Compiling programs",
        }[self.phase]


@dataclass(frozen=True)
class DeviceInfo:
    """One device of the mesh: its place, its layers, and the bytes on it.

    `memory_bytes` is what JAX may use of the device's memory, if the device reports it.
    """

    name: str
    stage: int
    rank: int
    layers: list[int]
    weight_bytes: int
    kv_bytes: int
    memory_bytes: int | None = None


@dataclass(frozen=True)
class EngineInfo:
    """Facts about an engine, fixed when it is ready. Bytes and pages are per device.

    `programs_at_start` of the `num_programs` were compiled when it was ready; it compiles the
    others while it answers requests (`Stats.programs_ready`).
    """

    model: str
    mesh: str
    platform: str
    dtype: str
    kv_cache_dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    page_size: int
    num_pages: int
    devices: list[DeviceInfo]
    num_programs: int
    load_seconds: float
    compile_seconds: float
    prefix_caching: bool = True
    programs_at_start: int = 0


WaitReason = Literal["slot", "pages", "prefill", "target"]


class ProgramStats(NamedTuple):
    """The ticks that one compiled program has run, and their seconds.

    Attributes:
      rows, chunk: the bucket of the program.
      ticks: ticks that it ran.
      seconds: time of the steps that dispatched them, including the wait for results due then.
    """

    rows: int
    chunk: int
    ticks: int = 0
    seconds: float = 0.0

    def plus(self, ticks: int, seconds: float) -> "ProgramStats":
        """The same program after more ticks, which took so many seconds in all."""
        return ProgramStats(self.rows, self.chunk, self.ticks + ticks, self.seconds + seconds)


@dataclass(frozen=True)
class StageStats:
    """The packet at one stage: its decode rows and prompt tokens."""

    rows: int
    chunk_tokens: int


class MemoryStats(NamedTuple):
    """Bytes of one device's memory: in use, and that may be used."""

    in_use: int
    limit: int


class TickTime(NamedTuple):
    """What is known of the ticks of one program, without any context.

    Attributes:
      rows, chunk: the bucket of the program.
      seconds: of a tick, corrected by those that were seen.
      modeled: of a tick, before that.
      seen: ticks that the correction rests on.
    """

    rows: int
    chunk: int
    seconds: float
    modeled: float
    seen: int


@dataclass(frozen=True)
class LatencyStats:
    """The latency targets, and what follows from them.

    Attributes:
      tpot, ttft: the targets in seconds: per output token, and to the first token.
      chunk_limit: the largest chunk that may enter now, in tokens.
      ticks: by program.
      most_running: sequences that may run at once now.
    """

    tpot: float | None = None
    ttft: float | None = None
    chunk_limit: int = 0
    ticks: tuple[TickTime, ...] = ()
    most_running: int = 0


# Upper bounds of the classes in `Stats.packets_by_tokens`, which has one more; as in vLLM.
PACKET_TOKENS = (1, *(2**power for power in range(3, 15)))
# The same for `Stats.requests_by_preemptions`; vLLM has no class of its own for 0.
PREEMPTIONS = (0, 1, 2, 3, 4, 5, 10, 20)


@dataclass(frozen=True)
class Stats:
    """Counters since the engine was ready, and current gauges (`num_*` and `pages_*`).

    `stage_ticks` counts ticks × stages, and `stage_ticks_busy` those in which the stage held a
    packet with tokens. `token_slots` counts the tokens that the programs had room for, over all
    stages, and `token_slots_used` those that were tokens. `packet_tokens` counts the tokens that
    entered, and `packets_by_tokens` the packets with so many of them (`PACKET_TOKENS`); empty ones
    do not count. `host_seconds` is the part of `tick_seconds` outside the device programs.

    `preemptions` counts all, `request_preemptions` those of requests that have ended, and
    `requests_by_preemptions` these requests, aborted ones included, by how often they were
    preempted (`PREEMPTIONS`).

    `programs_ready` of the `EngineInfo.num_programs` are compiled. `compilations` counts each
    compiled part of them.

    `wait_reason` says what the next request in line waits for: a slot, pages, its turn to be
    prefilled, or the end of another, because more would miss the target for output tokens.
    `queue_tokens` counts the tokens of those that wait. `pages_cached` are free pages that still
    hold a known text. `stages` are in order, and `memory` is in the order of `EngineInfo.devices`,
    empty if the platform does not report it.
    """

    num_running: int = 0
    num_waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    request_preemptions: int = 0
    requests_by_preemptions: tuple[int, ...] = (0,) * (len(PREEMPTIONS) + 1)
    ticks: int = 0
    stage_ticks: int = 0
    stage_ticks_busy: int = 0
    token_slots: int = 0
    token_slots_used: int = 0
    packet_tokens: int = 0
    packets_by_tokens: tuple[int, ...] = (0,) * (len(PACKET_TOKENS) + 1)
    compilations: int = 0
    tick_seconds: float = 0.0
    host_seconds: float = 0.0
    wait_reason: WaitReason | None = None
    queue_tokens: int = 0
    pages_cached: int = 0
    programs: tuple[ProgramStats, ...] = ()
    stages: tuple[StageStats, ...] = ()
    memory: tuple[MemoryStats, ...] = ()
    programs_ready: int = 0
    latency: LatencyStats = LatencyStats()

    @property
    def kv_usage(self) -> float:
        """The fraction of pages in use."""
        return 1 - self.pages_free / self.pages_total if self.pages_total else 0.0
