"""Which weights the installation's measurement lets the backend pack."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("export/llamacpp/after_install.py")


def seconds(dense: float, full: float, *packed: float) -> dict[str, float]:
    return {"dense": dense, "full": full, **dict(zip(("0.3", "0.5", "0.7"), packed, strict=True))}


@pytest.mark.parametrize(
    ("times", "share", "full"),
    [
        # Against ggml, less the margin: 0.95 is met half-way between 1.05 at 50 % and 0.85 at 70 %.
        (seconds(1.0, 1.0, 1.25, 1.05, 0.85), 0.6, False),
        # Our own dense tiles are faster than ggml: they are what masks have to beat.
        (seconds(1.0, 0.7, 1.0, 0.8, 0.6), 0.6, True),
        (seconds(1.0, 0.9, 0.5, 0.4, 0.3), 0.125, True),
        (seconds(0.1, 1.0, 0.9, 0.8, 0.7), 1.0, False),
        # No gain from zeros at all.
        (seconds(1.0, 1.2, 0.5, 0.5, 0.5), 0.125, False),
        (seconds(1.0, 1.2, 1.5, 1.5, 1.5), 1.0, False),
    ],
)
def test_choose(script: ModuleType, times: dict[str, float], share: float, full: bool) -> None:
    assert script.choose(times, 1 / 8) == (pytest.approx(share), full)
