"""What several parts of the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sparsedeploy.machine import this_machine
from sparsedeploy.runtimes.environments import Environment, install, require
from sparsedeploy.runtimes.specification import load_runtime


@pytest.fixture(scope="session")
def deepsparse_runtime() -> Environment:
    """The real engine in its managed environment, installed when it is not there yet (in the user's cache folder)."""
    reason = load_runtime("deepsparse").why_not_here(this_machine())
    if reason is not None:
        pytest.skip(reason)
    install("deepsparse")
    return require("deepsparse")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that processes which share the tests end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def one_core() -> Iterator[None]:
    """Engines get one core, in each test process another one.

    An engine's threads wait for each other in loops, which takes most of the time where test processes share cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    process = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {cores[process % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)
