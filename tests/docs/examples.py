"""The fenced bash and python blocks of the documents, and how to run them in this process.

A line ``<!-- test: skip REASON -->`` right before a block keeps it from being run; ``<!-- test: needs deepsparse -->``
runs it only where that engine can run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(
    r"(?:<!-- test: (?P<marker>[^>]+?) -->\n)?```(?P<language>bash|sh|python)\n(?P<code>.*?)```", re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: of its fence in the document.
        skipped: why it is not run, or None.
        engine: the runtime that it needs, or None.
    """

    document: str
    line: int
    language: str
    code: str
    skipped: str | None
    engine: str | None


def documents() -> list[Path]:
    """Every document with examples."""
    return [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path) -> list[Block]:
    """The bash and python blocks of a document, in order."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        kind, _, rest = (match["marker"] or "").partition(" ")
        if kind not in ("", "skip", "needs") or (kind and not rest):
            raise ValueError(f"{document}: unknown marker '{match['marker']}'")
        found.append(
            Block(
                str(document.relative_to(ROOT)),
                text.count("\n", 0, match.start("code")),
                "python" if match["language"] == "python" else "bash",
                match["code"],
                rest if kind == "skip" else None,
                rest if kind == "needs" else None,
            )
        )
    return found


def commands(code: str) -> list[list[str]]:
    """The commands of a bash block as words; continued lines are joined, comments left out."""
    joined = code.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def run(block: Block, sparsedeploy: Callable[..., None], namespace: dict[str, object]) -> None:
    """Run a block in the current folder; python blocks of one document share a namespace."""
    if block.language == "python":
        exec(compile(block.code, f"{block.document}:{block.line}", "exec", dont_inherit=True), namespace)
        return
    for words in commands(block.code):
        if words[0] != "sparsedeploy":
            raise AssertionError(f"{block.document}:{block.line}: the tests do not run {words[0]}: mark the block")
        sparsedeploy(*words[1:])
