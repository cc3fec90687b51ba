"""The work of one tick on one stage. Imports no JAX."""

from typing import NamedTuple

from llama_jax.ring.sizes import TILE


class Work(NamedTuple):
    """What one stage computes in a tick, in the sizes of the program that runs.

    Attributes:
      rows: decode rows of the program, empty ones included.
      chunk: prompt tokens that the program has room for; 0 for none.
      row_keys: the keys that the rows attend to, all rows together.
      chunk_pairs: pairs of a query and a key in the chunk.
      chunk_keys: the keys that the tiles of the chunk read, all tiles together.
    """

    rows: int
    chunk: int = 0
    row_keys: float = 0
    chunk_pairs: float = 0
    chunk_keys: float = 0

    @property
    def tokens(self) -> int:
        """The tokens that every matrix is multiplied by."""
        return self.rows + self.chunk

    @property
    def segments(self) -> int:
        """Rows and tiles: each gets a next token."""
        return self.rows - (-self.chunk // TILE)

    @classmethod
    def of(
        cls, rows: int, context: float = 0, chunk: int = 0, prefix: float = 0, tile: int = TILE
    ) -> "Work":
        """The work of rows with the same context, and of a chunk of one prompt after a prefix."""
        tiles = -(-chunk // tile)
        return cls(
            rows=rows,
            chunk=chunk,
            row_keys=rows * context,
            chunk_pairs=chunk * (prefix + (chunk + 1) / 2),
            chunk_keys=tiles * (prefix + tile * (tiles + 1) / 2),
        )
