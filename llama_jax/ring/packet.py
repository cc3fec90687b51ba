"""A packet as it goes to the device: one int32 array, written by the host, read by the step.

A packet is a list of segments: runs of consecutive tokens of one sequence. A decode row is a
segment of one token; a chunk of prompt tokens is cut into tiles of up to `tile` tokens, each a
segment, so that short prompts share a chunk. A packet for `Bucket(rows, chunk)` holds

    segments `[rows + chunk / tile, 3 + pages_per_sequence]`: slot, position, length, pages...
    tokens   `[chunk]`: the prompt tokens of the tiles (a row's token is on the device already)

flattened and laid end to end.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.ring.sizes import Bucket, RingSizes

SLOT, POSITION, LENGTH, PAGES = 0, 1, 2, 3  # columns of a segment


def encode_packet(
    sizes: RingSizes,
    bucket: Bucket,
    page_tables: np.ndarray,
    row_slots: Sequence[int],
    row_positions: Sequence[int],
    tiles: Sequence[tuple[int, int, bool, Sequence[int]]],
) -> np.ndarray:
    """Writes a packet.

    Args:
      sizes, bucket: the sizes; rows and tiles must fit the bucket.
      page_tables: `[num_slots, pages_per_sequence]` int32, by slot, as they are now: the packet
        takes a snapshot.
      row_slots, row_positions: the decode rows: slot, and position of the token to be read.
      tiles: (slot, position of the first token, whether the prompt ends here, tokens). Only a tile
        that ends its prompt has its next token kept.

    Returns:
      int32, flat.
    """
    packed = np.zeros(packet_size(sizes, bucket), np.int32)
    segments, tokens = _views(sizes, bucket, packed)
    segments[:, SLOT] = sizes.num_slots
    segments[:, PAGES:] = sizes.num_pages
    n = len(row_slots)
    if n:
        segments[:n, SLOT] = row_slots
        segments[:n, POSITION] = row_positions
        segments[:n, LENGTH] = 1
        segments[:n, PAGES:] = page_tables[row_slots]
    for i, (slot, position, ends, ids) in enumerate(tiles):
        segment = segments[bucket.rows + i]
        segment[SLOT] = slot if ends else sizes.num_slots
        segment[POSITION] = position
        segment[LENGTH] = len(ids)
        segment[PAGES:] = page_tables[slot]
        tokens[i * sizes.tile : i * sizes.tile + len(ids)] = ids
    return packed


def decode_packet(
    sizes: RingSizes, bucket: Bucket, packed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Reads a packet on the device: all segments `[max_segments, width]`, and tokens `[chunk]`.

    Segments that the bucket has no room for are filled in as empty: what an earlier packet left in
    their place must not be run again by a later stage's larger program.
    """
    segments, tokens = _views(sizes, bucket, packed)
    empty = np.zeros((sizes.max_segments, segment_width(sizes)), np.int32)
    empty[:, SLOT] = sizes.num_slots
    empty[:, PAGES:] = sizes.num_pages
    rows, tiles = segments[: bucket.rows], segments[bucket.rows :]
    full = jnp.asarray(empty).at[: bucket.rows].set(rows)
    return full.at[sizes.max_rows : sizes.max_rows + len(tiles)].set(tiles), tokens


def segments_of(sizes: RingSizes, bucket: Bucket, full: jax.Array) -> jax.Array:
    """The segments that a program of this bucket works on: `[num_segments, width]` of `full`."""
    tiles = sizes.max_rows + bucket.chunk // sizes.tile
    return jnp.concatenate([full[: bucket.rows], full[sizes.max_rows : tiles]])


def packet_size(sizes: RingSizes, bucket: Bucket) -> int:
    """int32 words of a packet."""
    return sizes.num_segments(bucket) * segment_width(sizes) + bucket.chunk


def segment_width(sizes: RingSizes) -> int:
    """int32 words of a segment."""
    return PAGES + sizes.pages_per_sequence


def _views(sizes: RingSizes, bucket: Bucket, packed):  # type: ignore[no-untyped-def]
    """Both parts of a packet: views of a NumPy array, slices of a JAX array."""
    width = segment_width(sizes)
    end = sizes.num_segments(bucket) * width
    return packed[:end].reshape(-1, width), packed[end:]
