"""How long a backend may stop in the middle of an answer: judged by bytes, and by waiting only."""

from __future__ import annotations

import pytest

from lmcache_ext.errors import StoreStalled
from lmcache_ext.stores.pace import Floor, Pace

FLOOR = Floor(timeout_s=0.5, min_bytes_per_s=1000)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(FLOOR, clock)


def receive(pace: Pace, clock: Clock, num_bytes: int, took_s: float) -> None:
    """Some bytes, after a wait."""
    pace.wait_s()
    clock.now += took_s
    pace.came(num_bytes)


def test_a_first_wait_is_for_the_whole_window(pace: Pace) -> None:
    assert pace.wait_s() == 0.5


def test_as_many_bytes_as_the_floor_asks_for_begin_another_window(pace: Pace, clock: Clock) -> None:
    for _ in range(100):
        receive(pace, clock, 500, 0.49)
    assert pace.wait_s() == 0.5


def test_fewer_do_not_put_it_off(pace: Pace, clock: Clock) -> None:
    for _ in range(4):
        receive(pace, clock, 1, 0.1)
    assert pace.wait_s() == pytest.approx(0.1)
    receive(pace, clock, 1, 0.2)
    with pytest.raises(StoreStalled, match=r"6 bytes within 0.5 s, expected 500"):
        receive(pace, clock, 1, 0.001)


def test_small_pieces_add_up(pace: Pace, clock: Clock) -> None:
    for _ in range(1000):
        receive(pace, clock, 60, 0.05)


def test_an_answer_however_small_begins_another_window(pace: Pace, clock: Clock) -> None:
    for _ in range(100):
        receive(pace, clock, 1, 0.4)
        pace.begin()


def test_who_had_no_cpu_takes_what_has_arrived_meanwhile(pace: Pace, clock: Clock) -> None:
    clock.now += 7.0
    assert 0 < pace.wait_s() < 0.01
    pace.came(500)
    assert pace.wait_s() == 0.5


def test_without_a_floor_any_byte_counts(clock: Clock) -> None:
    pace = Pace(Floor(timeout_s=0.5, min_bytes_per_s=1), clock)
    for _ in range(100):
        receive(pace, clock, 1, 0.49)
