"""Tests run in two processes at once; each, and each rank that it starts, computes on one core."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests.support import process_state

# The first call of an operation may be slow; the same examples each time, so that no failure is bad luck.
settings.register_profile("default_tests", deadline=None, derandomize=True)
settings.load_profile("default_tests")


@pytest.fixture(autouse=True, scope="session")
def _one_reader() -> None:
    """What reads exports back takes seconds to start: it stays until this process ends."""
    from offload_sparse.export import read_back

    read_back._IDLE_SECONDS = 3600.0


def pytest_collection_finish() -> None:
    gc.freeze()  # every run collects garbage: what is imported by now is not looked through each time


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    process_state.begin()


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own() -> Iterator[None]:
    with process_state.put_back():
        yield
