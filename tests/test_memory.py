"""What the process asks of the system's memory."""

import os
import subprocess
import sys

import pytest

from sparsedeploy.memory import use_huge_pages

VARIABLE = "THP_MEM_ALLOC_ENABLE"


def test_huge_pages_are_asked_for_unless_the_user_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    use_huge_pages()
    assert os.environ[VARIABLE] == "0"
    monkeypatch.delenv(VARIABLE)
    use_huge_pages()
    assert os.environ[VARIABLE] == "1"


_RETURNS = """
import psutil, torch
from sparsedeploy.memory import return_freed_memory
# Small enough to come from the heap, with a living one between each two that are freed: a hole each.
blocks = [torch.ones(25_000) for _ in range(2_000)]
del blocks[::2]
before = psutil.Process().memory_info().rss
return_freed_memory()
print(before - psutil.Process().memory_info().rss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_holes_between_living_tensors_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", _RETURNS], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50_000_000
