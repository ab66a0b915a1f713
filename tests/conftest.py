"""How the tests run: in which order, what may be skipped, and with a garbage collector that looks at tests only."""

import gc
import os
from collections import Counter

import pytest

# Hardware, which nobody can install; every other skip is an installation that CI has to make.
NOT_TO_BE_INSTALLED = ("no RDMA device", "needs two cores", "the copier of hosts without a GPU")
PREFIX = "Skipped: "


def pytest_configure():
    gc.disable()


def pytest_collection_modifyitems(items):
    """Tests that start no server come first, so that a mistake shows within seconds."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)


def pytest_collection_finish():
    """Keep what the imports made out of collections: a million objects of torch and vLLM, half a second each time."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # some libraries complain at the exit of what was never freed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return judged((yield))


def judged(report):
    """In CI a skip is a failure: what was not installed would not be missed."""
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI"):
        reason = report.longrepr[2].removeprefix(PREFIX)
        if reason not in NOT_TO_BE_INSTALLED:
            report.outcome, report.longrepr = "failed", f"skipped, in CI, which must install what it takes: {reason}"
    return report


def pytest_terminal_summary(terminalreporter):
    """One line for each reason, not one for each test."""
    skipped = terminalreporter.stats.get("skipped", ())
    reasons = Counter(report.longrepr[2].removeprefix(PREFIX) for report in skipped)
    for reason, count in reasons.items():
        terminalreporter.write_line(f"skipped {count}: {reason}")
