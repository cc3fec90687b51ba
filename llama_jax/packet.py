"""A packet as it goes to the device: one int32 array, written by the host, read by the step.

A packet is a list of segments: runs of consecutive tokens of one sequence. A decode row is a
segment of one token; a chunk of prompt tokens is cut into tiles of up to `tile` tokens, each a
segment, so that short prompts share a chunk. A packet for `Bucket(rows, chunk)` holds

    segments `[rows + chunk / tile, 3 + pages_per_sequence]`: slot, position, length, pages...
    tokens   `[chunk]`: the prompt tokens of the tiles (a row's token is on the device already)

flattened and laid end to end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SLOT, POSITION, LENGTH, PAGES = 0, 1, 2, 3  # columns of a segment


class Bucket(NamedTuple):
    """The size of a compiled program: decode rows, and tokens of the prompt chunk (0: none)."""

    rows: int
    chunk: int


@dataclass(frozen=True)
class Limits:
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
        return self.row_buckets[-1]

    @property
    def max_chunk(self) -> int:
        return self.chunk_buckets[-1]

    @property
    def segment_width(self) -> int:
        return PAGES + self.pages_per_sequence

    @property
    def max_segments(self) -> int:
        return self.max_rows + self.max_chunk // self.tile

    def num_segments(self, bucket: Bucket) -> int:
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


def encode(
    limits: Limits,
    bucket: Bucket,
    page_tables: np.ndarray,
    row_slots: Sequence[int],
    row_positions: Sequence[int],
    tiles: Sequence[tuple[int, int, bool, Sequence[int]]],
) -> np.ndarray:
    """Writes a packet.

    Args:
      limits, bucket: the sizes; rows and tiles must fit the bucket.
      page_tables: `[num_slots, pages_per_sequence]` int32, by slot, as they are now: the packet
        takes a snapshot.
      row_slots, row_positions: the decode rows: slot, and position of the token to be read.
      tiles: (slot, position of the first token, whether the prompt ends here, tokens). Only a tile
        that ends its prompt has its next token kept.

    Returns:
      int32, flat.
    """
    segments, tokens = _views(limits, bucket, packed := np.zeros(size(limits, bucket), np.int32))
    segments[:, SLOT] = limits.num_slots
    segments[:, PAGES:] = limits.num_pages
    n = len(row_slots)
    if n:
        segments[:n, SLOT] = row_slots
        segments[:n, POSITION] = row_positions
        segments[:n, LENGTH] = 1
        segments[:n, PAGES:] = page_tables[row_slots]
    for i, (slot, position, ends, ids) in enumerate(tiles):
        segment = segments[bucket.rows + i]
        segment[SLOT] = slot if ends else limits.num_slots
        segment[POSITION] = position
        segment[LENGTH] = len(ids)
        segment[PAGES:] = page_tables[slot]
        tokens[i * limits.tile : i * limits.tile + len(ids)] = ids
    return packed


def decode(limits: Limits, bucket: Bucket, packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reads a packet on the device: all segments `[max_segments, width]`, and tokens `[chunk]`.

    Segments that the bucket has no room for are filled in as empty: what an earlier packet left in
    their place must not be run again by a later stage's larger program.
    """
    segments, tokens = _views(limits, bucket, packed)
    nothing = np.zeros((limits.max_segments, limits.segment_width), np.int32)
    nothing[:, SLOT] = limits.num_slots
    nothing[:, PAGES:] = limits.num_pages
    rows, tiles = segments[: bucket.rows], segments[bucket.rows :]
    full = jnp.asarray(nothing).at[: bucket.rows].set(rows)
    return full.at[limits.max_rows : limits.max_rows + len(tiles)].set(tiles), tokens


def segments_of(limits: Limits, bucket: Bucket, full: jax.Array) -> jax.Array:
    """The segments that a program of this bucket works on: `[num_segments, width]` of `full`."""
    tiles = limits.max_rows + bucket.chunk // limits.tile
    return jnp.concatenate([full[: bucket.rows], full[limits.max_rows : tiles]])


def size(limits: Limits, bucket: Bucket) -> int:
    """int32 words of a packet."""
    return limits.num_segments(bucket) * limits.segment_width + bucket.chunk


def _views(limits: Limits, bucket: Bucket, packed):  # type: ignore[no-untyped-def]
    """Both parts of a packet: views of a NumPy array, slices of a JAX array."""
    end = limits.num_segments(bucket) * limits.segment_width
    return packed[:end].reshape(-1, limits.segment_width), packed[end:]
