"""Standard output and error that cannot fail, for programs that must outlive their readers."""

import errno
import io
import os
import sys
from typing import Any, TextIO


class _Tolerant(io.FileIO):
    """A file whose writes never fail: what cannot be written is lost."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Writes bytes; returns their number even if they are lost."""
        try:
            written = super().write(data)
            if written is not None:
                return written
            self.error = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        except OSError as error:  # closed, full, or a reader that has gone
            self.error = error
        return memoryview(data).nbytes


def protect_output() -> None:
    """Makes stdout and stderr accept any text, whatever has happened to their readers.

    They may be closed, on a full disk, a pipe or terminal whose other end has gone, or in an
    encoding that lacks a character. Call it first in a program. It leaves streams alone that a test
    or a notebook has put in their place.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # or the next file or socket to be opened would get this number
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _protected(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _protected(2, sys.stderr)


def output_error() -> OSError | None:
    """Flushes stdout; returns the error by which some of it was lost since `protect_output`."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Tolerant) else None


def _protected(number: int, stream: TextIO | None) -> io.TextIOWrapper:
    """A stream like `stream`, which is None if it was closed, on a file descriptor."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Tolerant(number, "w", closefd=False)),
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=stream is None or getattr(stream, "line_buffering", True),
        write_through=getattr(stream, "write_through", False),
    )
