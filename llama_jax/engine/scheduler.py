"""The scheduler: it decides which tokens enter the ring in each tick.

It is a plain data structure without clock, device or thread, so that a simulator can drive it as
well as the engine. In each tick, `schedule` returns the packet that enters stage 0. Any number of
ticks later, `process` takes the packet's result.

Every live sequence has a slot. Its decode row belongs to one of M = P microbatches, the packets
that circulate in the ring. The chunks of a prompt enter in consecutive ticks, in whichever packet
is at stage 0, and the packet with the last chunk becomes the sequence's microbatch.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.interface import FinishReason, Output, TokenLogprobs
from llama_jax.engine.page_tables import PageTables
from llama_jax.engine.pages import PagePool
from llama_jax.engine.sequence import Sequence
from llama_jax.ring.sizes import RingSizes

NOT_A_NUMBER = "The model's output is not a number (NaN) for this request: check the weights."


@dataclass(slots=True)
class Segment:
    """Consecutive tokens of one sequence in a packet, as `llama_jax.ring.packet` encodes them.

    Attributes:
      sequence: the sequence.
      epoch: the sequence's epoch when the packet entered.
      slot: the sequence's slot when the packet entered.
      position: the position of the first token.
      tokens: prompt tokens; None for a decode row, whose one token only the device knows.
      ends: whether to sample the token that follows.
    """

    sequence: Sequence
    epoch: int
    slot: int
    position: int
    tokens: list[int] | None = None
    ends: bool = True

    @property
    def length(self) -> int:
        """Number of tokens."""
        return 1 if self.tokens is None else len(self.tokens)


@dataclass(slots=True)
class Packet:
    """The tokens that enter in one tick, kept to match the packet's result to sequences later."""

    rows: list[Segment] = field(default_factory=list)
    tiles: list[Segment] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all segments."""
        return len(self.rows) + sum(tile.length for tile in self.tiles)

    def results(self, bucket_rows: int) -> list[tuple[int, Segment]]:
        """The segments whose next token is sampled, each with its index in the tick's result."""
        ends = [(bucket_rows + i, tile) for i, tile in enumerate(self.tiles) if tile.ends]
        return [*enumerate(self.rows), *ends]

    def __bool__(self) -> bool:
        return bool(self.rows or self.tiles)


class Scheduler:
    """Continuous batching over M microbatches and a pool of pages.

    First come, first served: every live sequence is older than every waiting one. When pages run
    out, the youngest live sequence gives up its pages (preemption) and is recomputed later. So the
    oldest sequence always makes progress, and every request ends.

    Args:
      sizes: the sizes of the ring.
      num_microbatches: M, equal to the number of stages P.
      prefix_caching: whether sequences that begin alike share pages.

    Attributes:
      pages: the pages of the live sequences. A packet takes a snapshot of the rows that it needs.
    """

    def __init__(self, sizes: RingSizes, num_microbatches: int, *, prefix_caching: bool = True):
        self.sizes = sizes
        self.pages = PageTables(sizes, prefix_caching)
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None  # one at a time; the youngest live sequence
        # Each in order of arrival.
        self.microbatches: list[list[Sequence]] = [[] for _ in range(num_microbatches)]
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0  # of the prompt tokens: those found in the pool
        self.num_generated_tokens = 0
        self._free_slots = list(range(sizes.num_slots - 1, -1, -1))
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
        """
        assert request_id not in self._sequences, "the request id is in use"
        assert 0 < len(prompt) < max_model_len, "the prompt must leave room for one token"
        wanted = max_model_len if params.max_tokens is None else len(prompt) + params.max_tokens
        max_length = min(wanted, max_model_len)
        # The last token of an answer is never written to the cache.
        assert self.pages.count(max_length - 1) <= self.sizes.num_pages, (
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
        )
        self._arrivals += 1
        self._sequences[request_id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: int) -> None:
        """Drops a request. No-op for a finished one: its end may cross the abort on the way."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._finish(sequence)

    @property
    def pool(self) -> PagePool:
        """All pages of the KV cache."""
        return self.pages.pool

    @property
    def page_tables(self) -> np.ndarray:
        """`[num_slots, pages_per_sequence]` int32, the pages of each slot in order."""
        return self.pages.rows

    @property
    def num_running(self) -> int:
        """Number of sequences that have a slot."""
        return self.sizes.num_slots - len(self._free_slots)

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
        share = self.share()
        self._add_rows(packet, microbatch)
        self._add_chunk(packet, microbatch, share)
        # A sequence's slot and pages are free once its last packet has entered, though the result
        # is not known yet. Not earlier: this packet must not overwrite pages that it reads.
        for sequence in [s for s in microbatch if s.fully_sent]:
            self._release(sequence)
        return packet

    def _add_rows(self, packet: Packet, microbatch: list[Sequence]) -> None:
        # Oldest first: a sequence preempted for a page is younger, so it is not in the packet yet.
        for sequence in list(microbatch):
            if sequence.slot is None or not self._make_room(sequence, 1):
                continue
            packet.rows.append(self._send(sequence, None, 1))

    def _add_chunk(self, packet: Packet, microbatch: list[Sequence], share: int) -> None:
        tile = self.sizes.tile
        tiles_left = self.sizes.max_chunk // tile
        while tiles_left and (sequence := self.prefilling or self._admit()):
            first = sequence.next_position
            count = min(sequence.prefill_until - first, tiles_left * tile)
            ends = first + count == sequence.prefill_until
            if (ends and len(microbatch) >= share) or not self._make_room(sequence, count):
                return  # it continues in a later packet, and no younger prompt overtakes it
            for start in range(first, first + count, tile):
                tokens = sequence.tokens[start : min(start + tile, first + count)]
                packet.tiles.append(self._send(sequence, tokens, len(tokens)))
                tiles_left -= 1
            self.pages.publish(sequence)
            if ends:
                self.prefilling = None
                insort(microbatch, sequence, key=_arrival)

    def _admit(self) -> Sequence | None:
        """Makes the oldest waiting sequence live if there is a slot and there are enough pages."""
        if not self.waiting or not self._free_slots:
            return None
        sequence = self.waiting[0]
        found = self.pages.find(sequence)
        live = sum(self.pool.num_owners(page) > 0 for page in found)
        if self.pool.num_free < self._pages_to_begin(sequence) - live:
            return None
        self.waiting.popleft()
        sequence.slot = self._free_slots.pop()
        sequence.next_position = self.pages.begin(sequence, found)
        sequence.prompt_sent = max(sequence.prompt_sent, sequence.next_position)
        sequence.prefill_until = len(sequence.tokens)
        if not sequence.epoch:  # otherwise it was preempted, and finds what it computed itself
            sequence.num_cached = sequence.next_position
            self.num_cached_tokens += sequence.num_cached
        self.prefilling = sequence
        return sequence

    def share(self) -> int:
        """Maximum rows of a microbatch, the newest prompt included: ceil(n / M), where n sequences
        are live or could be at once. A burst then does not fill one microbatch and leave others
        empty."""
        live, pages = self.num_running, self.pool.num_free
        if self.prefilling:
            pages -= self._pages_to_begin(self.prefilling) - len(self.prefilling.pages)
        for sequence in islice(self.waiting, len(self._free_slots)):
            pages -= self._pages_to_begin(sequence)
            if pages < 0:
                break
            live += 1
        return min(-(-live // len(self.microbatches)), self.sizes.max_rows)

    def _pages_to_begin(self, sequence: Sequence) -> int:
        # Room for one token more than the prompt, if another will be written: a sequence preempted
        # after its first token would have been computed in vain.
        return self.pages.count(min(len(sequence.tokens) + 1, sequence.max_length - 1))

    def _send(self, sequence: Sequence, tokens: list[int] | None, count: int) -> Segment:
        assert sequence.slot is not None
        position = sequence.next_position
        sequence.next_position += count
        # What is computed again after a preemption does not count again.
        new = min(sequence.next_position, sequence.num_prompt) - sequence.prompt_sent
        if new > 0:
            sequence.prompt_sent += new
            self.num_prompt_tokens += new
        ends = tokens is None or sequence.next_position == sequence.prefill_until
        return Segment(sequence, sequence.epoch, sequence.slot, position, tokens, ends)

    # --- pages -------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Gives a sequence the pages for its next `count` tokens, preempting younger sequences.

        Returns False if there are still too few; a decoding sequence is then preempted itself.
        """
        while True:
            missing = self.pages.missing(sequence, sequence.next_position + count)
            if missing <= self.pool.num_free:
                break
            victim = self._youngest()
            if victim is sequence and sequence.prefilling:
                return False  # it keeps its pages and waits for more
            self._preempt(victim)
            if victim is sequence:
                return False
        self.pages.extend(sequence, missing)
        return True

    def _youngest(self) -> Sequence:
        return self.prefilling or max(chain(*self.microbatches), key=_arrival)

    def _preempt(self, sequence: Sequence) -> None:
        sequence.epoch += 1
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        """Takes back a sequence's slot, pages and row; no-op if it has none."""
        if sequence.slot is None:
            return
        if sequence is self.prefilling:
            self.prefilling = None
        for microbatch in self.microbatches:
            if sequence in microbatch:
                microbatch.remove(sequence)
        self.pages.release(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = None

    def _finish(self, sequence: Sequence) -> None:
        sequence.epoch += 1
        sequence.finished = True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)
        del self._sequences[sequence.request_id]

    # --- results -----------------------------------------------------------------------------

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
            if segment.epoch == sequence.epoch:
                output = self._take_token(sequence, tokens[index])
                wanted = sequence.params.logprobs
                if logprobs is not None and wanted is not None and output.token is not None:
                    output = output._replace(
                        logprobs=TokenLogprobs(
                            logprobs[index].logprob, logprobs[index].top[:wanted]
                        )
                    )
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
        sequence.tokens.append(token)
        self.num_generated_tokens += 1
        reason: FinishReason | None = None
        if token in sequence.stop_ids:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.max_length:
            reason = "length"
        if reason:
            self._finish(sequence)
        elif sequence.slot is not None:
            self.pages.publish(sequence)
        return Output(
            sequence.request_id,
            token,
            reason,
            cached_tokens=sequence.num_cached,
            queue_seconds=sequence.queue_seconds,
        )


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
