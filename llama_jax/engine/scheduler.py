"""The scheduler: it decides which tokens enter the ring in each tick.

It is a plain data structure without clock, device or thread, so that a simulator can drive it as
well as the engine. In each tick, `schedule` returns the packet that enters stage 0. Any number of
ticks later, `process` takes the packet's result.

Every live sequence has a slot. Its decode row belongs to one of M = P microbatches, the packets
that circulate in the ring. The chunks of a prompt enter in consecutive ticks, in whichever packet
is at stage 0, and the packet with the last chunk becomes the sequence's microbatch.
"""

import numpy as np

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.chunk_choice import ChunkChoice
from llama_jax.engine.constraint import Constraint
from llama_jax.engine.interface import FinishReason, Output, TokenLogprobs
from llama_jax.engine.packets import Packet, Segment
from llama_jax.engine.pages import PagePool
from llama_jax.engine.prefill import Prefill
from llama_jax.engine.prompt_logprobs import PromptScoring
from llama_jax.engine.roster import Roster
from llama_jax.engine.sequence import Sequence
from llama_jax.ring.sizes import RingSizes

NOT_A_NUMBER = "The model's output is not a number (NaN) for this request: check the weights."


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

    Attributes:
      sizes: the sizes of the ring.
      roster: the unfinished sequences.
      prefill: chooses the prompt tokens of each packet.
      waiting, prefilling, microbatches: those of the roster.
      num_generated_tokens: since the start.
      now: the time by the clock of `arrived_at`, kept current by whoever calls `schedule`; it
        matters only to a target for first tokens.
    """

    def __init__(
        self,
        sizes: RingSizes,
        num_microbatches: int,
        *,
        prefix_caching: bool = True,
        chunks: ChunkChoice | None = None,
    ):
        self.sizes = sizes
        self.roster = Roster(sizes, num_microbatches, prefix_caching)
        self.prefill = Prefill(sizes, self.roster, chunks)
        self.waiting, self.prefilling = self.roster.waiting, self.roster.prefilling
        self.microbatches = self.roster.microbatches
        self.num_generated_tokens = 0
        self.now = 0.0
        self._sequences: dict[int, Sequence] = {}  # the unfinished ones, by request id
        self._arrivals = 0
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
          arrived_at: when it arrived, by the clock of the tick loop, for its `queue_seconds`.
        """
        assert request_id not in self._sequences, "the request id is in use"
        assert 0 < len(prompt) < max_model_len, "the prompt must leave room for one token"
        wanted = max_model_len if params.max_tokens is None else len(prompt) + params.max_tokens
        max_length = min(wanted, max_model_len)
        # The last token of an answer is never written to the cache.
        assert self.roster.pages.count(max_length - 1) <= self.sizes.num_pages, (
            "it can never fit the cache"
        )
        sequence = Sequence(
            request_id,
            self._arrivals,
            list(prompt),
            len(prompt),
            max_length,
            params,
            seed,
            stop_ids,
            salt=salt,
            constraint=constraint,
            arrived_at=arrived_at,
        )
        if params.prompt_logprobs is not None:
            sequence.scoring = PromptScoring(len(prompt), params.prompt_logprobs)
        self._arrivals += 1
        self._sequences[request_id] = sequence
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

    def schedule(self) -> Packet:
        """Returns the packet that enters now; it is empty if there is nothing to do."""
        microbatch = self.microbatches[self._turn]
        self._turn = (self._turn + 1) % len(self.microbatches)
        packet = Packet()
        share = self.prefill.share(self.now)
        self._add_rows(packet, microbatch)
        self.prefill.fill(packet, microbatch, share, self.now)
        # A sequence's slot and pages are free once its last packet has entered, though the result
        # is not known yet. Not earlier: this packet must not overwrite pages that it reads.
        for sequence in [s for s in microbatch if s.next_position >= s.max_length - 1]:
            self.roster.release(sequence)
        return packet

    def _add_rows(self, packet: Packet, microbatch: list[Sequence]) -> None:
        rows, page_size = packet.rows, self.sizes.page_size
        # The most important first: one preempted for a page is less so, and not in the packet yet.
        for sequence in self.roster.with_first_prompt(microbatch):
            slot, position = sequence.slot, sequence.next_position
            if slot is None:
                continue
            if position < sequence.prefill_until:
                self.prefill.make_room(sequence)
            # Most rows have room in their last page.
            elif position < len(sequence.pages) * page_size or self.roster.make_room(sequence, 1):
                sequence.next_position = position + 1
                rows.append(Segment(sequence, sequence.epoch, slot, position))

    def _finish(self, sequence: Sequence) -> None:
        sequence.epoch += 1
        sequence.finished = True
        self.roster.remove(sequence)
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
            negative if the logits were NaN.
          bucket_rows: decode rows of that program; the tokens of the tiles come after them.
          logprobs: of each token, and of the most likely tokens, if a segment asks for them.

        Returns:
          The outputs for the client. Tokens of sequences that have ended or been preempted since
          the packet entered are dropped.
        """
        outputs = []
        for index, segment in packet.results(bucket_rows):
            sequence = segment.sequence
            if segment.epoch != sequence.epoch:
                continue
            output = self._take_token(sequence, tokens[index])
            if logprobs is not None and output.token is not None:
                wanted = sequence.params.logprobs
                if wanted is not None:
                    own = TokenLogprobs(logprobs[index].logprob, logprobs[index].top[:wanted])
                    output = output._replace(logprobs=own)
            if sequence.scoring is not None and output.token is not None:
                output = output._replace(prompt_logprobs=sequence.scoring.result())
                sequence.scoring = None
            outputs.append(output)
        return outputs

    def _take_token(self, sequence: Sequence, token: int) -> Output:
        if token < 0:
            self._finish(sequence)
            self.pool.withdraw(sequence.page_keys)  # nobody else shall read what led to this
            return Output(
                sequence.request_id,
                None,
                "error",
                NOT_A_NUMBER,
                cached_tokens=sequence.num_cached,
                queue_seconds=sequence.queue_seconds,
            )
        known = sequence.tokens
        known.append(token)
        self.num_generated_tokens += 1
        reason: FinishReason | None = None
        if token in sequence.stop_ids:
            reason = "stop"
        elif len(known) >= sequence.max_length:
            reason = "length"
        if reason:
            self._finish(sequence)
        else:
            if sequence.constraint is not None:
                sequence.constraint.take(token)
            full = (sequence.num_published + 1) * self.sizes.page_size
            if sequence.next_position >= full and sequence.slot is not None:
                self.roster.pages.publish(sequence)
        # By position: names would take twice the time, and this is done for every token.
        return Output(
            sequence.request_id, token, reason, None, sequence.num_cached, sequence.queue_seconds
        )
