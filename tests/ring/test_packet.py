"""The format of a packet: written by `encode`, read in plain Python and by `decode`."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.ring.packet import decode_packet, encode_packet, packet_size, segments_of
from llama_jax.ring.sizes import Bucket, RingSizes
from tests.support.mock_executor import Run, read_packet

LIMITS = RingSizes(
    num_slots=8,
    num_pages=20,
    page_size=4,
    pages_per_sequence=5,
    row_buckets=(1, 2, 4),
    chunk_buckets=(0, 3, 6, 12),
    tile=3,
)
NOWHERE = Run(LIMITS.num_slots, 0, 0, [LIMITS.num_pages] * LIMITS.pages_per_sequence, None)

slots = st.integers(0, LIMITS.num_slots - 1)
positions = st.integers(0, LIMITS.page_size * LIMITS.pages_per_sequence - 1)
tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=LIMITS.tile)


@st.composite
def packets(draw):
    bucket = draw(st.sampled_from(LIMITS.buckets()))
    tables = np.arange(LIMITS.num_slots * LIMITS.pages_per_sequence, dtype=np.int32)
    tables = (tables * 7 % LIMITS.num_pages).reshape(LIMITS.num_slots, -1)
    rows = draw(st.lists(st.tuples(slots, positions), max_size=bucket.rows))
    tile = st.tuples(slots, positions, st.booleans(), tokens)
    tiles = draw(st.lists(tile, max_size=bucket.chunk // LIMITS.tile))
    return bucket, tables, rows, tiles


def expected(tables, rows, tiles):
    """What the segments should be, without those that are empty."""
    return (
        [Run(slot, position, 1, tables[slot].tolist(), None) for slot, position in rows],
        [
            Run(slot if ends else 8, position, len(ids), tables[slot].tolist(), ids)
            for slot, position, ends, ids in tiles
        ],
    )


def pad(runs: list[Run], count: int, empty_tokens) -> list[Run]:
    empty = Run(NOWHERE.slot, 0, 0, NOWHERE.pages, empty_tokens)
    return runs + [empty] * (count - len(runs))


@given(packets())
def test_encode_writes_the_documented_format(packet):
    bucket, tables, rows, tiles = packet
    packed = encode_packet(LIMITS, bucket, tables, *zip_rows(rows), tiles)
    assert packed.dtype == np.int32 and packed.shape == (packet_size(LIMITS, bucket),)
    read_rows, read_tiles = read_packet(LIMITS, bucket, packed)
    want_rows, want_tiles = expected(tables, rows, tiles)
    assert read_rows == pad(want_rows, bucket.rows, None)
    assert read_tiles == pad(want_tiles, bucket.chunk // LIMITS.tile, [])


@settings(deadline=None)
@given(packets(), st.data())
def test_decode_blanks_what_the_bucket_has_no_room_for(packet, data):
    """A later stage may run a larger program on this packet: it finds nothing beyond the packet."""
    bucket, tables, rows, tiles = packet
    packed = encode_packet(LIMITS, bucket, tables, *zip_rows(rows), tiles)
    full, prompt = map(np.asarray, decode_packet(LIMITS, bucket, packed))
    assert full.shape == (LIMITS.max_segments, 3 + LIMITS.pages_per_sequence)
    assert prompt.tolist() == packed[len(packed) - bucket.chunk :].tolist()

    larger = data.draw(
        st.sampled_from(
            [b for b in LIMITS.buckets() if b.rows >= bucket.rows and b.chunk >= bucket.chunk]
        )
    )
    segments = np.asarray(segments_of(LIMITS, larger, full)).tolist()
    want_rows, want_tiles = expected(tables, rows, tiles)
    want = pad(want_rows, larger.rows, None) + pad(want_tiles, larger.chunk // LIMITS.tile, None)
    assert segments == [[run.slot, run.position, run.length, *run.pages] for run in want]


def test_a_packet_keeps_the_page_table_that_it_entered_with():
    tables = np.zeros((LIMITS.num_slots, LIMITS.pages_per_sequence), np.int32)
    packed = encode_packet(LIMITS, Bucket(1, 3), tables, [2], [0], [(3, 0, True, [5])])
    tables[:] = 9
    rows, tiles = read_packet(LIMITS, Bucket(1, 3), packed)
    assert rows[0].pages == tiles[0].pages == [0] * LIMITS.pages_per_sequence


def test_the_bucket_is_the_smallest_that_fits():
    assert LIMITS.bucket(1, 0) == Bucket(1, 0)
    assert LIMITS.bucket(3, 1) == Bucket(4, 3)
    assert LIMITS.bucket(2, 12) == Bucket(2, 12)
    with pytest.raises(StopIteration):
        LIMITS.bucket(5, 0)


def zip_rows(rows):
    return [slot for slot, _ in rows], [position for _, position in rows]
