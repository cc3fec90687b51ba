"""What is known about one HTTP request: for the logs, the metrics and the traces.

The record belongs to the task that handles the request, and is found from anywhere in it with
`current_record`. Nothing is written to it after its end.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_jax.config.sampling_params import SamplingParams
    from llama_jax.serve.monitoring.request_timer import RequestTimer

CLIENT_CLOSED_REQUEST = 499  # nginx's status code, for logs; no client receives it


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One HTTP request and its answer.

    Attributes:
      id: the client's X-Request-Id, or one made up here.
      method: as sent.
      path: as sent, percent-encoded, without the query.
      client: the address of the client, or of what a trusted proxy names as the client.
      http_version: "1.1" or "1.0".
      trace: the headers `traceparent` and `tracestate`, if they were sent.
      began: when it arrived, by `time.perf_counter`.
      began_ns: the same moment in nanoseconds since 1970.
      seconds: its duration, until the last byte of the answer was handed to the kernel.
      status: the status of the answer.
      handler: the route that answered, such as "/v1/models/{name:path}", or "none".
      key_id: the beginning of the hash of the API key, if there is one.
      error: the code of the error that ended it, also within a stream.
      body: the body, if a log needs it.
      model: the model that generates.
      stream: whether the answer is a stream.
      params: the sampling parameters of the first choice, if text is generated.
      choices_per_prompt: the number of choices for each prompt.
      choices: the sequences that were started.
    """

    id: str
    method: str
    path: str
    client: str
    http_version: str = "1.1"
    trace: dict[str, str] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    began_ns: int = field(default_factory=time.time_ns)
    seconds: float = 0.0
    status: int = CLIENT_CLOSED_REQUEST
    handler: str = "none"
    key_id: str | None = None
    error: str | None = None
    body: bytes = b""
    model: str | None = None
    stream: bool = False
    params: "SamplingParams | None" = None
    choices_per_prompt: int = 1
    choices: "list[RequestTimer]" = field(default_factory=list)

    def end(self) -> None:
        """Records that the answer is complete, or that its client has gone."""
        self.seconds = time.perf_counter() - self.began

    def wall_ns(self, moment: float) -> int:
        """Converts a time of `time.perf_counter` to nanoseconds since 1970."""
        return self.began_ns + int((moment - self.began) * 1e9)


RequestListener = Callable[[RequestRecord], None]

_CURRENT: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def current_record() -> RequestRecord | None:
    """Returns the record of the HTTP request that this task handles, if there is one."""
    return _CURRENT.get()


def set_current(record: RequestRecord) -> None:
    """Makes this the record of the current task, and of those that it starts."""
    _CURRENT.set(record)


def note_error(code: str | None) -> None:
    """Records that the current request ends with an error of this code."""
    if record := current_record():
        record.error = code or "error"


def note_generation(
    model: str, params: "SamplingParams", choices_per_prompt: int, stream: bool
) -> None:
    """Records what the current request asks to generate."""
    if record := current_record():
        record.model, record.params = model, params
        record.choices_per_prompt, record.stream = choices_per_prompt, stream
