"""The KV-cache pages of every live sequence, shared where texts begin alike (prefix caching)."""

from itertools import islice

import numpy as np

from llama_jax.engine.pages import PagePool, first_key, page_keys
from llama_jax.engine.sequence import Sequence
from llama_jax.ring.sizes import RingSizes


class PageTables:
    """Gives sequences their pages, and takes them back.

    Sequences that begin with the same tokens share the full pages of that beginning, whether they
    are live or have ended, as long as the pages were not needed for something else. So the next
    turn of a chat finds the turns before it, and a preempted sequence finds its own pages.

    Args:
      sizes: the sizes of the ring.
      prefix_caching: whether to share pages; if not, only sequences with the same salt do.

    Attributes:
      rows: `[num_slots, pages_per_sequence]` int32, the pages of each slot in order.
      pool: all pages.
    """

    def __init__(self, sizes: RingSizes, prefix_caching: bool):
        self.rows = np.zeros((sizes.num_slots, sizes.pages_per_sequence), np.int32)
        self.pool = PagePool(sizes.num_pages)
        self._page_size = sizes.page_size
        self._prefix_caching = prefix_caching

    def count(self, num_tokens: int) -> int:
        """Returns the number of pages that hold this many tokens."""
        return -(-num_tokens // self._page_size)

    def missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Returns how many pages a sequence lacks to hold this many tokens."""
        short = num_tokens - sequence.room
        return 0 if short <= 0 else self.count(short)

    def extend(self, sequence: Sequence, num_pages: int) -> None:
        """Gives a sequence free pages; the caller has checked that there are enough."""
        self._append(sequence, self.pool.take(num_pages))

    def find(self, sequence: Sequence) -> list[int]:
        """Finds pages that hold its beginning, as far as it may skip it."""
        if not self._shares(sequence):
            return []
        num_pages = sequence.num_skippable // self._page_size
        return self.pool.find(islice(self._keys(sequence, num_pages), num_pages))

    def num_tokens(self, pages: list[int]) -> int:
        """Returns the number of tokens that full pages hold."""
        return len(pages) * self._page_size

    def will_find_more(self, sequence: Sequence, found: list[int], prefilling: Sequence) -> bool:
        """Whether `prefilling` is about to compute the page that follows those found."""
        ours, theirs = sequence.page_keys, prefilling.page_keys
        i = len(found)
        return i < min(len(ours), len(theirs)) and ours[i] == theirs[i]

    def begin(self, sequence: Sequence, found: list[int]) -> int:
        """Gives a sequence the pages that `find` found; returns the number of tokens in them."""
        if found:
            self.pool.share(found)
            self._append(sequence, found)
        return self.num_tokens(found)

    def publish(self, sequence: Sequence) -> None:
        """Lets others find its pages whose tokens are all known and have entered the ring."""
        tokens, sent = len(sequence.tokens), sequence.next_position
        known = (tokens if tokens < sent else sent) // self._page_size
        if known <= sequence.num_published:
            return
        if self._shares(sequence):
            keys, pages, publish = self._keys(sequence, known), sequence.pages, self.pool.publish
            for i in range(sequence.num_published, known):
                publish(pages[i], keys[i])
        sequence.num_published = known

    def release(self, sequence: Sequence) -> None:
        """Takes back its pages. Others find what they hold until they are needed."""
        self.publish(sequence)
        self.pool.give_back(sequence.pages)
        sequence.pages, sequence.num_published = [], 0
        sequence.room = 0

    def _shares(self, sequence: Sequence) -> bool:
        return self._prefix_caching or bool(sequence.salt)

    def _append(self, sequence: Sequence, pages: list[int]) -> None:
        first = len(sequence.pages)
        if len(pages) == 1:  # as for every row that goes on; NumPy takes longer for a slice
            self.rows[sequence.slot, first] = pages[0]
        else:
            self.rows[sequence.slot, first : first + len(pages)] = pages
        sequence.pages += pages
        sequence.room += len(pages) * self._page_size
        sequence.due = min(sequence.room, sequence.max_length - 2)

    def _keys(self, sequence: Sequence, num_pages: int) -> list[bytes]:
        """Returns the keys of its pages, these first ones among them; it computes the new ones."""
        keys, size = sequence.page_keys, self._page_size
        known = len(keys)
        if known < num_pages:
            parent = keys[-1] if keys else first_key(sequence.salt)
            keys += page_keys(parent, sequence.tokens[known * size : num_pages * size], size)
        return keys
