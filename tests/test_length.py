"""Files stay short enough to read in one go: one of more than 400 lines says why in its first comment."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 400
SOURCES = (".py", ".cpp", ".inl", ".h")


def test_long_files_give_a_reason() -> None:
    files = [
        path
        for folder in ("sparsedeploy", "export", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCES and path.parent.name != "build" and "_shipped" not in path.parts
    ]
    assert len(files) > 150
    unexplained = []
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > LIMIT and f"more than {LIMIT} lines, because" not in " ".join(lines[:12]):
            unexplained.append(f"{path.relative_to(ROOT)}: {len(lines)} lines")
    assert not unexplained, "split it along a seam, or write into its first comment: more than 400 lines, because ..."
