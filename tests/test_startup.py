"""Processes of our own start without what they do not use; a program that imports the package is left as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sparsedeploy.startup import after_import

PROGRAM = """
import gc, sys
from sparsedeploy.startup import quick_start
quick_start()
from sparsedeploy.models.loading import load_model
from transformers import LlamaForCausalLM
found = {name.partition(".")[0] for name in sys.modules}
assert "transformers.generation.candidate_generator" in sys.modules
assert "transformers.loss.loss_for_object_detection" in sys.modules
assert not {"sklearn", "scipy", "pandas"} & {name for name in found if sys.modules[name] is not None}, found
assert gc.isenabled()
"""


LIBRARY = """
import gc
before = gc.get_threshold()
import sparsedeploy
import sparsedeploy.workflows.prune
import transformers.utils
known = transformers.utils.import_utils
assert transformers.utils.is_sklearn_available is known.is_sklearn_available
assert transformers.utils.is_scipy_available is known.is_scipy_available
assert gc.get_threshold() == before
"""


def test_a_command_imports_neither_scikit_learn_nor_scipy() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_library_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_after_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_module_of_a_test.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    seen: list[int] = []

    def act(module: ModuleType) -> None:
        seen.append(module.value)
        module.value = 2  # type: ignore[attr-defined]

    before = list(sys.meta_path)
    after_import("toy_module_of_a_test", act)
    assert seen == []
    import toy_module_of_a_test  # type: ignore[import-not-found]

    assert seen == [1]
    assert toy_module_of_a_test.value == 2
    assert sys.meta_path == before
    after_import("toy_module_of_a_test", act)
    assert seen == [1]
    assert sys.meta_path == before
