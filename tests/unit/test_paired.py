"""How sure benchmarks are of their ratios."""

import pytest

from benchmarks.paired import balanced_ratio, ratio, ratio_of_sums


def test_a_ratio_of_sums_weighs_pairs_by_their_size():
    assert ratio_of_sums([1, 30], [1, 10]).value == pytest.approx(31 / 11)


def test_the_interval_of_a_ratio_of_sums_is_no_wider_than_its_pairs():
    value, low, high = ratio_of_sums([2, 3, 4, 5] * 10, [1, 1, 1, 1] * 10)
    assert 2 < low < value < high < 5


def test_pairs_that_agree_leave_no_doubt():
    assert ratio_of_sums([2, 6, 10], [1, 3, 5]) == pytest.approx((2, 2, 2))
    assert ratio([2, 6, 10], [1, 3, 5]) == pytest.approx((2, 2, 2))


def test_what_being_first_costs_is_not_in_a_balanced_ratio():
    ours_first = [True] * 3 + [False] * 7
    ours = [1.02 * (1.1 if first else 1.0) for first in ours_first]
    theirs = [1.0 if first else 1.1 for first in ours_first]
    assert balanced_ratio(ours, theirs, ours_first) == pytest.approx((1.02, 1.02, 1.02))
    assert ratio(ours, theirs).median < 0.94


def test_a_balanced_ratio_needs_pairs_of_both_orders():
    with pytest.raises(ValueError, match="both orders"):
        balanced_ratio([1.0, 2.0], [1.0, 2.0], [True, True])
