"""The generated pages say what the code says, and every link leads somewhere."""

import re
import sys
from types import ModuleType
from typing import Any

import pytest

from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES, Registry
from tests.scripts import ROOT, load_script


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs"))  # as for a script
    return load_script("docs/generate.py")


def test_no_page_is_stale(generate: ModuleType) -> None:
    stale = [str(path.relative_to(ROOT)) for path in generate.stale()]
    assert not stale, f"run make docs: {', '.join(stale)}"


def test_every_method_has_a_formula_but_the_targets(generate: ModuleType) -> None:
    formulas = generate._formulas()
    for family in generate.families():
        if family.folder != "target":
            for name in family.registry.names():
                assert f"{family.folder}: {name}" in formulas, "write it in docs/formulas.md"


@pytest.mark.parametrize("registry", [ALLOCATORS, PRUNERS, RECOVERIES], ids=lambda each: each.variable)
def test_every_method_cites_its_paper_and_equation(registry: Registry[Any]) -> None:
    for method in registry:
        text = sys.modules[method.function.__module__].__doc__ or ""
        if method.name in ("uniform", "auto"):  # from no paper
            assert "arXiv" not in text
            continue
        assert re.search(r"arXiv\s\d{4}\.\d{5}|ICLR\s2026", text), f"{method.name} names no paper"
        assert re.search(r" = | ~ |\beq\. \d|\balgorithm \d", text), f"{method.name} has no equation"


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
