"""The page pool: which pages of the KV cache are free."""


class PagePool:
    """Hands out page numbers and takes them back. The same number names a page on every stage.

    A page may be given away as soon as the last packet that refers to it has *entered* the ring:
    the next owner's packets enter later, so each stage sees them later. Nothing is waited for.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page used last comes first
        self._taken = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def take(self) -> int:
        """A free page. Raises IndexError where there is none: ask `num_free` first."""
        page = self._free.pop()
        self._taken[page] = 1
        return page

    def give_back(self, pages: list[int]) -> None:
        """Frees pages. Raises ValueError for one that is free already."""
        for page in pages:
            if not self._taken[page]:
                raise ValueError(f"Page {page} is given back twice: two sequences own it.")
            self._taken[page] = 0
            self._free.append(page)
