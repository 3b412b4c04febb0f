"""llama.cpp takes minutes to build, so it is not installed for the tests: they run where it is there."""

from __future__ import annotations

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.environments import Environment, require


@pytest.fixture(scope="session")
def runtime() -> Environment:
    try:
        return require("llamacpp")
    except UserError as error:
        pytest.skip(f"{error} (built in some minutes)")
