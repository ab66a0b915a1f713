"""Prometheus' text format, with what servers may write in it."""

from __future__ import annotations

import math

from lmcache_ext.exposition import read_samples


def test_labels_numbers_and_time_stamps():
    found = read_samples('a{x="q\\"uote",y="b,c"} 1e3\na 2 1700000000\nb{le="+Inf"} +Inf\n')
    assert found == {"a": [({"x": 'q\\"uote', "y": "b,c"}, 1000.0), ({}, 2.0)], "b": [({"le": "+Inf"}, math.inf)]}


def test_a_metric_that_was_declared_is_there_without_samples():
    assert read_samples("# HELP a b c\n# TYPE a counter\n") == {"a": []}


def test_what_is_no_sample_is_passed_over():
    assert read_samples("# c 1\nnonsense\na one\na{x=\n\n{} 1\n") == {}
