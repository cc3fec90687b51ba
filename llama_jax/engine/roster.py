"""The unfinished sequences: those that wait, and those that are live with a slot and pages."""

from bisect import insort
from collections.abc import Iterator
from itertools import chain

from llama_jax.engine.microbatch import Microbatch
from llama_jax.engine.packets import Segment
from llama_jax.engine.page_tables import PageTables
from llama_jax.engine.pages import PagePool
from llama_jax.engine.sequence import Sequence
from llama_jax.ring.sizes import RingSizes


class Roster:
    """Who waits, who is live, and what each live sequence holds on the device.

    A live sequence has a slot and pages, and is either prefilling or in a microbatch. When pages
    run out, the least important live sequence gives up its own (preemption) and waits again; of
    equally important ones it is the youngest.

    Args:
      sizes: the sizes of the ring.
      num_microbatches: M, equal to the number of stages P.
      prefix_caching: whether sequences that begin alike share pages.

    Attributes:
      pages: the pages of the live sequences. A packet takes a snapshot of the rows that it needs.
      waiting: those that wait, the most important first.
      prefilling: live sequences whose prompt is not sent yet, the most important first.
      microbatches: live sequences that decode, each microbatch with the most important first.
      free_slots: slots that nobody holds.
      num_preemptions, num_prompt_tokens, num_cached_tokens: counts since the start; the cached
        tokens are those of the prompt tokens that were found in the pool.
    """

    def __init__(self, sizes: RingSizes, num_microbatches: int, prefix_caching: bool):
        self.pages = PageTables(sizes, prefix_caching)
        self.waiting: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.microbatches = [Microbatch() for _ in range(num_microbatches)]
        self.free_slots = list(range(sizes.num_slots - 1, -1, -1))
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self._num_slots = sizes.num_slots

    @property
    def pool(self) -> PagePool:
        """All pages of the KV cache."""
        return self.pages.pool

    @property
    def num_live(self) -> int:
        """Number of sequences that have a slot."""
        return self._num_slots - len(self.free_slots)

    @property
    def live(self) -> Iterator[Sequence]:
        """The sequences that have a slot."""
        return chain(self.prefilling, *self.microbatches)

    def with_first_prompt(self, microbatch: list[Sequence]) -> list[Sequence]:
        """A microbatch and the first prompt that is prefilling, in order of importance."""
        sequences = list(microbatch)
        for sequence in self.prefilling[:1]:
            insort(sequences, sequence, key=_rank)
        return sequences

    def wait(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue, behind those that are as important and older."""
        insort(self.waiting, sequence, key=_rank)

    def begin(self, sequence: Sequence, found: list[int]) -> None:
        """Makes a waiting sequence live. `found` are the pages that hold its beginning."""
        self.waiting.remove(sequence)
        sequence.slot = self.free_slots.pop()
        sequence.next_position = self.pages.begin(sequence, found)
        sequence.prefill_until = len(sequence.tokens)
        # What a preempted sequence has computed itself does not count.
        new = min(sequence.next_position, sequence.num_prompt) - sequence.prompt_sent
        if new > 0:
            sequence.prompt_sent += new
            self.num_cached_tokens += new
        if not sequence.epoch:
            sequence.num_cached = sequence.next_position
        insort(self.prefilling, sequence, key=_rank)

    def join(self, sequence: Sequence, microbatch: list[Sequence]) -> None:
        """Moves a sequence whose prompt has been sent into its microbatch."""
        self.prefilling.remove(sequence)
        insort(microbatch, sequence, key=_rank)

    def send(self, sequence: Sequence, count: int, tile: int) -> list[Segment]:
        """Returns the segments with a prompt's next `count` tokens, and counts them as sent."""
        slot, first = sequence.slot, sequence.next_position
        assert slot is not None
        end = sequence.next_position = first + count
        # What is computed again after a preemption does not count again.
        new = min(sequence.next_position, sequence.num_prompt) - sequence.prompt_sent
        if new > 0:
            sequence.prompt_sent += new
            self.num_prompt_tokens += new
        epoch, tokens, last = sequence.epoch, sequence.tokens, end == sequence.prefill_until
        return [
            Segment(
                sequence, epoch, slot, start, tokens[start : min(start + tile, end)],
                last and start + tile >= end,
            )
            for start in range(first, end, tile)
        ]  # fmt: skip

    def make_room(self, sequence: Sequence, count: int) -> bool:
        """Gives a sequence the pages for its next `count` tokens, preempting less important ones.

        Returns False if there are still too few; a decoding sequence is then preempted itself.
        """
        while not self.extend(sequence, count):
            victim = max(self.live, key=_rank)
            if victim is sequence and sequence.prefilling:
                return False  # it keeps its pages and waits for more
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def extend(self, sequence: Sequence, count: int) -> bool:
        """Gives a sequence the pages for its next `count` tokens, if so many are free."""
        missing = self.pages.missing(sequence, sequence.next_position + count)
        if not missing:
            return True
        if missing > self.pool.num_free:
            return False
        self.pages.extend(sequence, missing)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Takes everything from a live sequence; what it has sent is computed again later."""
        sequence.epoch += 1
        self.release(sequence)
        self.wait(sequence)
        self.num_preemptions += 1

    def release(self, sequence: Sequence) -> None:
        """Takes back a sequence's slot, pages and row; no-op if it has none."""
        if sequence.slot is None:
            return
        groups: list[list[Sequence]] = [self.prefilling, *self.microbatches]
        for group in groups:
            if sequence in group:
                group.remove(sequence)
        self.pages.release(sequence)
        self.free_slots.append(sequence.slot)
        sequence.slot = None

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence that has ended, wherever it is."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self.release(sequence)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.params.priority, sequence.arrival
