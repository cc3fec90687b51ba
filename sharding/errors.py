"""Errors that are meant for the user, and lists in their messages."""

from collections.abc import Sequence

# In a list of things.
_MAX_ITEMS = 4
_MAX_ITEM = 160  # characters
_MAX_CHARACTERS = 400


class UserError(ValueError):
    """An error that the user can fix.

    The message is one sentence: what is wrong, where, and what to do. A program prints it without a
    traceback; any other exception is a defect of the program.
    """


def list_text(items: Sequence[str], separator: str = ", ") -> str:
    """The first few of many things: "a, b, c, d, and 12 more". Fits in a message of one line.

    Long items are cut in the middle, and characters that do not print are escaped, since the names
    may come from a damaged file.
    """
    shown: list[str] = []
    for item in map(_printable, items[:_MAX_ITEMS]):
        if sum(map(len, shown)) + len(item) > _MAX_CHARACTERS:
            break
        shown.append(item)
    if len(shown) < len(items):
        shown.append(f"and {len(items) - len(shown):,} more")
    return separator.join(shown)


def _printable(item: str) -> str:
    half = _MAX_ITEM // 2
    if len(item) > _MAX_ITEM:
        item = f"{item[:half]}…{item[-half:]}"
    return item if item.isprintable() else repr(item)[1:-1][:_MAX_ITEM]
