"""A damaged entry of the compile cache is replaced: the next start reads it."""

import logging
from collections import Counter

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from llama_jax.engine.compilation_cache import compilation_cache


@pytest.fixture
def directory(tmp_path):
    """The cache directory, in place of the one that the tests share."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    reset_cache()
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)
    reset_cache()


@pytest.fixture
def events():
    """Counts JAX's events by name."""
    counts = Counter()

    def listen(event, **_):
        counts[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(listen)
    yield counts
    jax.monitoring.unregister_event_listener(listen)


def start() -> None:
    """Compiles a program, or reads it from the cache, as a new process would."""
    jax.clear_caches()

    def tripled(x):
        return 3 * x

    with compilation_cache():
        jax.jit(tripled).lower(np.zeros(4)).compile()


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\x5a" * len(data),
    "a flipped bit": lambda data: data[:200] + bytes([data[200] ^ 4]) + data[201:],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_replaced(directory, events, damage):
    start()
    (entry,) = directory.glob("*tripled*-cache")
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    with pytest.warns(UserWarning, match="tripled"):  # JAX's own
        start()
    assert entry.read_bytes()[:2] == good[:2] and len(entry.read_bytes()) > len(good) // 2
    events.clear()
    start()
    assert events["cache_hits"] == 1 and events["cache_misses"] == 0


def test_a_good_entry_stays(directory):
    start()
    (entry,) = directory.glob("*tripled*-cache")
    before = entry.stat()
    start()
    after = entry.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_the_log_of_jax_is_unchanged(directory, caplog):
    logger = logging.getLogger("jax._src.compiler")
    before = logger.level, list(logger.filters)
    with caplog.at_level(logging.WARNING):
        start()
    assert (logger.level, list(logger.filters)) == before
    assert not caplog.records
