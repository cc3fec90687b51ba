"""The scheduler: it decides which tokens enter the ring in each tick.

It is a plain data structure without clock, device or thread, so that a simulator can drive it as
well as the engine. In each tick, `schedule` returns the packet that enters stage 0. Any number of
ticks later, `process` takes the packet's result.

Every live sequence has a slot. Its decode row belongs to one of M = P microbatches, the packets
that circulate in the ring. The chunks of a prompt enter in consecutive ticks, in whichever packet
is at stage 0, and the packet with the last chunk becomes the sequence's microbatch.
"""

from bisect import bisect_left

import numpy as np

from llama_jax.config.no_token import NO_AGREEMENT, NO_TOKEN
from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.chunk_choice import ChunkChoice
from llama_jax.engine.constraint import Constraint
from llama_jax.engine.interface import PREEMPTIONS, FinishReason, Output, TokenLogprobs
from llama_jax.engine.packets import Packet, Segment
from llama_jax.engine.pages import PagePool
from llama_jax.engine.prefill import Prefill
from llama_jax.engine.prompt_logprobs import PromptScoring
from llama_jax.engine.roster import Roster
from llama_jax.engine.sequence import Sequence
from llama_jax.ring.sizes import RingSizes

# Makes an `Output` in half the time that its own constructor takes: each token needs one.
_new_tuple = tuple.__new__

NOT_A_NUMBER = "The model's output is not a number (NaN) for this request: check the weights."
NOT_A_TOKEN = (
    "The sampler chose {token}, which is no token id in [0, {vocab_size}): let its greedy and "
    "sample return ids of the whole vocabulary."
)
NOT_THE_SAME = (
    "The sampler chose different tokens on the ranks of the mesh, each of which sees its share of "
    "the logits: let it end with greedy or sample of llama_jax.model.sampling, which compare them."
)


class Scheduler:
    """Continuous batching over M microbatches and a pool of pages.

    The most important request comes first (`SamplingParams.priority`), and of equally important
    ones the oldest; only short prompts overtake (`Prefill`). When pages run out, the least
    important live sequence gives up its own and is recomputed later (`Roster`). So the most
    important sequence always makes progress, and every request ends.

    Args:
      sizes: the sizes of the ring.
      num_microbatches: M, equal to the number of stages P.
      prefix_caching: whether sequences that begin alike share pages.
      chunks: chooses the size of each chunk; None for the largest.
      vocab_size: V; a request whose token is not in [0, V) ends with an error.

    Attributes:
      sizes: the sizes of the ring.
      roster: the unfinished sequences.
      prefill: chooses the prompt tokens of each packet.
      waiting, prefilling, microbatches: those of the roster.
      num_special: unfinished requests that do not just take the likeliest of all tokens.
      request_preemptions, requests_by_preemptions: as in `Stats`.
    """

    def __init__(
        self,
        sizes: RingSizes,
        num_microbatches: int,
        *,
        prefix_caching: bool = True,
        chunks: ChunkChoice | None = None,
        vocab_size: int = 1 << 31,
    ):
        self.sizes = sizes
        self._vocab_size = vocab_size
        self.roster = Roster(sizes, num_microbatches, prefix_caching)
        self.prefill = Prefill(sizes, self.roster, chunks)
        self.waiting, self.prefilling = self.roster.waiting, self.roster.prefilling
        self.microbatches = self.roster.microbatches
        self.num_special = 0
        self.request_preemptions = 0
        self.requests_by_preemptions = [0] * (len(PREEMPTIONS) + 1)
        self._sequences: dict[int, Sequence] = {}  # the unfinished ones, by request id
        self._arrivals = 0
        self._generated = 0  # tokens of the requests that have ended
        self._turn = 0  # the microbatch that enters next

    # --- requests ----------------------------------------------------------------------------

    def add(
        self,
        request_id: int,
        prompt: list[int],
        params: SamplingParams,
        *,
        max_model_len: int,
        seed: int,
        stop_ids: frozenset[int],
        salt: bytes = b"",
        constraint: Constraint | None = None,
        arrived_at: float = 0.0,
    ) -> None:
        """Queues a request, which the caller has checked (`client.request_check`).

        Args:
          request_id: not in use by an unfinished request.
          prompt: token ids.
          params: sampling parameters.
          max_model_len: maximum number of tokens of prompt and answer together.
          seed: the seed of the request's random stream.
          stop_ids: tokens that end the request.
          salt: only requests with the same salt share pages.
          constraint: which tokens it may choose, if not all.
          arrived_at: when it arrived, by the clock of the tick loop: for its `queue_seconds`, and
            for the target for first tokens.
        """
        assert request_id not in self._sequences, "the request id is in use"
        assert 0 < len(prompt) < max_model_len, "the prompt must leave room for one token"
        wanted = max_model_len if params.max_tokens is None else len(prompt) + params.max_tokens
        max_length = min(wanted, max_model_len)
        # The last token of an answer is never written to the cache.
        assert self.roster.pages.count(max_length - 1) <= self.sizes.num_pages, (
            "it can never fit the cache"
        )
        scored = params.prompt_logprobs
        sequence = Sequence(
            request_id=request_id,
            arrival=self._arrivals,
            arrived_at=arrived_at,
            num_prompt=len(prompt),
            max_length=max_length,
            params=params,
            seed=seed,
            stop_ids=stop_ids,
            salt=salt,
            constraint=constraint,
            tokens=list(prompt),
            scoring=None if scored is None else PromptScoring(len(prompt), scored),
        )
        self._arrivals += 1
        self._sequences[request_id] = sequence
        self.num_special += not params.takes_the_likeliest
        self.roster.wait(sequence)

    def abort(self, request_id: int) -> None:
        """Drops a request. No-op for a finished one: its end may cross the abort on the way."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._finish(sequence)

    @property
    def pool(self) -> PagePool:
        """All pages of the KV cache."""
        return self.roster.pool

    @property
    def page_tables(self) -> np.ndarray:
        """`[num_slots, pages_per_sequence]` int32, the pages of each slot in order."""
        return self.roster.pages.rows

    @property
    def num_running(self) -> int:
        """Number of sequences that have a slot."""
        return self.roster.num_live

    @property
    def num_preemptions(self) -> int:
        """Number of times that a sequence gave up its pages."""
        return self.roster.num_preemptions

    @property
    def num_prompt_tokens(self) -> int:
        """Number of prompt tokens sent to the device, without those sent again."""
        return self.roster.num_prompt_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Number of prompt tokens that were found in the pool and not sent."""
        return self.roster.num_cached_tokens

    @property
    def num_generated_tokens(self) -> int:
        """Number of tokens of all answers since the start."""
        return self._generated + sum(s.num_answered for s in self._sequences.values())

    def num_answered(self, request_id: int) -> int | None:
        """Number of tokens of an answer so far; None if it has ended."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else sequence.num_answered

    @property
    def num_queued_tokens(self) -> int:
        """Number of tokens of the sequences that wait."""
        return sum(len(sequence.tokens) for sequence in self.waiting)

    @property
    def num_unfinished(self) -> int:
        """Number of requests whose last token is not known yet, waiting or running."""
        return len(self._sequences)

    @property
    def has_work(self) -> bool:
        """Whether any packet still has tokens to carry, now or when pages are free again."""
        return bool(self.waiting or self.prefilling or any(self.microbatches))

    # --- one tick ----------------------------------------------------------------------------

    def schedule(self, now: float = 0.0) -> Packet:
        """Returns the packet that enters now; it is empty if there is nothing to do.

        Args:
          now: the time by the clock of `arrived_at`; only a target for first tokens needs it.
        """
        microbatch = self.microbatches[self._turn]
        self._turn = (self._turn + 1) % len(self.microbatches)
        self.prefill.begin_tick(now)
        # Most rows have room in their last page, and are not the last of their sequence.
        due = [s for s in microbatch if s.next_position >= s.due]
        if due or self.prefilling:
            self._make_room(due)
        packet = Packet(*microbatch.columns(), microbatch.advance(), microbatch.keys)
        self.prefill.fill(packet, microbatch, now)
        # A sequence's slot and pages are free once its last packet has entered, though the result
        # is not known yet. Not earlier: this packet must not overwrite pages that it reads.
        if due or packet.tiles:
            for sequence in (*due, *[tile.sequence for tile in packet.tiles if tile.ends]):
                if sequence.fully_sent:
                    self.roster.release(sequence)
        return packet

    def _make_room(self, due: list[Sequence]) -> None:
        # The most important first: one preempted for a page is less so, and leaves the microbatch.
        for sequence in self.roster.with_first_prompt(due):
            if sequence.slot is None:
                continue
            if sequence.prefilling:
                self.prefill.make_room(sequence)
            else:
                self.roster.make_room(sequence, 1)

    def _finish(self, sequence: Sequence) -> None:
        preemptions = sequence.epoch  # nothing else has raised it so far
        self.request_preemptions += preemptions
        self.requests_by_preemptions[bisect_left(PREEMPTIONS, preemptions)] += 1
        sequence.epoch += 1
        self.roster.remove(sequence)
        self._generated += sequence.num_answered
        self.num_special -= not sequence.params.takes_the_likeliest
        del self._sequences[sequence.request_id]

    # --- results -----------------------------------------------------------------------------

    def score(self, tile: Segment, *scores: np.ndarray) -> None:
        """Takes the scores of the prompt tokens that follow those of a tile.

        Call it in the order in which the packets entered, and before `process` for the same packet.
        Scores of a sequence that has ended or been preempted since are dropped.

        Args:
          tile: of a packet.
          scores: as in `PromptScoring.put`; there may be more of them than tokens.
        """
        if tile.current and tile.sequence.scoring is not None:
            scores = tuple(array[: tile.length] for array in scores)
            tile.sequence.scoring.put(tile.position, *scores)

    def process(
        self,
        packet: Packet,
        tokens: list[int],
        bucket_rows: int,
        logprobs: list[TokenLogprobs] | None = None,
    ) -> list[Output]:
        """Processes the result of a packet.

        Args:
          packet: a packet that `schedule` returned P - 1 or more ticks ago.
          tokens: one token for each segment of the program that ran when the packet left the ring;
            `NO_TOKEN` or `NO_AGREEMENT` where there is none.
          bucket_rows: decode rows of that program; the tokens of the tiles come after them.
          logprobs: of each token, and of the most likely tokens, if a segment asks for them.

        Returns:
          The outputs for the client. Tokens of sequences that have ended or been preempted since
          the packet entered are dropped.
        """
        scored: list[tuple[Sequence, TokenLogprobs]] = []
        if logprobs is not None:
            dealt = packet.deal(logprobs, bucket_rows)
            scored = [(s, own) for s, epoch, own in dealt if epoch == s.epoch]
        outputs: list[Output] = []
        end = self._vocab_size
        for s, epoch, token in packet.deal(tokens, bucket_rows):
            if epoch != s.epoch:
                continue
            known = s.tokens
            known.append(token)
            if len(known) >= s.look_at or token in s.stop_ids or not 0 <= token < end:
                outputs.append(self._look(s, token))
            else:  # as almost all
                fields = (  # of an `Output`, in their order
                    s.request_id, token, None, None, s.num_cached, s.queue_seconds, None, None, None
                )  # fmt: skip
                outputs.append(_new_tuple(Output, fields))
        if logprobs is None:
            return outputs
        return [_with_logprobs(*each) for each in zip(outputs, scored, strict=True)]

    def _fail(self, sequence: Sequence) -> Output:
        """Ends a request whose newest token is none: its logits are NaN, or the user's own sampler
        has returned anything."""
        token = sequence.tokens.pop()
        error = NOT_A_TOKEN.format(token=token, vocab_size=self._vocab_size)
        error = {NO_TOKEN: NOT_A_NUMBER, NO_AGREEMENT: NOT_THE_SAME}.get(token, error)
        self._finish(sequence)
        self.pool.withdraw(sequence.page_keys)  # nobody else shall read what led to this
        return Output(
            sequence.request_id,
            None,
            "error",
            error,
            cached_tokens=sequence.num_cached,
            queue_seconds=sequence.queue_seconds,
        )

    def _look(self, sequence: Sequence, token: int) -> Output:
        """Looks at a sequence that may have ended, or that may have filled a page, by its newest
        token; and at each token of one with a constraint, and the first of all others."""
        if not 0 <= token < self._vocab_size:
            return self._fail(sequence)
        reason: FinishReason | None = None
        if token in sequence.stop_ids:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.max_length:
            reason = "length"
        if reason:
            self._finish(sequence)
        elif sequence.constraint is not None:
            sequence.constraint.take(token)
        if sequence.slot is not None:
            self.roster.pages.publish(sequence)
        if sequence.constraint is None:
            full = (sequence.num_published + 1) * self.sizes.page_size
            sequence.look_at = min(full, sequence.max_length)
        scores = None
        if sequence.scoring is not None:
            scores, sequence.scoring = sequence.scoring.result(), None
        return Output(
            sequence.request_id,
            token,
            reason,
            cached_tokens=sequence.num_cached,
            queue_seconds=sequence.queue_seconds,
            prompt_logprobs=scores,
        )


def _with_logprobs(output: Output, scored: tuple[Sequence, TokenLogprobs]) -> Output:
    """Adds the log-probabilities that a request asks for."""
    sequence, own = scored
    wanted = sequence.params.logprobs
    if output.token is None or wanted is None:
        return output
    return output._replace(logprobs=TokenLogprobs(own.logprob, own.top[:wanted]))
