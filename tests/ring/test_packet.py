"""The format of a packet: `encode_packet` writes it, plain Python and `decode_packet` read it."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.ring.packet import decode_packet, encode_packet, packet_size, segments_of
from llama_jax.ring.sizes import Bucket, RingSizes
from llama_jax.ring.steps import init_state, state_shapes
from sharding.mesh import make_mesh
from tests.support.mock_executor import Run, read_packet
from tests.support.programs import CONFIG

SIZES = RingSizes(
    num_slots=8,
    num_pages=20,
    page_size=4,
    pages_per_sequence=5,
    row_buckets=(1, 2, 4),
    chunk_buckets=(0, 3, 6, 12),
    tile=3,
)
NOWHERE = Run(SIZES.num_slots, 0, 0, [SIZES.num_pages] * SIZES.pages_per_sequence, None)

slots = st.integers(0, SIZES.num_slots - 1)
positions = st.integers(0, SIZES.page_size * SIZES.pages_per_sequence - 1)
tokens = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=SIZES.tile)


@st.composite
def packets(draw):
    bucket = draw(st.sampled_from(SIZES.buckets()))
    tables = np.arange(SIZES.num_slots * SIZES.pages_per_sequence, dtype=np.int32)
    tables = (tables * 7 % SIZES.num_pages).reshape(SIZES.num_slots, -1)
    rows = draw(st.lists(st.tuples(slots, positions), max_size=bucket.rows))
    tile = st.tuples(slots, positions, st.booleans(), tokens)
    tiles = draw(st.lists(tile, max_size=bucket.chunk // SIZES.tile))
    return bucket, tables, rows, tiles


def expected(tables, rows, tiles):
    """The segments that are not empty."""
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
    packed = encode_packet(SIZES, bucket, tables, *zip_rows(rows), tiles)
    assert packed.dtype == np.int32 and packed.shape == (packet_size(SIZES, bucket),)
    read_rows, read_tiles = read_packet(SIZES, bucket, packed)
    want_rows, want_tiles = expected(tables, rows, tiles)
    assert read_rows == pad(want_rows, bucket.rows, None)
    assert read_tiles == pad(want_tiles, bucket.chunk // SIZES.tile, [])


@given(packets(), st.data())
def test_decode_blanks_segments_beyond_the_bucket(packet, data):
    """A later stage may run a larger program, which must find nothing beyond the packet."""
    bucket, tables, rows, tiles = packet
    packed = encode_packet(SIZES, bucket, tables, *zip_rows(rows), tiles)
    full, prompt = map(np.asarray, decode_packet(SIZES, bucket, packed))
    assert full.shape == (SIZES.max_segments, 3 + SIZES.pages_per_sequence)
    assert prompt.tolist() == packed[len(packed) - bucket.chunk :].tolist()

    larger = data.draw(
        st.sampled_from(
            [b for b in SIZES.buckets() if b.rows >= bucket.rows and b.chunk >= bucket.chunk]
        )
    )
    segments = np.asarray(segments_of(SIZES, larger, full)).tolist()
    want_rows, want_tiles = expected(tables, rows, tiles)
    want = pad(want_rows, larger.rows, None) + pad(want_tiles, larger.chunk // SIZES.tile, None)
    assert segments == [[run.slot, run.position, run.length, *run.pages] for run in want]


def test_the_ring_starts_with_empty_packets():
    shapes = state_shapes(CONFIG, make_mesh("2x1"), SIZES, jnp.dtype(jnp.float32))
    found = np.asarray(init_state(shapes, SIZES).ring.metadata)
    empty = [NOWHERE.slot, 0, 0, *NOWHERE.pages]
    assert found.tolist() == [[empty] * SIZES.max_segments] * 2


def test_the_bucket_is_the_smallest_that_fits():
    assert SIZES.bucket(1, 0) == Bucket(1, 0)
    assert SIZES.bucket(3, 1) == Bucket(4, 3)
    assert SIZES.bucket(2, 12) == Bucket(2, 12)
    with pytest.raises(IndexError):
        SIZES.bucket(5, 0)


def zip_rows(rows):
    return [slot for slot, _ in rows], [position for _, position in rows]
