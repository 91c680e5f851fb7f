"""What every test run has: the clause matrix (``--clauses``), and descriptors that do not run out.

A device under test and the driver that drives it refer to each other, so their guest memory, two
descriptors each, is freed by the garbage collector only. Thousands of tests would otherwise pass the
usual limit of 1024 open files.
"""

from __future__ import annotations

import gc
import itertools
import resource

import pytest

pytest_plugins = ["tests.clauses.matrix"]

#: Tests between two collections, and descriptors within that a hard-working test may leave.
COLLECT_EVERY = 20
DESCRIPTORS = 16384
_finished = itertools.count(1)


def pytest_configure() -> None:
    """Raise the soft limit as far as the hard one lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """Collect every few tests."""
    if next(_finished) % COLLECT_EVERY == 0:
        gc.collect()
