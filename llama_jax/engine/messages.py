"""The wire protocol between an engine and its client: msgpack over a Unix socket.

Client to engine: `Add`, `Abort`, `Shutdown`. Engine to client: `Starting` while it starts, then
`Report` and `Ready`, then `Outputs` and more `Report`s, and after a signal `Draining` and
`Refused`. `Fatal` may end it at any time. Imports no JAX.
"""

import msgspec

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import EngineInfo, Output, Progress, Stats


class Add(msgspec.Struct, tag=True, frozen=True):
    """A request. The engine answers with an `Output` per token, the last with a finish reason."""

    request_id: int
    prompt: list[int]
    params: SamplingParams


class Abort(msgspec.Struct, tag=True, frozen=True):
    """Drops a request: its pages are free at once, and no further output comes."""

    request_id: int


class Shutdown(msgspec.Struct, tag=True, frozen=True):
    """Ends the engine."""


class Starting(msgspec.Struct, tag=True, frozen=True):
    """Reports the progress of the start."""

    progress: Progress


class Ready(msgspec.Struct, tag=True, frozen=True):
    """Reports that the engine can generate."""

    info: EngineInfo


class Fatal(msgspec.Struct, tag=True, frozen=True):
    """Reports that the engine cannot start or go on; `message` is one sentence for the user."""

    message: str


class Outputs(msgspec.Struct, tag=True, frozen=True):
    """The tokens of one tick."""

    outputs: list[Output]


class Report(msgspec.Struct, tag=True, frozen=True):
    """The engine's statistics, at least once a second unless a tick takes longer."""

    stats: Stats


class Draining(msgspec.Struct, tag=True, frozen=True):
    """Reports that a signal has told the engine to end when the requests in flight have."""


class Refused(msgspec.Struct, tag=True, frozen=True):
    """Reports that the engine drains and did not start a request; no output comes for it."""

    request_id: int


ToEngine = Add | Abort | Shutdown
FromEngine = Starting | Ready | Fatal | Outputs | Report | Draining | Refused
