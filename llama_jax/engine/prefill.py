"""Chooses the prompt tokens of each packet: which prompts begin, and how they share the chunk."""

from itertools import islice

from llama_jax.engine.chunk_choice import ChunkChoice, Load
from llama_jax.engine.interface import WaitReason
from llama_jax.engine.packets import Packet
from llama_jax.engine.roster import Roster
from llama_jax.engine.sequence import Sequence
from llama_jax.ring.sizes import RingSizes

MANY_PROMPTS = 32  # more make no difference to the size of the chunk
SHORT_CHUNKS = 8  # a prompt that needs no more chunks than this may overtake a long one


class Prefill:
    """Fills the chunk of each packet.

    Prompts are prefilled one after the other, the most important first, and small ones share a
    chunk. There is one exception. While the first prompt needs more than one chunk, a short prompt
    may overtake it and those that wait: it takes up to half of each chunk. So a short prompt waits
    for other short ones, but not for the end of a long one, and the long one keeps at least half.
    `docs/ring.md` states the bound.

    Args:
      sizes: the sizes of the ring.
      roster: the sequences.
      chunks: chooses the size of each chunk; None for the largest.

    Attributes:
      chunks: the same.
      most_running: sequences that may be live in this tick. With more, even ticks without a chunk
        would take longer than the target for output tokens allows.
    """

    def __init__(self, sizes: RingSizes, roster: Roster, chunks: ChunkChoice | None = None):
        self._sizes = sizes
        self._roster = roster
        self.chunks = chunks
        self._odd = True
        self._share = 0  # rows that the microbatch of this tick may have
        self.most_running = sizes.num_slots

    def make_room(self, sequence: Sequence) -> None:
        """Gives the first prompt pages for its next chunk, preempting less important sequences.

        Call it before any of these is in the packet that enters.
        """
        self._roster.make_room(sequence, min(self._left(sequence), self._sizes.max_chunk))

    def fill(self, packet: Packet, microbatch: list[Sequence], now: float = 0.0) -> None:
        """Adds a chunk to a packet, after `begin_tick`.

        Args:
          packet: the packet that enters, with its rows.
          microbatch: the sequences of this packet; a prompt that ends here joins them.
          now: as in `begin_tick`.
        """
        self._odd = not self._odd
        if not self._roster.prefilling and not self._roster.waiting:
            return
        chunk = self._chunk(now)
        tiles_left = chunk // self._sizes.tile
        first = self._first()
        if first is not None and self._left(first) > chunk:
            # Of an odd number of tiles, the half is rounded up in every other tick.
            aside = (tiles_left + self._odd) // 2
            while aside and (short := self._short()):
                sent = self._send(packet, microbatch, short, aside)
                if not sent:
                    break
                aside, tiles_left = aside - sent, tiles_left - sent
        while tiles_left and (sequence := self._first()):
            sent = self._send(packet, microbatch, sequence, tiles_left)
            if not sent:
                return  # it continues in a later packet
            tiles_left -= sent

    def begin_tick(self, now: float) -> None:
        """Finds how many sequences may be live in this tick, and how many rows in its packet.

        Call it before anything is given to or taken from a sequence in this tick.

        Args:
          now: the time by the clock of `arrived_at`.
        """
        waiting = self._roster.waiting
        self.most_running = self._most_running(now) if waiting else self._sizes.num_slots
        self._share = self._rows_to_share()

    def _rows_to_share(self) -> int:
        """Maximum rows of a microbatch, the newest prompt included: ceil(n / M), where n sequences
        are live or could be at once. A burst then does not fill one microbatch and leave others
        empty."""
        roster, live = self._roster, self._roster.num_live
        if roster.waiting:
            pages = self._unreserved_pages()
            for sequence in islice(roster.waiting, self._room):
                pages -= self._pages_to_begin(sequence)
                if pages < 0:
                    break
                live += 1
        return min(-(-live // len(roster.microbatches)), self._sizes.max_rows)

    def wait_reason(self) -> WaitReason | None:
        """What the next sequence in line waits for; None if nobody waits."""
        roster = self._roster
        if not roster.waiting:
            return None
        if not roster.free_slots:
            return "slot"
        if not self._room:
            return "target"
        sequence = roster.waiting[0]
        fits = self._fits(sequence, roster.pages.find(sequence), self._unreserved_pages())
        return "prefill" if fits else "pages"

    def _send(
        self, packet: Packet, microbatch: list[Sequence], sequence: Sequence, max_tiles: int
    ) -> int:
        """Adds a prompt's next tokens to a packet; returns the number of tiles.

        It is 0 if there are no pages, or if the prompt would end in a packet without a row for it.
        """
        tile = self._sizes.tile
        first = sequence.next_position
        count = min(self._left(sequence), max_tiles * tile)
        ends = first + count == sequence.prefill_until
        # No sequence is preempted here: this packet may hold a row or a tile of it.
        if (ends and len(microbatch) >= self._share) or not self._roster.extend(sequence, count):
            return 0
        packet.tiles += self._roster.send(sequence, count, tile)
        self._roster.pages.publish(sequence)
        if ends:
            self._roster.join(sequence, microbatch)
        return -(-count // tile)

    @property
    def chunk_limit(self) -> int:
        """The largest chunk that may enter now."""
        return self._sizes.max_chunk if self.chunks is None else self.chunks.limit(self._load(0.0))

    def _chunk(self, now: float) -> int:
        """The size of the chunk that enters now."""
        sizes = self._sizes
        if self.chunks is None or len(sizes.chunk_buckets) <= 2:
            return sizes.max_chunk
        load = self._load(now)
        return self.chunks.choose(load) if load.prompts else sizes.max_chunk

    def _load(self, now: float) -> Load:
        """What there is to do now."""
        roster = self._roster
        prefilling, microbatches = roster.prefilling, roster.microbatches
        prompts = prefilling
        if roster.waiting:
            prompts = prefilling + roster.waiting[: min(self._room, MANY_PROMPTS)]
        tokens, waits = 0, []
        for s in prompts:
            known = len(s.tokens)
            tokens += known if s.slot is None else s.prefill_until - s.next_position
            if known == s.num_prompt:  # others have had their first token
                waits.append((tokens, now - s.arrived_at))
        rows = [len(microbatch) for microbatch in microbatches]
        return Load(
            num_stages=len(rows),
            prompts=len(prompts),
            tokens=tokens,
            streams=sum(rows),
            rows=max(rows),
            keys=max([microbatch.keys for microbatch in microbatches]),
            prefix=prefilling[0].next_position if prefilling else 0,
            waits=waits,
        )

    @property
    def _room(self) -> int:
        """The sequences that may begin now: free slots, as far as the targets allow."""
        roster = self._roster
        return min(len(roster.free_slots), max(0, self.most_running - roster.num_live))

    def _most_running(self, now: float) -> int:
        """See `most_running`. The limit yields while the next prompt would be late otherwise."""
        roster, chunks, slots = self._roster, self.chunks, self._sizes.num_slots
        if chunks is None or chunks.tpot is None:
            return slots
        num_stages, first = len(roster.microbatches), roster.waiting[0]
        keys = len(first.tokens) + sum([len(s.tokens) for s in roster.prefilling])
        keys += sum([microbatch.keys for microbatch in roster.microbatches])
        rows = chunks.most_rows(num_stages, keys / (1 + roster.num_live))
        if rows >= self._sizes.max_rows:
            return slots
        is_new = len(first.tokens) == first.num_prompt  # others have had their first token
        if is_new and chunks.is_late(num_stages, len(first.tokens), now - first.arrived_at):
            return slots
        return num_stages * rows

    def _first(self) -> Sequence | None:
        """The prompt that is prefilled now, or else the next in line if it can begin."""
        roster = self._roster
        if roster.prefilling:
            return roster.prefilling[0]
        if not roster.waiting or not self._room:
            return None
        sequence = roster.waiting[0]
        found = roster.pages.find(sequence)
        if not self._fits(sequence, found, roster.pool.num_free):
            return None
        roster.begin(sequence, found)
        return sequence

    def _short(self) -> Sequence | None:
        """The short prompt that shares the chunk with the first, if there is one.

        A short prompt overtakes those that wait before it only if slots and pages suffice for them
        and for it, as well as for the prompt that is being prefilled.
        """
        roster = self._roster
        if len(roster.prefilling) != 1:
            return roster.prefilling[1] if roster.prefilling else None
        if not roster.waiting:
            return None
        first = roster.prefilling[0]
        longest = min(SHORT_CHUNKS * self._sizes.max_chunk, self._left(first) - 1)
        free = self._unreserved_pages()
        for sequence in islice(roster.waiting, self._room):
            found = roster.pages.find(sequence)
            if (
                len(sequence.tokens) - roster.pages.num_tokens(found) <= longest
                and self._fits(sequence, found, free)
                and not roster.pages.will_find_more(sequence, found, first)
            ):
                roster.begin(sequence, found)
                return sequence
            free -= self._pages_to_begin(sequence)
            if free < 0:
                return None
        return None

    def _left(self, sequence: Sequence) -> int:
        """The number of tokens that a live sequence still has to send until it decodes."""
        return sequence.prefill_until - sequence.next_position

    def _fits(self, sequence: Sequence, found: list[int], free: int) -> bool:
        """Whether a sequence can begin with this many free pages, given those that it found."""
        shared = sum(self._roster.pool.num_owners(page) > 0 for page in found)
        return self._pages_to_begin(sequence) - shared <= free

    def _pages_to_begin(self, sequence: Sequence) -> int:
        # Room for one token more than the prompt, if another will be written: a sequence preempted
        # after its first token would have been computed in vain.
        pages = self._roster.pages
        return pages.count(min(len(sequence.tokens) + 1, sequence.max_length - 1))

    def _unreserved_pages(self) -> int:
        """Free pages without those that the prompts being prefilled still need."""
        reserved = (self._pages_to_begin(s) - len(s.pages) for s in self._roster.prefilling)
        return self._roster.pool.num_free - sum(reserved)
