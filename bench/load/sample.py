"""What became of one request of a load test."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Sample:
    """The times of a request, in seconds since the start of the test, and what it gave.

    Latencies count from the intended arrival, not from the sending: if the client or the server is
    late, every request that should have arrived meanwhile has waited.

    Attributes:
      at: when it was to arrive.
      sent: when it was sent.
      events: when each event with output arrived; several tokens may share one.
      prompt_tokens, output_tokens: by the server's own count, its `usage`.
      error: the kind of failure; None if the answer is complete.
      detail: what the failure said.
    """

    at: float
    sent: float = 0.0
    events: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None
    detail: str = ""

    @property
    def late(self) -> float:
        """By how much it was sent too late."""
        return self.sent - self.at

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.events[0] - self.at

    @property
    def e2e(self) -> float:
        """Time to the last token."""
        return self.events[-1] - self.at

    @property
    def tpot(self) -> float:
        """Mean time per output token after the first; 0 for an answer of one token."""
        return (self.events[-1] - self.events[0]) / max(1, self.output_tokens - 1)

    @property
    def gaps(self) -> Sequence[float]:
        """Times between events, which are those between tokens if each token has its own."""
        return [b - a for a, b in zip(self.events, self.events[1:], strict=False)]
