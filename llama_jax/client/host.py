"""What a client needs of the engine behind its socket, wherever that runs. Imports no JAX."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from llama_jax.engine.options import EngineOptions


class EngineHost(Protocol):
    """An engine that runs: in a process (`launch.EngineProcess`) or in a thread (`in_process`).

    Attributes:
      exited: set as soon as the engine has ended, on the event loop that it was made in.
    """

    exited: asyncio.Event

    @property
    def pid(self) -> int:
        """Id of the process that the engine runs in."""

    @property
    def engine(self) -> Any:
        """The engine itself where it runs in this process and is ready, else None."""

    @property
    def cause(self) -> Exception | None:
        """The error that ended the engine, where it is known here."""

    def kill(self) -> None:
        """Ends the engine without its consent, from any thread; does not wait."""

    def clean_up(self) -> None:
        """Makes sure that the engine has ended, and gives back what it held."""

    def describe_end(self, last_words: str | None) -> str:
        """One sentence on why the engine ended; `last_words` is its own account."""


# Starts an engine that connects to the socket in a directory, which it removes when it has ended.
StartHost = Callable[[Path, EngineOptions], EngineHost]
