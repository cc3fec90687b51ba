"""The process or thread that runs an engine, as its client sees it. Imports no JAX."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from llama_jax.client.private_directory import PrivateDirectory
from llama_jax.engine.options import EngineOptions

if TYPE_CHECKING:
    from llama_jax.engine.core import Engine


class EngineHost(Protocol):
    """Runs an engine in a process (`EngineProcess`) or in a thread (`InProcessEngine`).

    Attributes:
      exited: set when the engine has ended, on the event loop that created the host.
    """

    exited: asyncio.Event

    @property
    def pid(self) -> int:
        """The id of the process that the engine runs in."""

    @property
    def engine(self) -> "Engine | None":
        """The engine, if it runs in this process and is ready."""

    @property
    def cause(self) -> Exception | None:
        """The error that ended the engine, if it was raised in this process."""

    def kill(self) -> None:
        """Ends the engine without its cooperation, from any thread; does not wait."""

    def print_stacks(self) -> None:
        """Prints the stacks of all threads of the engine's process, even if it hangs."""

    def clean_up(self) -> None:
        """Makes sure that the engine has ended, and frees its resources."""

    def describe_end(self, last_words: str | None) -> str:
        """Says in one sentence why the engine ended; `last_words` is its own account, if any."""


# Starts an engine that connects to the socket in a directory. The host removes the directory when
# the engine has ended.
StartHost = Callable[[PrivateDirectory, EngineOptions], EngineHost]
