"""The persistent cache of compiled programs: where it is, and how damaged entries are replaced.

A cache belongs to its machine. JAX also caches programs for GPUs that are only described (seen with
jax 0.10.2). XLA compiles those without measuring which products are fastest, so such an entry must
never reach a server: `llama_jax.plan.compiled` turns the cache off, and no cache is shipped.
"""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

_JAX_COMPILER = logging.getLogger("jax._src.compiler")


_lock = threading.Lock()
_inside = 0  # contexts that are entered now, in any thread
_settings = ExitStack()  # those of the first of them


@contextmanager
def compilation_cache() -> Iterator[None]:
    """Caches every program that is compiled inside on disk, however fast it compiled.

    The settings count for the whole process and are restored when nobody is inside any more: the
    process may be a notebook kernel, whose own programs do not belong in this project's cache
    directory.
    """
    global _inside
    with _lock:
        if not _inside:
            _settings.enter_context(_cache_settings())
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _settings.close()


@contextmanager
def _cache_settings() -> Iterator[None]:
    settings: dict[str, object] = {
        # By default, JAX caches only programs that took a second to compile.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    directory = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if directory is None:
        home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        directory = os.path.join(home, "llama-jax", "xla")
        settings["jax_compilation_cache_dir"] = directory
    before = {name: getattr(jax.config, name) for name in settings}
    _apply(settings)
    try:
        with _damaged_entries_replaced(directory):
            yield
    finally:
        _apply(before)


def _apply(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    if "jax_compilation_cache_dir" in settings:
        reset_cache()  # JAX reads the directory only once


@contextmanager
def _damaged_entries_replaced(directory: str) -> Iterator[None]:
    """Makes JAX replace an entry that it cannot read, such as one whose writer was killed.

    JAX warns of such an entry and compiles the program, but never writes to a file that exists, so
    every later start would do the same. Only JAX's debug log names the entry. A message of another
    form, from another version of JAX, changes nothing.
    """
    level, threshold = _JAX_COMPILER.level, _JAX_COMPILER.getEffectiveLevel()

    def delete_missed(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("PERSISTENT COMPILATION CACHE MISS") and record.args:
            key = record.args[-1]  # type: ignore[index]
            with suppress(OSError):  # usually there is no such file, just a new program
                os.unlink(os.path.join(directory, f"{key}-cache"))
        return record.levelno >= threshold

    _JAX_COMPILER.addFilter(delete_missed)
    _JAX_COMPILER.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        _JAX_COMPILER.setLevel(level)
        _JAX_COMPILER.removeFilter(delete_missed)
