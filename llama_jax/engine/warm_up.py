"""Compiles the programs of an engine in a thread, in the order in which they are needed.

The largest buckets have room for every packet, so an engine can begin when they are compiled. The
smaller ones only save time: the tick loop uses each as soon as it is ready. Compiling needs shapes
alone, so it begins before the weights are loaded.

XLA releases the interpreter's lock while it compiles. Nothing runs on the devices here, except that
XLA times some kernels when it compiles for a GPU.
"""

import atexit
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from llama_jax.engine.compilation_cache import compilation_cache
from llama_jax.engine.compile_counter import CompileCounter
from llama_jax.engine.programs import Choice, Programs
from llama_jax.ring.sizes import Bucket
from sharding.program import MeshProgram

AT_EXIT_SECONDS = 10.0

log = logging.getLogger("llama_jax.engine")


class Stopped(Exception):
    """The programs are no longer wanted."""


class WarmUp:
    """Compiles every program of an engine, in a thread of its own.

    Attributes:
      ready: the buckets whose programs are compiled. It is replaced, never changed.
      largest: done when a plain request can run, in the largest buckets.
      every_request: done when all requests can: with penalties, masks and log-probabilities.
      every_program: done when nothing is left to compile. A smaller bucket that failed to compile
        is logged and left out.
    """

    def __init__(self, programs: Programs) -> None:
        """Starts the thread.

        Args:
          programs: what to compile.
        """
        self.ready: frozenset[Bucket] = frozenset()
        self.largest: Future[None] = Future()
        self.every_request: Future[None] = Future()
        self.every_program: Future[None] = Future()
        self._stopped = threading.Event()
        self._counter: CompileCounter | None = None
        self._thread = threading.Thread(
            target=self._main, args=(programs,), name="compile-programs", daemon=True
        )
        # XLA must not be compiling while the interpreter takes itself apart.
        atexit.register(self._end)
        self._thread.start()

    @property
    def compilations(self) -> int:
        """The programs compiled so far, including those read from the disk."""
        return 0 if self._counter is None else self._counter.count

    def stop(self) -> None:
        """Compiles nothing more after the program that is being compiled; does not wait for it."""
        self._stopped.set()

    def _end(self) -> None:
        self.stop()
        self._thread.join(AT_EXIT_SECONDS)

    def _main(self, programs: Programs) -> None:
        self._counter = CompileCounter()
        try:
            with compilation_cache():
                self._compile_all(programs)
            self.every_program.set_result(None)
        except BaseException as error:  # whoever waits must hear of it
            for future in (self.largest, self.every_request, self.every_program):
                if not future.done():
                    future.set_exception(error)
        finally:
            atexit.unregister(self._end)

    def _compile_all(self, programs: Programs) -> None:
        shapes = programs.shapes()
        largest = programs.sizes.largest()

        def compile_for(bucket: Bucket, choice: Choice) -> None:
            packed = programs.packet_shape(bucket)
            programs.tick(self._compile, shapes, bucket, packed, choice)

        for bucket in largest:
            for choice in programs.plain_choices(bucket):
                compile_for(bucket, choice)
            self.ready |= {bucket}
        self.largest.set_result(None)
        for bucket in largest:
            for choice in programs.other_choices(bucket):
                compile_for(bucket, choice)
        programs.set_history(self._compile, shapes.history, 0, [0], [])
        if programs.sizes.max_chunk:
            programs.score(self._compile, shapes, 0, [0])
        self.every_request.set_result(None)
        for bucket in order_of_need(programs.sizes.buckets()):
            if bucket in self.ready:
                continue
            try:
                for choice in (*programs.plain_choices(bucket), *programs.other_choices(bucket)):
                    compile_for(bucket, choice)
            except Stopped:
                raise
            except Exception:
                log.exception(
                    "The program for %d rows and a chunk of %d tokens could not be compiled; a "
                    "larger one takes its place.",
                    *bucket,
                )
            else:
                self.ready |= {bucket}

    def _compile(self, program: MeshProgram, *args: Any) -> Any:
        if self._stopped.is_set():
            raise Stopped
        return program.compile(*args)


def order_of_need(buckets: list[Bucket]) -> list[Bucket]:
    """Sorts buckets: first those without a chunk, as most ticks are; then by rows, since a server
    with few requests gains the most."""
    return sorted(buckets, key=lambda bucket: (bucket.chunk > 0, bucket))


def wait(future: "Future[None]", poll: Callable[[], None], seconds: float = 0.1) -> None:
    """Waits for a future, and calls `poll` meanwhile, which may raise to end the wait."""
    while True:
        poll()
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():
                raise
