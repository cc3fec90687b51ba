"""Ctrl-C while threads are at work."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from llama_jax.terminal.interrupts import held_interrupts, wait_for


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as interrupted:
        reached.append(interrupted())
        press()
        reached.append(interrupted())
    assert reached == [False, True]


def test_no_interrupt() -> None:
    with held_interrupts() as interrupted:
        assert not interrupted()


def test_an_interrupt_prevails_over_an_error() -> None:
    with pytest.raises(KeyboardInterrupt), held_interrupts():
        press()
        raise ValueError


def test_an_error_passes() -> None:
    with pytest.raises(ValueError), held_interrupts():
        raise ValueError


def test_threads_and_background_jobs_have_none() -> None:
    with ThreadPoolExecutor(1) as pool, held_interrupts():
        inner = pool.submit(lambda: held_interrupts().__enter__()())
        assert inner.result() is False
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_interrupts() as interrupted:
        press()
        assert not interrupted() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_no_lock_stays_taken() -> None:
    """Without the block, an interrupt right after a lock was taken leaves it taken."""

    class Interrupting(threading.Condition):
        def __enter__(self) -> bool:
            taken = super().__enter__()
            press()
            return taken

    held, bare = Interrupting(), Interrupting()
    with pytest.raises(KeyboardInterrupt), held_interrupts(), held:
        pass
    with pytest.raises(KeyboardInterrupt), bare:
        pass
    with ThreadPoolExecutor(1) as pool:
        free = [pool.submit(c.acquire, blocking=False).result() for c in (held, bare)]
    assert free == [True, False]


def test_a_wait_notices_an_interrupt_that_another_thread_received() -> None:
    waited: list[Future[None]] = []
    with pytest.raises(KeyboardInterrupt), held_interrupts() as interrupted:

        def work() -> None:
            time.sleep(0.2)  # the main thread waits by now
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            end = time.monotonic() + 10  # so that a wait that notices nothing is red, not stuck
            while not interrupted():
                assert time.monotonic() < end
                time.sleep(0.001)

        with ThreadPoolExecutor(1) as pool:
            waited += wait_for([pool.submit(work)])
    assert waited[0].exception() is None


def test_a_wait_ends_with_the_first_error() -> None:
    release = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        slow, wrong = pool.submit(release.wait, 30), pool.submit(lambda: 1 / 0)
        done = wait_for([slow, wrong])
        release.set()
    assert done == {wrong}
    assert wait_for([]) == set() and wait_for([slow]) == {slow}


def test_a_wait_ends_with_a_cancelled_future() -> None:
    cancelled, pending = Future[None](), Future[None]()
    cancelled.cancel()
    cancelled.set_running_or_notify_cancel()  # as a pool that is shut down
    assert wait_for([cancelled, pending]) == {cancelled}
