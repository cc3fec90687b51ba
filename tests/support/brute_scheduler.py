"""The scheduler's decisions from first principles, without prefix caching.

It keeps one flat list of requests, and decides by sorting and filtering all of it. It counts pages
and slots without naming them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llama_jax.ring.sizes import RingSizes

SHORT_CHUNKS = 8


@dataclass
class Job:
    """A request: waiting, prefilling, or decoding in the microbatch `home`."""

    request_id: int
    rank: tuple[int, int]
    max_length: int
    state: str = "waiting"
    sent: int = 0
    until: int = 0
    pages: int = 0
    home: int = -1


class BruteScheduler:
    """Chooses the packets of `Scheduler`.

    Args:
      sizes: the sizes of the ring.
      stages: P.
      known: returns the number of tokens of a request that the host knows.
    """

    def __init__(self, sizes: RingSizes, stages: int, known: Callable[[int], int]) -> None:
        self.sizes, self.stages, self.known = sizes, stages, known
        self.jobs: list[Job] = []
        self.tick = 0
        self.victims: list[int] = []

    def schedule(self) -> tuple[list[tuple[int, int]], list[tuple[int, int, int]]]:
        """Rows as (request, position), and prompt segments as (request, position, length)."""
        home = self.tick % self.stages
        may_live = len(self.live) + len(self.able(self.free))
        share = min(-(-may_live // self.stages), self.sizes.max_rows)
        rows = []
        members = [*self.ranked("decoding", home), *self.ranked("prefilling")[:1]]
        for job in sorted(members, key=lambda job: job.rank):
            if job.state == "prefilling":
                self.take(job, min(job.until - job.sent, self.sizes.max_chunk))
            elif job.state == "decoding" and self.take(job, 1):
                rows.append((job.request_id, job.sent))
                job.sent += 1
        tiles = self.chunk(home, share)
        for job in self.ranked("decoding", home):
            if job.sent >= job.max_length - 1:
                self.jobs.remove(job)
        self.tick += 1
        return rows, tiles

    def chunk(self, home: int, share: int) -> list[tuple[int, int, int]]:
        tiles: list[tuple[int, int, int]] = []
        most = self.sizes.max_chunk // self.sizes.tile

        def send(job: Job, limit: int) -> bool:
            count = min(job.until - job.sent, limit * self.sizes.tile)
            ends = job.sent + count == job.until
            if ends and len(self.ranked("decoding", home)) >= share:
                return False
            missing = self.pages(job.sent + count) - job.pages
            if missing > self.free:
                return False
            job.pages += max(0, missing)
            for start in range(0, count, self.sizes.tile):
                length = min(self.sizes.tile, count - start)
                tiles.append((job.request_id, job.sent + start, length))
            job.sent += count
            if ends:
                job.state, job.home = "decoding", home
            return True

        first = self.first()
        if first and first.until - first.sent > self.sizes.max_chunk:
            aside = most // 2 if self.tick % 2 == 0 else (most + 1) // 2
            while len(tiles) < aside:
                short = self.short()
                if short is None or not send(short, aside - len(tiles)):
                    break
        while len(tiles) < most:
            first = self.first()
            if first is None or not send(first, most - len(tiles)):
                break
        return tiles

    def first(self) -> Job | None:
        if prefilling := self.ranked("prefilling"):
            return prefilling[0]
        able = self.able(self.free)
        return self.begin(able[0]) if able else None

    def short(self) -> Job | None:
        prefilling = self.ranked("prefilling")
        if len(prefilling) != 1:
            return prefilling[1] if prefilling else None
        left = prefilling[0].until - prefilling[0].sent
        for job in self.able(self.free):
            if self.known(job.request_id) <= min(SHORT_CHUNKS * self.sizes.max_chunk, left - 1):
                return self.begin(job)
        return None

    def able(self, free: int) -> list[Job]:
        """Those that could begin now, if each in line before them did, too."""
        free -= sum(self.to_begin(job) - job.pages for job in self.ranked("prefilling"))
        found = []
        for job in self.ranked("waiting")[: self.sizes.num_slots - len(self.live)]:
            free -= self.to_begin(job)
            if free < 0:
                break
            found.append(job)
        return found

    def begin(self, job: Job) -> Job:
        job.state, job.until = "prefilling", self.known(job.request_id)
        return job

    def take(self, job: Job, count: int) -> bool:
        while (missing := self.pages(job.sent + count) - job.pages) > self.free:
            victim = max(self.live, key=lambda other: other.rank)
            if victim is job and job.state == "prefilling":
                return False
            victim.state, victim.sent, victim.pages, victim.home = "waiting", 0, 0, -1
            self.victims.append(victim.request_id)
            if victim is job:
                return False
        job.pages += max(0, missing)
        return True

    def ranked(self, state: str, home: int = -1) -> list[Job]:
        chosen = [job for job in self.jobs if job.state == state and home in (-1, job.home)]
        return sorted(chosen, key=lambda job: job.rank)

    @property
    def live(self) -> list[Job]:
        return [job for job in self.jobs if job.state != "waiting"]

    @property
    def free(self) -> int:
        return self.sizes.num_pages - sum(job.pages for job in self.jobs)

    def pages(self, tokens: int) -> int:
        return -(-tokens // self.sizes.page_size)

    def to_begin(self, job: Job) -> int:
        return self.pages(min(self.known(job.request_id) + 1, job.max_length - 1))
