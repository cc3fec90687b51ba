"""The values that an engine hands out. Plain Python: no JAX, and nothing of the wire format."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "error"]


class Output(NamedTuple):
    """One token of one request, or its end.

    token is None where the end brings none. An EOS or stop token is sent, with finish reason
    "stop"; it is for the parent not to show it. `error` says why where the reason is "error".
    """

    request_id: int
    token: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far the start has come: `done` of `total` units of `phase`."""

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
    """One device of the mesh and the bytes that lie on it."""

    name: str
    stage: int
    rank: int
    layers: list[int]
    weight_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class EngineInfo:
    """What the engine turned out to be, known once it is ready."""

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
    """Counters since the start (names without unit are counts) and gauges of this moment."""

    num_running: int = 0
    num_waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    prompt_tokens: int = 0
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
