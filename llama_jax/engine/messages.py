"""What the engine process and its parent say to each other: msgpack over a Unix socket.

Parent to engine: `Add`, `Abort`, `Shutdown`. Engine to parent: `Progress` while it starts, then
`Stats` and `Ready`, then `Outputs` and more `Stats`; `Fatal` at any time is its last. Imports no
JAX.
"""

from typing import Literal

import msgspec

from llama_jax.config.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "error"]


class Add(msgspec.Struct, tag=True, frozen=True):
    """A request. The engine answers with one `Output` a token, the last with a finish reason."""

    request_id: int
    prompt: list[int]
    params: SamplingParams


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Forget a request: its pages are free at once, and no further output comes."""

    request_id: int


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """End the process."""


class Progress(msgspec.Struct, tag=True, frozen=True):
    """How far the start has come: `done` of `total` units of `phase`."""

    phase: Literal["starting", "loading", "compiling"]
    done: float
    total: float
    detail: str = ""


class DeviceInfo(msgspec.Struct, frozen=True):
    """One device of the mesh and the bytes that lie on it."""

    name: str
    stage: int
    rank: int
    layers: list[int]
    weight_bytes: int
    kv_bytes: int


class EngineInfo(msgspec.Struct, frozen=True):
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


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine can generate."""

    info: EngineInfo


class Fatal(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start or go on; `message` is one sentence for the user."""

    message: str


class Output(msgspec.Struct, frozen=True, array_like=True):
    """One token of one request, or its end.

    token is None where the end brings none. An EOS or stop token is sent, with finish reason
    "stop"; it is for the parent not to show it. `error` says why where the reason is "error".
    """

    request_id: int
    token: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """The tokens of one tick."""

    outputs: list[Output]


class Stats(msgspec.Struct, tag=True, frozen=True):
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


ToEngine = Add | Abort | Shutdown
FromEngine = Progress | Ready | Fatal | Outputs | Stats
