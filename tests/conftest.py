"""Sets up JAX, PyTorch and Hypothesis for all tests and for the engines that they start."""

import ctypes
import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.xla_options import CHEAP_CODE

# JAX and OpenMP read these when they are imported, also in the engines that tests start.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".jax_cache"),
    # The default, 1 s, is longer than most programs here take to compile: none would be kept.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": CHEAP_CODE,
    # Two workers share two cores. A second OpenMP thread each would only spin.
    "OMP_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)

# A shell starts a background job with SIGINT ignored, nohup starts one with SIGHUP ignored, and so
# would every engine be that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
USUAL_HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

# `make test` tries a few examples of each property. `make test-all` tries the usual hundred of the
# same properties again.
settings.register_profile("quick", deadline=None, max_examples=12)
settings.register_profile("full", deadline=None, max_examples=100)
settings.load_profile("quick")

# The files that take the longest. One that is begun last keeps one worker busy for minutes while
# the other has nothing to do.
LONGEST = (
    # of the slow tests:
    "tests/engine/test_scheduler.py",
    "tests/bench/test_measurements.py",
    "tests/demo/test_checkpoint.py",
    "tests/llm/test_notebook.py",
    "tests/engine/test_grammars.py",
    "tests/clients/test_schemathesis.py",
    "tests/convert/test_resume.py",
    "tests/convert/test_memory.py",
    "tests/ring/test_no_compile.py",
    # of the quick tests:
    "tests/llm/test_in_process_llm.py",
    "tests/model/test_sampling.py",
    "tests/model/test_bring_your_own.py",
    "tests/ring/test_parity.py",
    "tests/serve/test_end_to_end.py",
    "tests/ring/test_rules.py",
    "tests/quantization/test_quantized_model.py",
    "tests/ring/test_compiled_program.py",
    "tests/serve/test_process.py",
    "tests/llm/test_end_to_end.py",
    "tests/engine/test_engine.py",
    "tests/interpret/test_capture.py",
    "tests/convert/test_quantized.py",
    "tests/convert/test_verification.py",
    "tests/test_structure.py",
    "tests/ring/test_independence.py",
    "tests/config/test_config_fields.py",
    "tests/pictures/test_pictures.py",
    "tests/model/test_attention.py",
    "tests/ring/test_adjusted_tokens.py",
    "tests/ring/test_sharded_llama.py",
    "tests/interpret/test_patches.py",
    "tests/llm/test_llm.py",
    "tests/interpret/test_readings.py",
    "tests/pictures/test_pictures_live.py",
    "tests/ring/test_tap_cost.py",
    "tests/model/test_model.py",
    "tests/convert/test_cli.py",
    "tests/plan/simulation/test_same_as_engine.py",
    "tests/convert/test_orbax.py",
    "tests/plan/test_command_line.py",
    "tests/convert/test_divergence.py",
    "tests/plan/simulation/test_command.py",
    "tests/ring/test_prompt_logprobs.py",
    "tests/ring/test_settings.py",
    "tests/checkpoint/test_loading_memory.py",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collects the tests without garbage collection, which then leaves out what is there.

    The modules and the thousands of tests are a million objects that live until the end. Looking
    for garbage among them takes a third of the collection, and a second each time after it.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)  # after those that do not run have been taken out
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts the files: the longest ones, then those with the most tests."""
    number = Counter(item.path for item in items)
    places = {config.rootpath / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places), "LONGEST names a file that does not exist"

    def key(item: pytest.Item) -> tuple[int, int]:
        return places.get(item.path, len(places)), -number[item.path]

    items.sort(key=key)


class Traces:
    """Counts the functions that JAX has traced, once it has been imported."""

    def __init__(self):
        self.count = 0
        self._listens = False

    def look(self) -> int:
        """The count; one more than before if JAX has been imported since."""
        if not self._listens and "jax" in sys.modules:
            self._listens = True
            self.count += 1
            sys.modules["jax"].monitoring.register_event_duration_secs_listener(self._hear)
        return self.count

    def _hear(self, event: str, seconds: float, **about: object) -> None:
        self.count += event.endswith("jaxpr_trace_duration")


TRACES = Traces()


@pytest.fixture(autouse=True)
def usual_signals() -> None:
    """Begins each test with the usual handlers.

    A loop of uvloop leaves its own behind, which ignore every signal once it is closed: a test that
    sends Ctrl-C to itself would wait for ever.
    """
    for number, handler in USUAL_HANDLERS.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    """Frees a module's compiled programs at its end: all of them would take gigabytes."""
    before = TRACES.look()
    yield
    if TRACES.look() != before:
        sys.modules["jax"].clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # glibc does not give so many small pieces back
