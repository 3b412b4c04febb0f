"""The generated pages say what the code says, and every link leads somewhere."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs"))  # as for a script
    specification = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def test_no_page_is_stale(generate: ModuleType) -> None:
    stale = [str(path.relative_to(ROOT)) for path in generate.stale()]
    assert not stale, f"run make docs: {', '.join(stale)}"


def test_every_method_has_a_formula_but_the_targets(generate: ModuleType) -> None:
    formulas = generate._formulas()
    for family in generate.families():
        if family.folder != "target":
            for name in family.registry.names():
                assert f"{family.folder}: {name}" in formulas, "write it in docs/formulas.md"


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path = target.partition("#")[0]
            if path and "://" not in path and not (page.parent / path).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_every_benchmark_and_result_has_its_line() -> None:
    """A published figure without a command that repeats it, or a script without a line, is an omission."""
    folder = ROOT / "benchmarks"
    page = (folder / "README.md").read_text(encoding="utf-8")
    for result in (folder / "results").glob("*.md"):
        assert f"(results/{result.name})" in page, f"benchmarks/README.md lacks {result.name}"
    for script in folder.glob("*.py"):
        assert f"benchmarks/{script.name}" in page, f"benchmarks/README.md lacks {script.name}"
