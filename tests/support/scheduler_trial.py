"""A scheduler driven by hand, with a ring, a host that reads late, and checks of invariants."""

from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import chain

from llama_jax.config.sampling_params import SamplingParams
from llama_jax.engine.packets import Packet
from llama_jax.engine.scheduler import Scheduler
from llama_jax.ring.packet import encode_packet
from llama_jax.ring.sizes import RingSizes
from tests.support.mock_executor import MockExecutor, generate


def make_sizes(*, num_pages, page_size=4, max_rows=2, stages=2, tile=4, tiles=1, max_len=40):
    return RingSizes(
        num_slots=max_rows * stages,
        num_pages=num_pages,
        page_size=page_size,
        pages_per_sequence=-(-max_len // page_size),
        row_buckets=(max_rows,),
        chunk_buckets=(0, tile * tiles),
        tile=tile,
    )


def numbered(length: int, first: int = 0) -> list[int]:
    """A prompt whose answer is not NaN."""
    return [14 + (first + i) % 30 for i in range(length)]


@dataclass
class Request:
    """One request of a trace. `arrival` and `abort` are ticks; it is never aborted if None."""

    prompt: list[int]
    max_tokens: int
    arrival: int = 0
    abort: int | None = None
    stop_ids: frozenset[int] = frozenset()
    salt: bytes = b""
    priority: int = 0

    @property
    def max_length(self) -> int:
        return len(self.prompt) + self.max_tokens

    @property
    def answer(self) -> tuple[list[int], str]:
        return generate(self.prompt, self.max_length, self.stop_ids)


@dataclass
class Trial:
    """A scheduler, a ring, and a host that reads results late.

    Attributes:
      late: how many results may stay unread, for each tick in turn.
    """

    sizes: RingSizes
    stages: int
    late: list[int] = field(default_factory=lambda: [0])
    prefix_caching: bool = True
    tick: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, tuple[str, int]] = field(default_factory=dict)  # reason, tick

    def __post_init__(self):
        self.scheduler = Scheduler(self.sizes, self.stages, prefix_caching=self.prefix_caching)
        self.executor = MockExecutor(self.sizes, self.stages)
        self.ring = deque([Packet()] * self.stages, maxlen=self.stages)
        self.unread: deque = deque()
        self.packets: list[Packet] = []
        self.sent: dict[tuple[int, int], int] = {}  # (arrival, epoch) -> next position
        self.ranks: list[tuple[int, int]] = []  # by arrival: priority, arrival
        self.prompt_lengths: list[int] = []  # by arrival
        self.prompt_ends: list[int] = []  # by arrival: tokens sent or found so far
        self.computed = 0  # prompt tokens sent for the first time
        self.cached_tokens = 0  # that did not have to be sent, over all admissions

    def add(self, request_id: int, request: Request, max_model_len: int = 1000) -> None:
        self.scheduler.add(
            request_id,
            request.prompt,
            SamplingParams(temperature=0, max_tokens=request.max_tokens, priority=request.priority),
            max_model_len=max_model_len,
            seed=0,
            stop_ids=request.stop_ids,
            salt=request.salt,
            arrived_at=self.tick,
        )
        self.tokens[request_id] = []
        self.ranks.append((request.priority, len(self.ranks)))
        self.prompt_lengths.append(len(request.prompt))
        self.prompt_ends.append(0)

    def abort(self, request_id: int) -> None:
        self.scheduler.abort(request_id)
        self.ended.setdefault(request_id, ("abort", self.tick))
        self.check_memory()

    def step(self) -> Packet:
        scheduler = self.scheduler
        microbatch = scheduler.microbatches[self.tick % self.stages]
        free_before, half_sent = scheduler.pool.num_free, self.half_sent
        share = self.share()
        packet = scheduler.schedule(self.tick)
        room = share - self.joined(packet, microbatch)
        assert room >= 0 or not any(t.ends for t in packet.tiles), "a microbatch above its share"
        self.check_packet(packet)
        self.check_consecutive(packet, half_sent, free_before, room)
        self.check_memory()
        self.dispatch(packet)
        while len(self.unread) > self.late[self.tick % len(self.late)]:
            self.read()
        self.check_memory()
        self.tick += 1
        return packet

    def dispatch(self, packet: Packet) -> None:
        self.packets.append(packet)
        self.ring.append(packet)
        rows = max(len(p.rows) for p in self.ring)
        tiles = max(len(p.tiles) for p in self.ring)
        bucket = self.sizes.bucket(rows, tiles * self.sizes.tile)
        packed = encode_packet(
            self.sizes,
            bucket,
            self.scheduler.page_tables,
            [s.slot for s in packet.rows],
            [s.position for s in packet.rows],
            [(s.slot, s.position, s.ends, s.tokens) for s in packet.tiles],
        )
        result = self.executor.run(bucket, packed)
        self.unread.append((self.ring[0], result))

    def read(self) -> None:
        packet, result = self.unread.popleft()
        bucket_rows = result.bucket.rows
        for output in self.scheduler.process(packet, result.tokens.tolist(), bucket_rows):
            assert output.request_id not in self.ended, "an output after the end"
            if output.token is not None:
                self.tokens[output.request_id].append(output.token)
            if output.finish_reason:
                self.ended[output.request_id] = (output.finish_reason, self.tick)

    def drain(self, max_ticks: int = 10_000) -> None:
        """Runs until nothing is left to do."""
        for _ in range(max_ticks):
            if not (self.scheduler.has_work or any(self.ring)):
                break
            self.step()
        while self.unread:
            self.read()
        assert not self.scheduler.has_work and self.scheduler.num_unfinished == 0
        assert self.scheduler.pool.num_free == self.sizes.num_pages
        assert self.scheduler.num_running == 0

    @property
    def live(self):
        return [*self.scheduler.prefilling, *chain(*self.scheduler.microbatches)]

    @property
    def half_sent(self):
        """(sequence, epoch) of the most important prompt, if it is partly sent."""
        first = self.scheduler.prefilling[:1]
        return [(s, s.epoch) for s in first if (s.arrival, s.epoch) in self.sent]

    def rank(self, sequence) -> tuple[int, int]:
        return self.ranks[sequence.arrival]

    # --- invariants --------------------------------------------------------------------------

    def check_memory(self) -> None:
        """No slot has two owners, no page or slot leaks, and the page tables match the pages."""
        scheduler, size, live = self.scheduler, self.sizes.page_size, self.live
        pool, num_pages = scheduler.pool, self.sizes.num_pages
        owned = Counter(page for s in live for page in s.pages)
        assert all(0 <= page < num_pages for page in owned)
        owners = [pool.num_owners(page) for page in range(num_pages)]
        assert owners == [owned.get(page, 0) for page in range(num_pages)], "owners do not add up"
        assert pool.num_free + len(owned) == num_pages, "a page is leaked"
        contents: dict[int, list[int]] = {}  # page -> all tokens up to its end
        for s in live:
            for i, page in enumerate(s.pages):
                if owned[page] > 1:
                    assert len(s.tokens) >= (i + 1) * size, "a page is shared before it is full"
                    tokens = s.tokens[: (i + 1) * size]
                    assert contents.setdefault(page, tokens) == tokens, "another text's page"
        slots = [s.slot for s in live]
        assert len(set(slots)) == len(slots) == scheduler.num_running, "slots do not add up"
        assert all(0 <= slot < self.sizes.num_slots for slot in slots)
        assert all(s.slot is None and not s.pages for s in scheduler.waiting)
        for s in live:
            assert scheduler.page_tables[s.slot, : len(s.pages)].tolist() == s.pages
            assert scheduler.num_answered(s.request_id) is not None, "it has ended"
        for group in (scheduler.waiting, scheduler.prefilling, *scheduler.microbatches):
            assert group == sorted(group, key=self.rank), "the order of importance"
        for microbatch in scheduler.microbatches:
            assert microbatch.keys == sum(s.next_position for s in microbatch)
        assert len(scheduler.prefilling) <= 2

    def check_packet(self, packet: Packet) -> None:
        sizes = self.sizes
        assert len(packet.rows) <= sizes.max_rows
        assert len(packet.tiles) * sizes.tile <= sizes.max_chunk
        assert all(0 < s.length <= sizes.tile for s in packet.tiles)
        assert packet.row_keys == sum(row.position + 1 for row in packet.rows)
        written: dict[int, int] = {}  # page -> the request that this packet writes it for
        for segment in chain(packet.rows, packet.tiles):
            s = segment.sequence
            end = segment.position + segment.length
            first = segment.position // sizes.page_size
            pages = self.scheduler.page_tables[segment.slot, first : -(-end // sizes.page_size)]
            for page in pages.tolist():
                assert written.setdefault(page, s.request_id) == s.request_id, "written by two"
            key = (s.arrival, segment.epoch)
            if key not in self.sent:
                assert segment.position % sizes.page_size == 0, "it begins inside a page"
                self.cached_tokens += segment.position
            else:
                assert segment.position == self.sent[key], "tokens are left out or sent again"
            self.sent[key] = end
            first = max(segment.position, self.prompt_ends[s.arrival])
            self.computed += max(0, min(end, self.prompt_lengths[s.arrival]) - first)
            self.prompt_ends[s.arrival] = max(end, first)
            assert segment.epoch == s.epoch, "preempted by its own packet"
            assert end < s.max_length, "sent beyond its length limit"
            assert segment.ends == (segment.tokens is None or end == s.prefill_until)
            assert s.slot is not None or s.fully_sent
        rows = [row.sequence for row in packet.rows]
        assert len(set(rows)) == len(rows)
        assert self.scheduler.num_prompt_tokens == self.computed
        for (
            s
        ) in self.live:  # what it found counts as found, even if it is preempted before it sends
            self.prompt_ends[s.arrival] = max(self.prompt_ends[s.arrival], s.next_position)

    def check_consecutive(self, packet: Packet, half_sent, free_before: int, room: int) -> None:
        """The next chunk of the first prompt enters in the next tick, if there are pages for it.

        Only the last chunk may wait, until a microbatch has a row for it. A short prompt leaves it
        half of each chunk; if a chunk is one tile, every other one.
        """
        sizes = self.sizes
        taken = sum(row.position % sizes.page_size == 0 for row in packet.rows)
        for s, epoch in half_sent:
            if s.epoch != epoch or any(tile.sequence is s for tile in packet.tiles):
                continue
            left = s.prefill_until - s.next_position
            if sizes.max_chunk == sizes.tile and packet.tiles and self.tick % 2:
                continue
            ahead = [*(t.sequence for t in packet.tiles), *self.scheduler.prefilling]
            if any(self.rank(other) < self.rank(s) for other in ahead):
                continue  # a short prompt that is more important goes first, or waits for a row
            end = s.next_position + min(left, sizes.max_chunk)
            no_pages = -(-end // sizes.page_size) - len(s.pages) > free_before - taken
            no_row = left <= sizes.max_chunk and room <= 0
            assert no_pages or no_row, "a gap between two chunks"

    def share(self) -> int:
        """The rows of a microbatch below which a prompt may join: ceil(live sequences / P). A
        waiting sequence counts as live if slots and pages suffice for it now, in order."""
        sizes, free = self.sizes, self.scheduler.pool.num_free

        def missing(s) -> int:
            return -(-min(len(s.tokens) + 1, s.max_length - 1) // sizes.page_size) - len(s.pages)

        live = len(self.live)
        free -= sum(map(missing, self.scheduler.prefilling))
        for s in self.scheduler.waiting:
            free -= missing(s)
            if free < 0 or live == sizes.num_slots:
                break
            live += 1
        return min(-(-live // self.stages), sizes.max_rows)

    def joined(self, packet: Packet, microbatch) -> int:
        """The rows of a microbatch, including those that this packet finished sending."""
        sent_off = {s.sequence for s in packet.rows + packet.tiles if s.sequence.slot is None}
        return len(microbatch) + len(sent_off)
