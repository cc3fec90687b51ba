"""A request as the engine tracks it: its tokens, and where they are on the device."""

from dataclasses import dataclass, field

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.constraint import Constraint
from llama_jax.engine.prompt_logprobs import PromptScoring


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """One request, from arrival to its end.

    Attributes, what was asked for:
      request_id: the client's number for the request.
      arrival: its rank in the order of arrival, the oldest first.
      arrived_at: when it arrived, by the clock of the tick loop.
      num_prompt: how many of its tokens are the prompt.
      max_length: number of tokens, prompt included, at which it ends.
      params: sampling parameters.
      seed: the seed of its random stream.
      stop_ids: tokens that end it.
      salt: only requests with the same salt share pages.
      constraint: which tokens it may choose, if not all.

    Attributes, how far it is:
      tokens: prompt and answer, as far as the host knows them.
      next_position: the position of the next token to send to the device.
      prefill_until: the position at which prefill ends and decoding begins: the number of tokens
        that it had when it was admitted.
      epoch: incremented when its results in flight become invalid (preemption, abort, end). A
        result counts only if its packet entered in the current epoch.
      look_at: the number of tokens from which on the scheduler looks at more than the next token.
      prompt_sent: prompt tokens that have been sent to the device, or found in the cache, at least
        once.
      num_cached: prompt tokens whose keys and values were found when it was first admitted.
      queue_seconds: how long it waited before its prompt was first computed, once it is.
      scoring: collects the log-probabilities of its prompt, until they have all been returned; None
        if it asks for none.

    Attributes, what it holds on the device:
      slot: its slot while it is live, else None.
      pages: its pages, in order.
      room: tokens that they have room for.
      due: the next position at which it needs another page, or sends its last token.
      page_keys: the keys of its full pages, as far as they were needed; it keeps them when it gives
        up the pages.
      num_published: how many of its pages have been published, if others may find them.
    """

    request_id: int
    arrival: int
    arrived_at: float
    num_prompt: int
    max_length: int
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    salt: bytes
    constraint: Constraint | None

    tokens: list[int]
    next_position: int = 0
    prefill_until: int = 0
    epoch: int = 0
    look_at: int = 0
    prompt_sent: int = 0
    num_cached: int = 0
    queue_seconds: float | None = None
    scoring: PromptScoring | None = None

    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    room: int = 0
    due: int = 0
    page_keys: list[bytes] = field(default_factory=list)
    num_published: int = 0

    @property
    def num_answered(self) -> int:
        """Number of tokens of the answer."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_skippable(self) -> int:
        """How many tokens need not be computed if their keys and values are found: all but the
        last, and while the prompt is being scored, those that have done their part."""
        last = len(self.tokens) - 1
        return last if self.scoring is None else min(last, self.scoring.count)

    @property
    def prefilling(self) -> bool:
        """Whether tokens that it was admitted with have yet to be sent."""
        return self.next_position < self.prefill_until

    @property
    def fully_sent(self) -> bool:
        """Whether the token that yields its last token is sent; token values need not be known."""
        return self.next_position >= self.max_length - 1
