"""The pool of free KV-cache pages."""


class PagePool:
    """Hands out page numbers and takes them back. A page has the same number on every stage.

    A page may be reused as soon as the last packet that refers to it has *entered* the ring: the
    packets of its next owner enter later, so every stage sees them later.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: freed last, reused first
        self._taken = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def take(self) -> int:
        """Takes a free page. Raises IndexError if there is none: check `num_free` first."""
        page = self._free.pop()
        self._taken[page] = 1
        return page

    def give_back(self, pages: list[int]) -> None:
        """Frees pages. Raises ValueError for a page that is already free."""
        for page in pages:
            if not self._taken[page]:
                raise ValueError(f"Page {page} was given back twice: two sequences owned it.")
            self._taken[page] = 0
            self._free.append(page)
