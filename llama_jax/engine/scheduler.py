"""Which tokens enter the ring in each tick.

The scheduler is a plain data structure: no clock, no device, no thread. The engine drives it in
production, a simulator for planning, and property-based tests. Each tick it is asked for one
packet, the one that enters stage 0; what the packet brings is told to it when somebody has read it,
any number of ticks later.

Live sequences each own a slot. Decode rows belong to one of M = P microbatches, the packets that
go round; a prompt's chunks enter in consecutive ticks, in whichever packet passes, and the packet
with the last chunk becomes the sequence's microbatch.
"""

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.errors import QueueFull, RequestError
from llama_jax.engine.interface import FinishReason, Output
from llama_jax.engine.pages import PagePool
from llama_jax.engine.sequence import Sequence
from llama_jax.ring.sizes import RingSizes

NOT_A_NUMBER = "The model's output is not a number (NaN) for this request: check the weights."


@dataclass(slots=True)
class Segment:
    """A run of one sequence's tokens in a packet, as `llama_jax.ring.packet` encodes it.

    Attributes:
      sequence, epoch: whose it is, and the epoch in which it was sent.
      slot: the sequence's slot then.
      position: of the first token.
      tokens: prompt tokens; None for a decode row, whose one token only the device knows.
      ends: whether the token that follows is wanted.
    """

    sequence: Sequence
    epoch: int
    slot: int
    position: int
    tokens: list[int] | None = None
    ends: bool = True

    @property
    def length(self) -> int:
        """Tokens in it."""
        return 1 if self.tokens is None else len(self.tokens)


@dataclass(slots=True)
class Packet:
    """What enters in one tick, and the record by which its result is understood later."""

    rows: list[Segment] = field(default_factory=list)
    tiles: list[Segment] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens in all segments."""
        return len(self.rows) + sum(tile.length for tile in self.tiles)

    def results(self, bucket_rows: int) -> list[tuple[int, Segment]]:
        """The segments whose next token is wanted, each with its place in the tick's result."""
        ends = [(bucket_rows + i, tile) for i, tile in enumerate(self.tiles) if tile.ends]
        return [*enumerate(self.rows), *ends]

    def __bool__(self) -> bool:
        return bool(self.rows or self.tiles)


class Scheduler:
    """Continuous batching over M microbatches and a pool of pages.

    First come, first served: every live sequence is older than every waiting one. Where pages run
    out, the youngest live sequence gives up its own (preemption) and is computed again later, so
    the oldest always gets on, and every request ends.

    Attributes:
      page_tables: `[num_slots, pages_per_sequence]` int32, the pages of each slot in order; a
        packet takes a snapshot of the rows it needs.
    """

    def __init__(self, sizes: RingSizes, num_microbatches: int, max_queue: int):
        self.sizes = sizes
        self.pool = PagePool(sizes.num_pages)
        self.page_tables = np.zeros((sizes.num_slots, sizes.pages_per_sequence), np.int32)
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None  # one prompt at a time; it is the youngest
        # In order of arrival, each.
        self.microbatches: list[list[Sequence]] = [[] for _ in range(num_microbatches)]
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self._max_queue = max_queue
        self._free_slots = list(range(sizes.num_slots - 1, -1, -1))
        self._sequences: dict[int, Sequence] = {}  # by request id, until they are finished
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
    ) -> None:
        """Queues a request.

        Raises:
          RequestError: it can never fit, or its id is taken.
          QueueFull: as many requests wait as may.
        """
        if request_id in self._sequences:
            raise RequestError(f"Request id {request_id} is taken by a request in flight.")
        if not prompt:
            raise RequestError("The prompt is empty: send at least one token.")
        if len(prompt) >= max_model_len:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens, and the context of {max_model_len} must "
                "hold at least one more: shorten the prompt."
            )
        wanted = max_model_len if params.max_tokens is None else len(prompt) + params.max_tokens
        max_length = min(wanted, max_model_len)
        if self._pages_for(max_length - 1) > self.sizes.num_pages:
            raise RequestError(
                f"Prompt and answer of {max_length} tokens can never fit the KV cache of "
                f"{self.sizes.num_pages * self.sizes.page_size} tokens: ask for fewer."
            )
        if len(self.waiting) >= self._max_queue:
            raise QueueFull(f"{len(self.waiting)} requests are waiting: try again later.")
        sequence = Sequence(
            request_id, self._arrivals, list(prompt), max_length, params, seed, stop_ids
        )
        self._arrivals += 1
        self._sequences[request_id] = sequence
        self.waiting.append(sequence)
        self.num_prompt_tokens += len(prompt)

    def abort(self, request_id: int) -> None:
        """Forgets a request; one that is unknown or finished is no error, aborts cross the end."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._finish(sequence)

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot."""
        return self.sizes.num_slots - len(self._free_slots)

    @property
    def num_unfinished(self) -> int:
        """Requests whose last token is not known yet, waiting and running."""
        return len(self._sequences)

    @property
    def has_work(self) -> bool:
        """Whether a packet could hold anything, now or when pages are free again."""
        return bool(self.waiting or self.prefilling or any(self.microbatches))

    # --- one tick ----------------------------------------------------------------------------

    def schedule(self) -> Packet:
        """The packet that enters now; empty where there is nothing to do."""
        microbatch = self.microbatches[self._turn]
        self._turn = (self._turn + 1) % len(self.microbatches)
        packet = Packet()
        share = self.share()
        self._add_rows(packet, microbatch)
        self._add_chunk(packet, microbatch, share)
        # What a sequence held is free once its last packet has entered, though the result is not
        # known yet. Not earlier: this packet must not write over what it reads itself.
        for sequence in [s for s in microbatch if s.fully_sent]:
            self._release(sequence)
        return packet

    def _add_rows(self, packet: Packet, microbatch: list[Sequence]) -> None:
        # Oldest first: whoever is preempted for a page is younger, so not in the packet yet.
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
                return  # it goes on in a later packet, and nobody overtakes it
            for start in range(first, first + count, tile):
                tokens = sequence.tokens[start : min(start + tile, first + count)]
                packet.tiles.append(self._send(sequence, tokens, len(tokens)))
                tiles_left -= 1
            if ends:
                self.prefilling = None
                insort(microbatch, sequence, key=_arrival)

    def _admit(self) -> Sequence | None:
        """Makes the oldest waiting sequence live, if there is a slot and there are pages for it."""
        if not self.waiting or not self._free_slots:
            return None
        sequence = self.waiting[0]
        if self.pool.num_free < self._pages_to_begin(sequence):
            return None
        self.waiting.popleft()
        sequence.slot = self._free_slots.pop()
        sequence.next_position = 0
        sequence.prefill_until = len(sequence.tokens)
        self.prefilling = sequence
        return sequence

    def share(self) -> int:
        """Most rows of a microbatch that a prompt may join, so that a burst does not fill one and
        leave the others empty: its part of the sequences that are live or can be at once."""
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
        # One token more than the prompt, where there will be one: to be preempted after the very
        # first token would be a waste.
        return self._pages_for(min(len(sequence.tokens) + 1, sequence.max_length - 1))

    def _send(self, sequence: Sequence, tokens: list[int] | None, count: int) -> Segment:
        assert sequence.slot is not None
        position = sequence.next_position
        sequence.next_position += count
        ends = tokens is None or sequence.next_position == sequence.prefill_until
        return Segment(sequence, sequence.epoch, sequence.slot, position, tokens, ends)

    # --- pages -------------------------------------------------------------------------------

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.sizes.page_size)

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Gives a sequence the pages for its next `count` tokens, preempting younger ones for it.

        False where that is not enough; a decoding sequence is then preempted itself.
        """
        while True:
            missing = self._pages_for(sequence.next_position + count) - len(sequence.pages)
            if missing <= self.pool.num_free:
                break
            victim = self._youngest()
            if victim is sequence and sequence.prefilling:
                return False  # it has only begun: it waits for pages where it stands
            self._preempt(victim)
            if victim is sequence:
                return False
        for _ in range(missing):
            page = self.pool.take()
            self.page_tables[sequence.slot, len(sequence.pages)] = page
            sequence.pages.append(page)
        return True

    def _youngest(self) -> Sequence:
        return self.prefilling or max(chain(*self.microbatches), key=_arrival)

    def _preempt(self, sequence: Sequence) -> None:
        sequence.epoch += 1
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        """Takes back slot, pages and row, as far as the sequence has them."""
        if sequence.slot is None:
            return
        if sequence is self.prefilling:
            self.prefilling = None
        for microbatch in self.microbatches:
            if sequence in microbatch:
                microbatch.remove(sequence)
        self.pool.give_back(sequence.pages)
        self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], None

    def _finish(self, sequence: Sequence) -> None:
        sequence.epoch += 1
        sequence.finished = True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)
        del self._sequences[sequence.request_id]

    # --- results -----------------------------------------------------------------------------

    def process(self, packet: Packet, tokens: list[int], bucket_rows: int) -> list[Output]:
        """Takes in what a packet brought.

        Args:
          packet: as `schedule` returned it, P - 1 or more ticks ago.
          tokens: one a segment of the program that ran when the packet left; negative for "not a
            number".
          bucket_rows: decode rows of that program; the tiles' tokens come after them.

        Returns:
          What to tell the client. Tokens of sequences that have ended, or have been preempted,
          since the packet entered are dropped.
        """
        outputs = []
        for index, segment in packet.results(bucket_rows):
            sequence = segment.sequence
            if segment.epoch == sequence.epoch:
                outputs.append(self._take_token(sequence, tokens[index]))
        return outputs

    def _take_token(self, sequence: Sequence, token: int) -> Output:
        if token < 0:
            self._finish(sequence)
            return Output(sequence.request_id, None, "error", NOT_A_NUMBER)
        sequence.tokens.append(token)
        self.num_generated_tokens += 1
        reason: FinishReason | None = None
        if token in sequence.stop_ids:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.max_length:
            reason = "length"
        if reason:
            self._finish(sequence)
        return Output(sequence.request_id, token, reason)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
