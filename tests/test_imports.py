"""Imports run one way, down the floors: nothing imports what stands above it, and nothing imports in a circle."""

import ast
from pathlib import Path

import sparsedeploy

PACKAGE = Path(sparsedeploy.__file__).parent

# From the top down. Modules on one floor do not import each other's packages, save inside one package.
FLOORS = (
    ("cli", "__main__"),
    ("workflows",),
    ("reporting",),
    ("speed",),
    ("targets",),
    ("quality",),
    ("recovery",),
    ("pruning",),
    ("allocation",),
    ("runtimes",),
    ("artifacts",),
    ("calibration",),
    ("checkpoint",),
    ("models", "reference"),
    ("formats",),
    ("plan", "masks", "grid", "processes"),
    ("registry", "folders", "hub", "reading", "resources", "linear_algebra", "memory"),
    ("conversion",),
    ("options", "paths", "machine"),
    ("errors", "progress", "startup", "version"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a package is its ``__init__``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "_shipped":
            continue
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, anywhere in it, for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sparsedeploy":
            base = node.module.partition(".")[2]
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                found.add(name if name in known else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("sparsedeploy.")}
    return found & known.keys() - {""}


def test_every_module_stands_on_a_floor() -> None:
    assert {name.split(".")[0] for name in modules()} - {""} == FLOOR.keys()


def test_no_import_runs_uphill() -> None:
    known = modules()
    uphill = []
    for name, path in known.items():
        if name in ("", "__main__"):  # the package itself only registers the packed format with transformers
            continue
        here = name.split(".")[0]
        for imported in imports(path, known):
            there = imported.split(".")[0]
            if there != here and FLOOR[there] <= FLOOR[here]:
                uphill.append(f"{name} -> {imported}")
    assert not uphill


def test_no_import_runs_in_a_circle() -> None:
    known = modules()
    graph = {name: imports(path, known) - {name} for name, path in known.items() if name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name in done:
            return
        for imported in sorted(graph[name]):
            visit(imported, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())
