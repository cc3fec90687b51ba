"""The pool of KV-cache pages, and which of them hold the beginning of a known text."""

import struct
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b


def first_key(salt: bytes) -> bytes:
    """Returns the key before the first page of a text, for requests with this salt.

    The salt itself would not do: a client could name the key of a page, and its own first page
    would then pass for the next one of another text.
    """
    return blake2b(salt, digest_size=16, person=b"salt").digest()


def page_keys(parent: bytes, tokens: list[int], page_size: int) -> list[bytes]:
    """Returns the keys of full pages: each a hash of its tokens and of all tokens before it.

    A cryptographic hash, because two texts with one key would share their keys and values: a client
    who could find such a pair would read another's text.

    Args:
      parent: the key of the page before them; for the first page, `first_key`.
      tokens: the tokens of the pages.
      page_size: tokens of each page.
    """
    data, keys = struct.pack(f"{len(tokens)}i", *tokens), []
    width = page_size * struct.calcsize("i")
    for start in range(0, len(data), width):
        parent = blake2b(parent + data[start : start + width], digest_size=16).digest()
        keys.append(parent)
    return keys


class PagePool:
    """Hands out page numbers and takes them back. A page has the same number on every stage.

    A page may be reused as soon as the last packet that refers to it has *entered* the ring: the
    packets of its next owner enter later, so every stage sees them later. For the same reason a
    page may be shared as soon as the packet that fills it has entered.

    A full page can be published under the key of its content. Sequences that begin alike then
    share it. When the last of them gives it back it is free, but keeps its content until it is
    needed: pages without a key are taken first, then those that were given back longest ago.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._empty = list(range(num_pages - 1, -1, -1))  # a stack: freed last, reused first
        # Free, but with a key; given back longest ago first. The front of a dict that has lost many
        # is slow to find.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._owners = [0] * num_pages
        self._keys: list[bytes | None] = [None] * num_pages
        self._pages: dict[bytes, int] = {}  # by key

    @property
    def num_free(self) -> int:
        """Number of pages that nobody owns."""
        return len(self._empty) + len(self._kept)

    @property
    def num_cached(self) -> int:
        """Number of free pages that still hold a known text."""
        return len(self._kept)

    def num_owners(self, page: int) -> int:
        """Number of sequences that share a page."""
        return self._owners[page]

    def take(self, count: int) -> list[int]:
        """Takes free pages. Raises IndexError if there are too few: check `num_free` first."""
        empty, owners = self._empty, self._owners
        pages = [empty.pop() if empty else self._take_kept() for _ in range(count)]
        for page in pages:
            owners[page] = 1
        return pages

    def _take_kept(self) -> int:
        if not self._kept:
            raise IndexError("no page is free")
        page, _ = self._kept.popitem(last=False)
        self._forget(page)
        return page

    def give_back(self, pages: list[int]) -> None:
        """Gives up one share of each page. Raises ValueError for a page that is already free.

        Args:
          pages: of one sequence, in order.
        """
        # The last page first: what is evicted first should be the end of a text, not its beginning,
        # without which the rest cannot be found.
        owners, keys, empty, kept = self._owners, self._keys, self._empty, self._kept
        for page in reversed(pages):
            left = owners[page] - 1
            if left < 0:
                raise ValueError(f"Page {page} was given back twice: two sequences owned it.")
            owners[page] = left
            if left:
                continue
            if keys[page] is None:
                empty.append(page)
            else:
                kept[page] = None

    def publish(self, page: int, key: bytes) -> None:
        """Makes a full page known by its content; no-op if another page has the same content."""
        if self._keys[page] is None and key not in self._pages:
            self._keys[page], self._pages[key] = key, page

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Returns the published pages of the longest known beginning of a text."""
        pages = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: list[int]) -> None:
        """Adds an owner to each page, free or not."""
        for page in pages:
            self._kept.pop(page, None)
            self._owners[page] += 1

    def withdraw(self, keys: list[bytes]) -> None:
        """Takes back what was published under these keys; no-op for a key that is not known."""
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                continue
            self._forget(page)
            if page in self._kept:
                del self._kept[page]
                self._empty.append(page)

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None
        self._keys[page] = None
        del self._pages[key]
