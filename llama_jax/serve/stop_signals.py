"""The signals that end the server."""

import asyncio
import signal


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP: the first asks for a graceful shutdown.

    A second SIGTERM or SIGINT asks for an immediate one. SIGHUP never counts as the second signal,
    nor one after it: a service manager may send it together with SIGTERM.

    Attributes:
      asked: set by the first signal.
      first: the first signal.
      repeated: set by the second.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.repeated = asyncio.Event()
        self.first: signal.Signals | None = None
        self._terminated = False
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # Under nohup, SIGHUP is ignored and must stay so.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        self.first = self.first or number
        self.asked.set()
        if number != signal.SIGHUP:
            if self._terminated:
                self.repeated.set()
            self._terminated = True
