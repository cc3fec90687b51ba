"""Exact batches, their packets, and the collectives that are timed over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.plan.machine.batches import Batch, BatchError, grid
from llama_jax.plan.machine.collectives import ALL_REDUCE, PPERMUTE, program, time_collective
from llama_jax.plan.machine.exact_ticks import packet
from llama_jax.ring.packet import LENGTH, PAGES, POSITION, SLOT, segment_width
from llama_jax.ring.sizes import Bucket, RingSizes
from sharding.mesh import make_mesh

SIZES = RingSizes(
    num_slots=32,
    num_pages=300,
    page_size=16,
    pages_per_sequence=64,
    row_buckets=(1, 2, 4, 8),
    chunk_buckets=(0, 64, 128),
    tile=64,
)


@pytest.mark.parametrize(
    ("text", "batch"),
    [
        ("8@512", Batch(8, 512)),
        ("8@512 + 64@128", Batch(8, 512, 64, 128)),
        ("0@0+100@0", Batch(0, 0, 100, 0)),
    ],
)
def test_batches_are_read(text, batch):
    assert Batch.parse(text) == batch == Batch.parse(str(batch))


@pytest.mark.parametrize("text", ["", "8", "8@0", "0@5", "8@512+64", "-1@5", "8@5+0@0@0", "0@0"])
def test_what_is_no_batch(text):
    with pytest.raises(BatchError):
        Batch.parse(text)


def test_a_batch_runs_in_the_program_with_room_for_it():
    batch = Batch(3, 100, 65, 10)
    assert batch.bucket(SIZES) == Bucket(4, 128)
    work = batch.work(SIZES)
    assert (work.rows, work.chunk, work.row_keys) == (4, 128, 300)
    assert batch.pages(SIZES) == 3 * 7 + 5  # each sequence has its own
    assert Batch(0, 0, 64, 0).bucket(SIZES) == Bucket(1, 64)


@pytest.mark.parametrize(
    "batch", [Batch(9, 16), Batch(1, 16, 129), Batch(1, 1025), Batch(1, 5, 64, 961), Batch(8, 800)]
)
def test_a_batch_that_does_not_fit(batch):
    with pytest.raises(BatchError):
        batch.bucket(SIZES)


def test_the_grid_covers_every_program_and_fits():
    batches = grid(SIZES, (128, 4096))
    assert {batch.bucket(SIZES) for batch in batches} == set(SIZES.buckets())
    assert len(set(batches)) == len(batches)
    # 8 rows of 4,096 keys do not fit into the pool: as many keys as do are timed instead.
    assert max(batch.context for batch in batches if batch.rows == 8) == 37 * 16


def test_a_packet_holds_exactly_the_batch():
    batch = Batch(3, 100, 70, 40)
    packed = packet(SIZES, batch)
    width, bucket = segment_width(SIZES), batch.bucket(SIZES)
    segments = packed[: SIZES.num_segments(bucket) * width].reshape(-1, width)
    rows, tiles = segments[: bucket.rows], segments[bucket.rows :]
    assert rows[:, SLOT].tolist() == [0, 1, 2, SIZES.num_slots]
    assert rows[:3, POSITION].tolist() == [99] * 3
    # No tile ends its prompt, so that none takes a slot.
    assert tiles[:, SLOT].tolist() == [SIZES.num_slots] * 2
    assert tiles[:, POSITION].tolist() == [40, 104] and tiles[:, LENGTH].tolist() == [64, 6]
    pages = segments[:, PAGES:]
    own = [row[row < SIZES.num_pages] for row in (*pages[:3], pages[bucket.rows])]
    assert [len(each) for each in own] == [7, 7, 7, 7]
    assert len(np.unique(np.concatenate(own))) == 28


@pytest.mark.parametrize(("kind", "name"), [(ALL_REDUCE, "all-reduce"), (PPERMUTE, "permute")])
def test_a_chain_has_as_many_collectives_as_asked(kind, name):
    mesh = make_mesh("4x2")
    shape = jax.ShapeDtypeStruct((8, 64), jnp.bfloat16)
    text = program(mesh, kind, 5).lower(shape).compile().as_text()
    lines = [line for line in text.splitlines() if f"{name}(" in line or f"{name}-start(" in line]
    assert len(lines) == 5


def test_collectives_are_timed_over_their_axis():
    mesh = make_mesh("4x2")
    reduce = time_collective(mesh, ALL_REDUCE, 4096, (1, 3), 0.0)
    hop = time_collective(mesh, PPERMUTE, 4096, (1, 3), 0.0)
    assert (reduce.ranks, hop.ranks) == (2, 4) and reduce.seconds > 0 and hop.seconds > 0
    assert time_collective(make_mesh("4x1"), ALL_REDUCE, 4096, (1, 3), 0.0) is None
