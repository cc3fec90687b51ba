"""The sizes that the scheduler and the compiled programs share. Imports no JAX."""

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

TILE = 64  # tokens of a prompt segment; every chunk bucket is a multiple


class Bucket(NamedTuple):
    """The size of a compiled program: decode rows, and tokens of the prompt chunk (0 for none)."""

    rows: int
    chunk: int


@dataclass(frozen=True)
class RingSizes:
    """The sizes of the ring, fixed for the lifetime of an engine.

    Attributes:
      num_slots: maximum number of live sequences, in slots `[0, num_slots)`; slot `num_slots`
        means none.
      num_pages: pages in the pool; page `num_pages` means none.
      page_size: tokens per KV-cache page.
      pages_per_sequence: pages of the longest possible sequence.
      row_buckets: numbers of decode rows to compile programs for, ascending.
      chunk_buckets: numbers of prompt tokens to compile programs for, ascending from 0 (no chunk).
      tile: maximum tokens per prompt segment; divides every chunk bucket.
    """

    num_slots: int
    num_pages: int
    page_size: int
    pages_per_sequence: int
    row_buckets: tuple[int, ...]
    chunk_buckets: tuple[int, ...]
    tile: int

    @property
    def max_rows(self) -> int:
        """Decode rows in the largest packet."""
        return self.row_buckets[-1]

    @property
    def max_chunk(self) -> int:
        """Prompt tokens in the largest packet."""
        return self.chunk_buckets[-1]

    @property
    def max_segments(self) -> int:
        """Segments (rows and tiles) in the largest packet."""
        return self.max_rows + self.max_chunk // self.tile

    def num_segments(self, bucket: Bucket) -> int:
        """Segments (rows and tiles) in a bucket; each gets a next token."""
        return bucket.rows + bucket.chunk // self.tile

    def buckets(self) -> list[Bucket]:
        """The buckets of all programs."""
        return [Bucket(rows, chunk) for chunk in self.chunk_buckets for rows in self.row_buckets]

    def largest(self) -> list[Bucket]:
        """The largest bucket with a chunk, if there is one, and the largest without: one of them
        has room for every packet."""
        return [Bucket(self.max_rows, chunk) for chunk in sorted({self.max_chunk, 0}, reverse=True)]

    def bucket(self, rows: int, chunk: int, ready: Collection[Bucket] | None = None) -> Bucket:
        """The smallest bucket with room for this many rows and chunk tokens.

        Args:
          rows, chunk: what it must hold.
          ready: the buckets to choose from, the `largest` among them; None for all.
        """
        if ready is None:
            return Bucket(
                self.row_buckets[bisect_left(self.row_buckets, rows)],
                self.chunk_buckets[bisect_left(self.chunk_buckets, chunk)],
            )
        fitting = [bucket for bucket in ready if bucket.rows >= rows and bucket.chunk >= chunk]
        return min(fitting, key=lambda bucket: bucket.rows + bucket.chunk)
