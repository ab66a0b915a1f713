"""Where our threads run, seen from a thread pinned as vLLM pins its CPU worker."""

import os
import subprocess
import threading

import pytest

from lmcache_ext.offload.cores import leave_compute_cores, spare_cores


def in_a_thread_pinned_to(cores, call):
    found = []

    def run():
        os.sched_setaffinity(0, cores)
        found.append(call())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def allowed():
    """What our parent may use, which is what we may."""
    cores = os.sched_getaffinity(os.getppid())
    if len(cores) < 2:
        pytest.skip("needs two cores")
    return cores


def test_spare_are_those_that_do_not_compute(allowed):
    compute = {min(allowed)}
    assert in_a_thread_pinned_to(compute, spare_cores) == allowed - compute


def test_spare_are_those_that_no_worker_below_computes_on(allowed):
    compute = {min(allowed)}
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as worker:
        os.sched_setaffinity(worker.pid, compute)
        assert spare_cores() == allowed - compute
        worker.communicate()
    assert spare_cores() == allowed


def test_where_all_compute_all_are_shared(allowed):
    assert in_a_thread_pinned_to(allowed, spare_cores) == allowed


def test_a_thread_started_by_the_worker_leaves_its_cores(allowed):
    compute = {min(allowed)}

    def leave():
        leave_compute_cores()
        return os.sched_getaffinity(0)

    assert in_a_thread_pinned_to(compute, leave) == allowed - compute
