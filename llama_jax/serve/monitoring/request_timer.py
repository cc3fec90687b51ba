"""Measures one sequence of a request, from its arrival to its end."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from llama_jax.engine.errors import GenerationFailed, QueueFull, RequestError, RequestTimeout
from llama_jax.engine.interface import Output
from llama_jax.engine.scheduler import NOT_A_NUMBER

if TYPE_CHECKING:
    from llama_jax.serve.monitoring.metrics import Metrics


class RequestTimer:
    """Measures one sequence until the end of the `with` block of this timer.

    Times are by the clock of the metrics.

    Attributes:
      arrived: when its HTTP request arrived.
      submitted: when it was sent to the engine.
      first: when its first token arrived from the engine.
      last: when its last token did.
      ended: when the `with` block ended, with the text of all tokens; None before.
      prompt_tokens: the number of prompt tokens.
      tokens: the number of tokens that have arrived.
      cached_tokens: prompt tokens that did not have to be computed.
      queue_seconds: how long it waited in the engine; None if that is not known.
      reason: why it ended: one of `metrics.FINISHED`, or None if it never began.
    """

    def __init__(
        self,
        metrics: "Metrics",
        arrived: float,
        prompt_tokens: int,
        on_first: Callable[[], None],
    ) -> None:
        self._metrics = metrics
        self._on_first = on_first
        self.arrived = self.submitted = self.first = self.last = arrived
        self.ended: float | None = None
        self.prompt_tokens = prompt_tokens
        self.tokens = 0
        self.cached_tokens = 0
        self.queue_seconds: float | None = None
        self.reason: str | None = None

    def token(self) -> None:
        """Records the arrival of a token from the engine."""
        metrics = self._metrics
        now = metrics.clock()
        if self.tokens == 0:
            self._on_first()
            self.first = now
            metrics.time_to_first_token.observe(now - self.arrived)
            metrics.recent_first_tokens.add(now, now - self.arrived)
        else:
            seconds = now - self.last
            metrics.inter_token.observe(seconds)
            metrics.recent_tokens.add(now, seconds)
        self.last = now
        self.tokens += 1

    def note(self, output: Output) -> None:
        """Records what each output of a sequence says about it; it may be long after `token`."""
        self.queue_seconds, self.cached_tokens = output.queue_seconds, output.cached_tokens

    def finish(self, reason: str) -> None:
        """Records why the sequence finished; `reason` is one of `FINISHED`."""
        self.reason = reason

    def __enter__(self) -> "RequestTimer":
        self.submitted = self._metrics.clock()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        metrics = self._metrics
        self.ended = metrics.clock()
        if isinstance(error, QueueFull):
            metrics.rejected("queue_full")
        if isinstance(error, RequestError) and not self.tokens:  # it was never accepted
            return
        if isinstance(error, GenerationFailed) and str(error) == NOT_A_NUMBER:
            metrics.corrupted.inc()
        if self.reason is None:  # an error, its deadline passed, or the client disconnected
            failed = isinstance(error, Exception) and not isinstance(error, RequestTimeout)
            self.reason = "error" if failed else "abort"
        metrics.finished(self.reason)
        metrics.prompt.observe(self.prompt_tokens)
        metrics.generation.observe(self.tokens)
        if self.reason in ("stop", "length"):
            self._observe_times()

    def _observe_times(self) -> None:
        metrics = self._metrics
        metrics.latency.observe(self.last - self.arrived)
        metrics.decode.observe(self.last - self.first)
        metrics.computed.observe(self.prompt_tokens - self.cached_tokens)
        if self.tokens > 1:
            metrics.time_per_token.observe((self.last - self.first) / (self.tokens - 1))
        if self.queue_seconds is not None:
            began = self.submitted + self.queue_seconds
            metrics.queue.observe(self.queue_seconds)
            metrics.prefill.observe(max(0.0, self.first - began))
            metrics.inference.observe(max(0.0, self.last - began))
