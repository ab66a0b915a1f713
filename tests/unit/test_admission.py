"""Which chunks are worth a far store, on a clock that only the test moves."""

from __future__ import annotations

from lmcache_ext.offload.admission import Admission


def counted(**options):
    clock = [0.0]
    return Admission(clock=lambda: clock[0], **options), clock


def test_a_chunk_is_admitted_at_its_nth_use_and_from_then_on():
    admission, _ = counted()
    assert [admission.admits("a", 3) for _ in range(5)] == [False, False, True, True, True]
    assert not admission.admits("b", 3)


def test_uses_count_within_the_window_only():
    admission, clock = counted(window_s=10.0)
    assert not admission.admits("a", 2)
    clock[0] = 11.0
    assert not admission.admits("a", 2)
    clock[0] = 20.0
    assert admission.admits("a", 2)


def test_what_was_written_is_not_offered_again_until_the_store_may_have_lost_it():
    admission, clock = counted(window_s=100.0, written_s=10.0)
    assert [admission.admits("a", 2) for _ in range(2)] == [False, True]
    admission.written(["a", "never seen"])
    clock[0] = 9.0
    assert not admission.admits("a", 2)
    clock[0] = 11.0
    assert admission.admits("a", 2)
    assert len(admission) == 1


def test_memory_is_bounded_and_the_least_recently_used_is_forgotten():
    admission, _ = counted(max_keys=3)
    for key in "abc":
        admission.admits(key, 2)
    assert admission.admits("a", 2)
    admission.admits("d", 2)
    assert len(admission) == 3
    assert admission.admits("a", 2)
    assert not admission.admits("b", 2)
