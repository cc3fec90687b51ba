"""The sizes that are fixed while an engine lives: what scheduler and device agree on.

Imports no JAX.
"""

from dataclasses import dataclass
from typing import NamedTuple


class Bucket(NamedTuple):
    """The size of a compiled program: decode rows, and tokens of the prompt chunk (0: none)."""

    rows: int
    chunk: int


@dataclass(frozen=True)
class RingSizes:
    """The sizes that are fixed while an engine lives.

    Attributes:
      num_slots: sequences that may be live at once; slots are numbered `[0, num_slots)` and one
        more stands for nowhere.
      num_pages: pages of the pool; `num_pages` itself stands for nowhere.
      page_size: tokens in a page.
      pages_per_sequence: pages that the longest allowed sequence fills.
      row_buckets, chunk_buckets: ascending; a tick runs the smallest that fits. Chunks start at 0.
      tile: most tokens of a prompt segment; divides every chunk bucket.
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
        """Decode rows of the largest packet."""
        return self.row_buckets[-1]

    @property
    def max_chunk(self) -> int:
        """Prompt tokens of the largest packet."""
        return self.chunk_buckets[-1]

    @property
    def max_segments(self) -> int:
        """Rows and tiles of the largest packet."""
        return self.max_rows + self.max_chunk // self.tile

    def num_segments(self, bucket: Bucket) -> int:
        """Rows and tiles of a bucket: the tokens that it chooses."""
        return bucket.rows + bucket.chunk // self.tile

    def buckets(self) -> list[Bucket]:
        """Every program there is."""
        return [Bucket(rows, chunk) for chunk in self.chunk_buckets for rows in self.row_buckets]

    def bucket(self, rows: int, chunk: int) -> Bucket:
        """The smallest program for this many rows and chunk tokens."""
        return Bucket(
            next(size for size in self.row_buckets if size >= rows),
            next(size for size in self.chunk_buckets if size >= chunk),
        )
