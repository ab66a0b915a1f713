"""The stopwatch by which tests judge deadlines sees waits, or their bounds would mean nothing."""

from __future__ import annotations

import threading
import time

from tests.stopwatch import Stopwatch

WAIT_S = 0.2


def test_sleep_counts():
    watch = Stopwatch()
    time.sleep(WAIT_S)
    assert watch.took_s() > WAIT_S / 2


def test_a_wait_for_another_thread_counts():
    lock = threading.Lock()
    lock.acquire()
    threading.Timer(WAIT_S, lock.release).start()
    watch = Stopwatch()
    assert lock.acquire(timeout=10)
    assert watch.took_s() > WAIT_S / 2


def test_computing_counts():
    watch, until_s = Stopwatch(), time.thread_time() + WAIT_S
    while time.thread_time() < until_s:
        pass
    assert watch.took_s() > WAIT_S / 2
