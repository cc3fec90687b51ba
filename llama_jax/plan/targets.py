"""What a deployment must hold, and the load that it must hold it under. Imports no JAX."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """The requests that arrive.

    Attributes:
      prompt_tokens, output_tokens: of each request.
      rate: requests per second, of all replicas together.
    """

    prompt_tokens: int
    output_tokens: int
    rate: float

    @property
    def has_tpot(self) -> bool:
        """Whether answers have a second token, and so a time per token after the first."""
        return self.output_tokens > 1

    def __str__(self) -> str:
        return f"{self.prompt_tokens}/{self.output_tokens} at {self.rate:g} requests/s"


@dataclass(frozen=True)
class Targets:
    """What must hold. None stands for no limit.

    Attributes:
      ttft: seconds to the first token.
      tpot: seconds per output token after the first: (last - first) / (n - 1).
      memory_share: of each GPU's memory.
      inside: share of the requests that must be inside both latencies.
    """

    ttft: float | None = None
    tpot: float | None = None
    memory_share: float | None = None
    inside: float = 0.99


MONTH = 30 * 86400.0  # seconds
AVAILABILITY = 0.999  # that is asked for
RESTART = 30.0  # seconds that an engine takes to start again, in which it answers nothing
FAULTS_A_MONTH = MONTH * (1 - AVAILABILITY) / RESTART  # that leave this availability
