"""Tests run in two processes at once; each, and each rank that it starts, computes on one core."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests.support import fork_server, process_state

# The first call of an operation may be slow; the same examples each time, so that no failure is bad luck.
settings.register_profile("default_tests", deadline=None, derandomize=True)
settings.load_profile("default_tests")


def pytest_configure(config: pytest.Config) -> None:
    """The processes of a test run share the servers that others are forked from: the first one makes the
    folder that names them, and removes it."""
    if fork_server.FOLDER not in os.environ:
        os.environ[fork_server.FOLDER] = tempfile.mkdtemp(prefix="servers")
        config.add_cleanup(_remove_servers)


def _remove_servers() -> None:
    shutil.rmtree(os.environ.pop(fork_server.FOLDER), ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _one_reader() -> None:
    """What reads exports back takes seconds to start: it stays until this process ends."""
    from offload_sparse.export import read_back

    read_back._IDLE_SECONDS = 3600.0


def pytest_collection_finish() -> None:
    process_state.leave_imports_to_the_end()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    process_state.begin()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    process_state.leave_imports_to_the_end()


@pytest.fixture(autouse=True)
def _as_in_a_process_of_its_own() -> Iterator[None]:
    with process_state.put_back():
        yield
