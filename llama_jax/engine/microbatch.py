"""A microbatch: the sequences whose decode rows share a packet."""

from typing import SupportsIndex

from llama_jax.engine.sequence import Sequence


class Microbatch(list[Sequence]):
    """Sequences that decode in the same packet, the most important first.

    Every rotation of the ring sends one row of each. Few rotations change who is there, so what
    follows from that is kept until a sequence comes or goes.

    Attributes:
      keys: the sum of their next positions, which is the number of keys that the rows of their last
        packet attended to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.keys = 0
        self._columns: tuple[list[Sequence], list[int], list[int]] | None = None

    def insert(self, index: SupportsIndex, sequence: Sequence) -> None:
        """Adds a sequence that decodes."""
        super().insert(index, sequence)
        self.keys += sequence.next_position
        self._columns = None

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence."""
        super().remove(sequence)
        self.keys -= sequence.next_position
        self._columns = None

    def columns(self) -> tuple[list[Sequence], list[int], list[int]]:
        """The sequences, their epochs and their slots: the same lists while nothing changes."""
        if self._columns is None:
            slots = [sequence.slot for sequence in self if sequence.slot is not None]
            self._columns = self.copy(), [sequence.epoch for sequence in self], slots
            assert len(slots) == len(self), "a sequence without a slot decodes"
        return self._columns

    def advance(self) -> list[int]:
        """Moves every sequence on by one token; returns the positions of these tokens."""
        positions = [sequence.next_position for sequence in self]
        for sequence in self:
            sequence.next_position += 1
        self.keys += len(positions)
        return positions
