"""A request as the engine sees it: its tokens, and where they are on the device."""

from dataclasses import dataclass, field

from llama_jax.config.sampling_params import SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    """One request, from arrival to its end.

    Attributes:
      request_id: the client's name for it.
      arrival: its place in the order of arrival; the smaller, the older.
      tokens: prompt and answer, as far as the host knows them.
      max_length: tokens of prompt and answer at which it ends.
      params: sampling parameters.
      seed: of its random stream.
      stop_ids: tokens that end it.
      epoch: raised when what is in flight for it becomes void (preemption, abort, end). A result
        counts only if its packet was sent in the present epoch.
      slot: its number on the device while it is live, else None.
      pages: its pages, in order.
      next_position: the position of the next token to send to the device; everything before has
        been sent.
      prefill_until: the position at which prefill ends and decode begins: all the tokens that were
        known when it was admitted.
      finished: nothing more will be said of it.
    """

    request_id: int
    arrival: int
    tokens: list[int]
    max_length: int
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    epoch: int = 0
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    next_position: int = 0
    prefill_until: int = 0
    finished: bool = False

    @property
    def prefilling(self) -> bool:
        """Some of the tokens that it was admitted with have yet to be sent."""
        return self.next_position < self.prefill_until

    @property
    def fully_sent(self) -> bool:
        """The token at its length limit has been asked for; positions need no token to be known."""
        return self.next_position >= self.max_length - 1
