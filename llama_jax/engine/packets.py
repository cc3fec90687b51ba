"""A packet on the host: what enters in one tick, and the record that its result is matched by."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

from llama_jax.engine.sequence import Sequence

Value = TypeVar("Value")


@dataclass(slots=True, eq=False)
class Segment:
    """Consecutive tokens of one sequence in a packet, as `llama_jax.ring.packet` encodes them.

    Attributes:
      sequence: the sequence.
      epoch: the sequence's epoch when the packet entered.
      slot: the sequence's slot when the packet entered.
      position: the position of the first token.
      tokens: prompt tokens; None for a decode row, whose one token only the device knows.
      ends: whether to sample the token that follows.
    """

    sequence: Sequence
    epoch: int
    slot: int
    position: int
    tokens: list[int] | None = None
    ends: bool = True

    @property
    def length(self) -> int:
        """Number of tokens."""
        return 1 if self.tokens is None else len(self.tokens)

    @property
    def current(self) -> bool:
        """Whether its result will count."""
        return self.epoch == self.sequence.epoch

    @property
    def targets(self) -> list[int]:
        """The prompt tokens that follow each of its tokens, if they are to be scored."""
        s, first = self.sequence, self.position + 1
        if s.scoring is None or not self.current:
            return []
        return s.tokens[first : min(first + self.length, s.num_prompt)]


@dataclass(slots=True)
class Packet:
    """The tokens that enter in one tick, kept to match the packet's result to sequences later.

    There are many decode rows, and the host spends time on each. So they are kept as columns, which
    packets of the same sequences share; `rows` makes segments of them.

    Attributes:
      decoding: the sequences of the decode rows.
      epochs, slots, positions: of the decode rows, as in `Segment`.
      row_keys: the keys that the decode rows attend to, all rows together.
      tiles: the segments with prompt tokens.
    """

    decoding: list[Sequence] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    row_keys: int = 0
    tiles: list[Segment] = field(default_factory=list)

    @property
    def rows(self) -> list[Segment]:
        """The decode rows as segments."""
        return list(map(Segment, self.decoding, self.epochs, self.slots, self.positions))

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all segments."""
        rows = len(self.decoding)
        return rows + sum([tile.length for tile in self.tiles]) if self.tiles else rows

    def results(self, bucket_rows: int) -> Iterable[tuple[int, Segment]]:
        """The segments whose next token is sampled, each with its index in the tick's result."""
        ends = [(bucket_rows + i, tile) for i, tile in enumerate(self.tiles) if tile.ends]
        return chain(enumerate(self.rows), ends)

    def deal(self, values: list[Value], bucket_rows: int) -> Iterable[tuple[Sequence, int, Value]]:
        """As `results`, but the sequence, the epoch and the value of each of these segments.

        Args:
          values: one for each segment of the program that ran.
          bucket_rows: decode rows of that program.
        """
        rows = zip(self.decoding, self.epochs, values, strict=False)
        if not self.tiles:
            return rows
        ends = [
            (tile.sequence, tile.epoch, values[bucket_rows + i])
            for i, tile in enumerate(self.tiles)
            if tile.ends
        ]
        return chain(rows, ends)

    def __bool__(self) -> bool:
        return bool(self.decoding or self.tiles)
