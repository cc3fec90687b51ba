"""What came out of a simulation: every request, and how the engine was used. Imports no JAX."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from llama_jax.engine.interface import ProgramStats

Outcome = Literal["completed", "rejected", "failed", "gone"]


class Sample(NamedTuple):
    """What became of a request. Times are seconds from the start of the simulation.

    Attributes:
      at: when it arrived.
      queued: seconds until the tick with its first prompt tokens was dispatched; None if none was.
      first: when its first token arrived; None if none did.
      last: when its last token arrived, or when it ended otherwise.
      prompt_tokens: of its prompt.
      output_tokens: that arrived.
      cached_tokens: of the prompt, that did not have to be computed.
      outcome: "completed"; "rejected" by admission; "failed" with the engine; "gone" is a client
        that lost patience.
      attempts: how often it was sent.
    """

    at: float
    queued: float | None
    first: float | None
    last: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    outcome: Outcome
    attempts: int = 1

    @property
    def ttft(self) -> float | None:
        """Time to the first token, from the arrival."""
        return None if self.first is None else self.first - self.at

    @property
    def tpot(self) -> float | None:
        """Time per output token: (last - first) / (n - 1); None for an answer of one token."""
        if self.first is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)

    @property
    def e2e(self) -> float:
        """Time to the end, from the arrival."""
        return self.last - self.at


class Moment(NamedTuple):
    """How full an engine is.

    Attributes:
      at: seconds from the start.
      running, waiting: requests with a slot, and in the queue.
      pages: pages that requests hold.
    """

    at: float
    running: int
    waiting: int
    pages: int


@dataclass(frozen=True)
class Simulated:
    """A simulation of one or more replicas: all samples, and sums over the replicas.

    Attributes:
      samples: of all requests, in the order of their arrival.
      replicas: how many engines.
      seconds: from the start to the end of the last request.
      num_stages: P of each replica.
      ticks: that ran.
      busy_seconds: in which devices ran ticks.
      communication_seconds: the part of it in which ranks exchanged data.
      stage_ticks_busy: stages that held a packet with tokens, over all ticks.
      token_slots, token_slots_used: tokens that the programs had room for, over all stages; and
        tokens in them.
      prompt_tokens, cached_tokens, generated_tokens: computed, found in the cache, and chosen.
      preemptions: how often a request gave up its pages.
      pages: of each replica's pool.
      page_seconds: pages held, summed over time.
      programs: by bucket, with the seconds of the devices.
      moments: one a second, of the first replica.
      down_seconds: in which an engine was dead or restarting.
    """

    samples: tuple[Sample, ...]
    replicas: int
    seconds: float
    num_stages: int
    ticks: int
    busy_seconds: float
    communication_seconds: float
    stage_ticks_busy: int
    token_slots: int
    token_slots_used: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    pages: int
    page_seconds: float
    programs: tuple[ProgramStats, ...]
    moments: tuple[Moment, ...]
    down_seconds: float = 0.0
