"""Exact batches of a tick, as `--calibrate` times them: `rows@context + chunk@prefix`.

Imports no JAX.
"""

import re
from typing import NamedTuple

from llama_jax.costs.work import Work
from llama_jax.ring.sizes import Bucket, RingSizes
from sharding.errors import UserError

FORM = re.compile(r"(\d+)@(\d+)(?:\+(\d+)@(\d+))?")


class BatchError(UserError):
    """A batch that cannot be timed."""


class Batch(NamedTuple):
    """What every packet in the ring holds while a tick is timed.

    Attributes:
      rows: decode rows.
      context: the keys that each row attends to, its own included.
      chunk: prompt tokens of one sequence.
      prefix: the tokens of the prompt before them.
    """

    rows: int
    context: int
    chunk: int = 0
    prefix: int = 0

    @classmethod
    def parse(cls, text: str) -> "Batch":
        """Parses "8@512", "8@512+64@0" or "0@0+64@128"; spaces do not count.

        Raises:
          BatchError: it has another form, or is empty.
        """
        match = FORM.fullmatch(re.sub(r"\s", "", text))
        numbers = [int(number or 0) for number in match.groups()] if match else [0] * 4
        batch = cls(*numbers)
        if batch.rows + batch.chunk == 0 or (batch.rows > 0) != (batch.context > 0):
            raise BatchError(
                f"{text!r} is no batch: write rows@context, such as 8@512, or "
                "rows@context+chunk@prefix, such as 8@512+64@0."
            )
        return batch

    def __str__(self) -> str:
        rows = f"{self.rows}@{self.context}"
        return f"{rows}+{self.chunk}@{self.prefix}" if self.chunk else rows

    def pages(self, sizes: RingSizes) -> int:
        """The pages that its sequences hold together."""
        size = sizes.page_size
        return self.rows * -(-self.context // size) + -(-(self.prefix + self.chunk) // size)

    def bucket(self, sizes: RingSizes) -> Bucket:
        """The program that runs it.

        Raises:
          BatchError: an engine of these sizes cannot hold the batch.
        """
        longest = max(self.context, self.prefix + self.chunk)
        limits = (
            ("rows", self.rows, sizes.max_rows),
            ("prompt tokens", self.chunk, sizes.max_chunk),
            ("tokens in a sequence", longest, sizes.pages_per_sequence * sizes.page_size),
            ("pages", self.pages(sizes), sizes.num_pages),
        )
        for what, needed, most in limits:
            if needed > most:
                raise BatchError(
                    f"The batch {self} has {needed} {what}, but the engine has room for {most}: "
                    "make it smaller, or give the engine more."
                )
        return sizes.bucket(self.rows, self.chunk)

    def work(self, sizes: RingSizes) -> Work:
        """The work of the program that runs it, on one stage."""
        bucket = self.bucket(sizes)
        own = Work.of(bucket.rows, 0, self.chunk, self.prefix, sizes.tile)
        return own._replace(chunk=bucket.chunk, row_keys=self.rows * self.context)


def grid(sizes: RingSizes, contexts: tuple[int, ...]) -> list[Batch]:
    """Batches that show what ticks of an engine take: every program, full, at each context.

    Each chunk is timed as the beginning of a prompt, and once more after a long prefix. Contexts
    that do not fit are shortened to what does.
    """
    found: dict[Batch, None] = {}  # a set that keeps the order
    longest = sizes.pages_per_sequence * sizes.page_size
    for rows, chunk in sizes.buckets():
        for number, context in enumerate(contexts):
            prefix = min(context, longest - chunk) if chunk and number else 0
            spare = sizes.num_pages - -(-(prefix + chunk) // sizes.page_size)
            fitting = min(context, longest, spare // rows * sizes.page_size)
            if fitting > 0 and prefix >= 0:
                found[Batch(rows, fitting, chunk, prefix)] = None
    return list(found)
