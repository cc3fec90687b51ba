"""A packet on its way to the devices: one int32 array, sent in the tick in which it enters.

A packet is a list of segments, each a run of consecutive tokens of one sequence. A decode row is a
segment of one token. A chunk of prompt tokens is cut into tiles of up to `tile` tokens, each a
segment, so that short prompts can share a chunk. A packet for `Bucket(rows, chunk)` consists of

    segments `[rows + chunk / tile, 3 + pages_per_sequence]`: slot, position, length, pages...
    tokens   `[chunk]`: the prompt tokens of the tiles (the tokens of rows are on the device)

flattened and concatenated.
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
    """Builds a packet on the host.

    Args:
      sizes, bucket: the sizes; rows and tiles must fit the bucket.
      page_tables: `[num_slots, pages_per_sequence]` int32, by slot; the packet keeps a copy.
      row_slots, row_positions: the slot of each decode row, and the position of its input token.
      tiles: (slot, position of the first token, whether the prompt ends here, tokens) of each tile.
        The next token is kept only if the prompt ends here.

    Returns:
      `[packet_size]` int32.
    """
    packed = np.zeros(packet_size(sizes, bucket), np.int32)
    segments, tokens = _views(sizes, bucket, packed)
    mark_empty(sizes, segments)
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
    """Reads a packet on the device.

    A later stage may run the packet in a program with a larger bucket, so the segments beyond the
    packet's own bucket are set to empty ones. Otherwise it would run those of an earlier packet.

    Returns:
      All segments `[max_segments, width]` int32, and the tokens `[chunk]` int32.
    """
    segments, tokens = _views(sizes, bucket, packed)
    empty = np.zeros((sizes.max_segments, segment_width(sizes)), np.int32)
    mark_empty(sizes, empty)
    rows, tiles = segments[: bucket.rows], segments[bucket.rows :]
    if sizes.max_segments in (len(rows), len(tiles)):
        # Nothing to fill up. `at[:].set` would pass `shard_map` an index of size 0, on which
        # XLA:CPU of jaxlib 0.11.2 crashes.
        return segments, tokens
    full = jnp.asarray(empty).at[: bucket.rows].set(rows)
    return full.at[sizes.max_rows : sizes.max_rows + len(tiles)].set(tiles), tokens


def segments_of(sizes: RingSizes, bucket: Bucket, full: jax.Array) -> jax.Array:
    """Selects the segments that a program with this bucket runs: `[num_segments, width]`."""
    tiles = sizes.max_rows + bucket.chunk // sizes.tile
    return jnp.concatenate([full[: bucket.rows], full[sizes.max_rows : tiles]])


def mark_empty(sizes: RingSizes, segments: np.ndarray) -> None:
    """Turns zeros `[..., width]` into empty segments, which write to no slot and no page."""
    segments[..., SLOT] = sizes.num_slots
    segments[..., PAGES:] = sizes.num_pages


def packet_size(sizes: RingSizes, bucket: Bucket) -> int:
    """Size of a packet, in int32 words."""
    return sizes.num_segments(bucket) * segment_width(sizes) + bucket.chunk


def segment_width(sizes: RingSizes) -> int:
    """Size of a segment, in int32 words."""
    return PAGES + sizes.pages_per_sequence


def _views(sizes: RingSizes, bucket: Bucket, packed):  # type: ignore[no-untyped-def]
    """The segments and the tokens of a packet: views of a NumPy array, or slices of a JAX array."""
    width = segment_width(sizes)
    end = sizes.num_segments(bucket) * width
    return packed[:end].reshape(-1, width), packed[end:]
