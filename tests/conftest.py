"""What several parts of the tests share."""

from __future__ import annotations

import pytest

from sparsedeploy.runtimes.environments import Environment, install, require
from sparsedeploy.runtimes.machine import this_machine
from sparsedeploy.runtimes.specification import load_runtime


@pytest.fixture(scope="session")
def deepsparse_runtime() -> Environment:
    """The real engine in its managed environment, installed when it is not there yet (in the user's cache folder)."""
    reason = load_runtime("deepsparse").why_not_here(this_machine())
    if reason is not None:
        pytest.skip(reason)
    install("deepsparse")
    return require("deepsparse")
