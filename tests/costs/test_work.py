"""The work of a tick, counted one query, key and tile at a time."""

from hypothesis import given
from hypothesis import strategies as st

from llama_jax.costs.work import Work
from llama_jax.ring.sizes import TILE


@given(st.integers(0, 9), st.integers(0, 300), st.integers(0, 5), st.integers(0, 200))
def test_the_work_is_what_is_counted(rows, context, tiles, prefix):
    chunk = TILE * tiles
    work = Work.of(rows, context, chunk, prefix)
    assert work.row_keys == sum(context for _ in range(rows))
    # A query attends to itself and to all tokens before it; a tile reads up to its last token.
    assert work.chunk_pairs == sum(prefix + query + 1 for query in range(chunk))
    assert work.chunk_keys == sum(prefix + last for last in range(TILE, chunk + 1, TILE))
    assert work.tokens == rows + chunk and work.segments == rows + tiles
    ragged = Work.of(rows, context, chunk + 1, prefix)
    assert ragged.segments == rows + tiles + 1
