"""The values that an engine returns: outputs, progress, facts and statistics. Imports no JAX.

They are plain Python. `messages` puts them on the wire.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

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
      cached_tokens: tokens of the prompt that did not have to be computed, because a request before
        began with them; the same in every output of a request.
      logprobs: if the request asks for them.
      queue_seconds: how long the request waited in the engine before its prompt was first computed;
        the same in every output of a request; None if it is not known.
    """

    request_id: int
    token: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    logprobs: TokenLogprobs | None = None
    queue_seconds: float | None = None


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
    """One device of the mesh: its place, its layers, and the bytes on it."""

    name: str
    stage: int
    rank: int
    layers: list[int]
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class EngineInfo:
    """Facts about an engine, fixed when it is ready. Bytes and pages are per device."""

    model: str
    mesh: str
    platform: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    page_size: int
    num_pages: int
    devices: list[DeviceInfo]
    num_programs: int
    load_seconds: float
    compile_seconds: float


@dataclass(frozen=True)
class Stats:
    """Counters since the engine was ready, and current gauges (`num_*` and `pages_*`).

    `stage_ticks` counts ticks × stages, and `stage_ticks_busy` those in which the stage held a
    packet with tokens. `token_slots` counts the tokens that the programs had room for, over all
    stages, and `token_slots_used` those that were tokens. `host_seconds` is the part of
    `tick_seconds` outside the device programs.
    """

    num_running: int = 0
    num_waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    ticks: int = 0
    stage_ticks: int = 0
    stage_ticks_busy: int = 0
    token_slots: int = 0
    token_slots_used: int = 0
    compilations: int = 0
    tick_seconds: float = 0.0
    host_seconds: float = 0.0
