"""Grammars that are written and checked in a process of its own."""

import signal
import subprocess
import threading
from functools import reduce

import pytest

from llama_jax.text import grammar_worker
from llama_jax.text.grammar import GrammarError, choice_grammar, json_schema_grammar
from llama_jax.text.grammar_worker import GrammarWorker
from tests.support.processes import wait_until


@pytest.fixture(scope="module")
def worker():
    return GrammarWorker()


def test_it_writes_grammars_and_says_what_is_wrong(worker):
    assert worker.write("choice", ["a", "é\n"]) == choice_grammar(["a", "é\n"])
    schema = {"properties": {"b": {}, "a": {}}}  # in this order
    assert worker.write("json_schema", schema) == json_schema_grammar(schema)
    deep = reduce(lambda schema, _: {"items": schema}, range(100_000), {})
    for kind, value in (
        *(("regex", "("), ("regex", "\ud800"), ("lark", "x")),
        *(("json_schema", schema) for schema in ([1], deep, {"const": 10**5000})),
    ):
        with pytest.raises(GrammarError):
            worker.write(kind, value)
    # None is left that ends the process later, in another check.
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)


def test_a_check_without_end_is_ended(worker):
    patterns = {f"^x{number}$": {} for number in range(2000)}
    with pytest.raises(GrammarError):
        worker.write("json_schema", {"type": "object", "patternProperties": patterns})
    assert worker.write("regex", "a")


@pytest.mark.parametrize("size", [1, 1_000_000])  # less and more than a pipe holds
def test_a_worker_that_does_not_run_is_replaced(worker, monkeypatch, size):
    """One that is stopped or swapped out uses no CPU time, whatever it is asked."""
    worker.write("regex", "a")
    worker._process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(grammar_worker, "WALL_SECONDS", 0.1)
    with pytest.raises(GrammarError, match="takes too long"):
        worker.write("regex", "a" * size)
    monkeypatch.undo()
    assert worker.write("regex", "a")


def test_it_is_started_again_after_its_death(worker):
    worker.write("regex", "a")
    worker._process.kill()
    worker._process.wait()
    assert worker.write("regex", "a")


def test_it_ends_when_nobody_needs_it(worker):
    other = GrammarWorker()
    other.write("regex", "a")
    process: subprocess.Popen = other._process
    process.stdin.close()
    wait_until(lambda: process.poll() == 0)
