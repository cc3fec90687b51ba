"""Text that may come from anyone, made safe to print."""


def one_line(text: str) -> str:
    """Escapes what does not belong in one line: line breaks, control characters, surrogates."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
