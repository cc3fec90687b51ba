"""Where the lines of the logs go.

A thread of its own writes them, so that a reader of stderr that has stopped reading, or a slow
disk, never stops the event loop: what waits too long is lost, and their number is told.
"""

import logging
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from logging.handlers import WatchedFileHandler
from pathlib import Path

from llama_jax.terminal.one_line import one_line
from sharding.errors import UserError

LEVELS = ("debug", "info", "warning", "error")
REQUESTS = "llama_jax.serve.requests"  # the logger of one JSON object per request
STDERR = Path("-")
MAX_WAITING = 10_000  # lines
CLOSING_SECONDS = 1.0  # for lines that wait at the end
_THREAD = "log"

log = logging.getLogger("llama_jax.serve")


class RequestLogError(UserError):
    """The file of the request log cannot be written."""


class OneLine(logging.Formatter):
    """Writes one line per record; the lines of a traceback are indented.

    A request may put any text into a message. Escaped, it cannot look like another record, nor
    control a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record."""
        time, level = self.formatTime(record), record.levelname
        lines = [f"{time} {level} {one_line(record.getMessage())}"]
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            lines += [f"    {one_line(line)}" for line in trace]
        return "\n".join(lines)


class Background(logging.Handler):
    """Passes records to another handler in a thread; never waits.

    Attributes:
      num_lost: the number of records for which there was no room.
    """

    def __init__(self, target: logging.Handler, max_waiting: int = MAX_WAITING) -> None:
        """Starts the thread.

        Args:
          target: writes the records, and is closed at the end.
          max_waiting: the number of records that may wait.
        """
        super().__init__()
        self.num_lost = 0
        self._told_lost = 0
        self._target = target
        self._waiting: queue.Queue[logging.LogRecord | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._write, name=_THREAD, daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queues a record."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self.num_lost += 1

    def close(self) -> None:
        """Writes what waits, if that does not take long."""
        try:
            self._waiting.put(None, timeout=CLOSING_SECONDS)
        except queue.Full:
            pass
        else:
            self._thread.join(CLOSING_SECONDS)
        super().close()

    def _write(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._target.handle(record)
            if self.num_lost > self._told_lost:
                lost, self._told_lost = self.num_lost - self._told_lost, self.num_lost
                message = f"{lost} lines of the log were lost: they were not written fast enough."
                self._target.handle(
                    logging.makeLogRecord(
                        {"name": log.name, "levelno": logging.WARNING, "msg": message}
                    )
                )
        with suppress(OSError):  # of a full disk
            self._target.close()


class _RequestFile(WatchedFileHandler):
    """A file that `logrotate` may move. What cannot be written is lost, which is told once."""

    _told = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called in the `except` block of a failed write."""
        if not self._told:
            self._told = True
            log.warning("The request log cannot be written: %s.", sys.exc_info()[1])


@contextmanager
def logging_to(level: str, request_log: Path | None) -> Iterator[None]:
    """Writes the logs inside the context; everything is written at its end.

    Args:
      level: the least important level that is written, of `LEVELS`.
      request_log: a file for one JSON object per request; `STDERR`, or None for none.

    Raises:
      RequestLogError: the file cannot be opened.
    """
    root, requests = logging.getLogger(), logging.getLogger(REQUESTS)
    with ExitStack() as stack:
        if request_log is not None:
            target: logging.Handler = logging.StreamHandler(sys.stderr)
            if request_log != STDERR:
                try:
                    target = _RequestFile(request_log, encoding="utf-8")
                except OSError as error:
                    raise RequestLogError(
                        f"--request-log {request_log} cannot be written: {error.strerror}."
                    ) from error
            _use(stack, requests, target)
            requests.propagate = False
            requests.setLevel(logging.INFO)
        if not root.handlers:  # else the program that calls this one has its own
            target = logging.StreamHandler(sys.stderr)
            target.setFormatter(OneLine())
            _use(stack, root, target)
        logging.getLogger("llama_jax").setLevel(level.upper())
        yield


def num_stuck() -> int:
    """Returns the number of threads that still try to write a line; for the end of `logging_to`."""
    return sum(thread.name == _THREAD for thread in threading.enumerate())


def _use(stack: ExitStack, logger: logging.Logger, target: logging.Handler) -> None:
    handler = Background(target)
    logger.addHandler(handler)
    stack.callback(handler.close)
    stack.callback(logger.removeHandler, handler)
