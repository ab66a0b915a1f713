"""Readers and writers of one key: never at the same time, and never at the cost of other keys."""

from __future__ import annotations

import threading

import pytest

from lmcache_ext.errors import StoreTimeout
from lmcache_ext.stores.turns import Turns
from tests.contracts.store_contract import in_threads
from tests.servers import until


def test_a_writer_waits_for_readers_and_new_readers_for_it():
    turns, order = Turns(), []
    reading, waiting = threading.Event(), threading.Event()

    def act(index: int) -> None:
        if index == 0:
            with turns.reading([b"a"], 5):
                reading.set()
                until(lambda: b"a" in turns._writers, "the writer is in line")
                waiting.set()
                order.append("read")
        elif index == 1:
            assert reading.wait(5)
            with turns.writing([b"a", b"b"], 5):
                order.append("write")
        else:
            assert waiting.wait(5)
            with turns.reading([b"b"], 5):
                order.append("read again")

    in_threads(3, act)
    assert order == ["read", "write", "read again"]


def test_other_keys_and_other_readers_never_wait():
    turns = Turns()
    with turns.reading([b"a"], 0), turns.reading([b"a"], 0), turns.writing([b"b"], 0), turns.writing([b"c"], 0):
        pass
    with turns.writing([b"a"], 0):
        pass


@pytest.mark.parametrize("kind", ["reading", "writing"])
def test_a_turn_that_does_not_come_is_a_timeout_and_leaves_nothing_behind(kind):
    turns = Turns()
    with getattr(turns, kind)([b"a"], 0):
        with pytest.raises(StoreTimeout, match=r"in use for 0\.010 s"), turns.writing([b"a", b"b"], 0.01):
            pass
        with turns.writing([b"b"], 0):
            pass
    with turns.writing([b"a", b"b"], 0):
        pass


def test_batches_with_keys_in_any_order_never_lock_each_other():
    turns, running = Turns(), []

    def act(index: int) -> None:
        keys = [b"a", b"b", b"c"] if index % 2 else [b"c", b"b", b"a"]
        for _ in range(200):
            with turns.writing(keys, 10):
                running.append(index)
                assert len(running) == 1
                running.pop()

    in_threads(4, act)
