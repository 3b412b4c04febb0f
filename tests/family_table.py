"""What the commands make of every model that transformers knows: measure it, keep it, and write docs/families.md.

Run from the repository's root: ``python -m tests.family_table`` measures what tests/families.json lacks and writes the
page. ``--part 2/5`` measures every fifth family, beginning with the second; ``--again`` measures what is there, too.
The column ``onnxruntime`` needs its runtime: ``sparsedeploy runtime install onnxruntime``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsedeploy.runtimes.environments import Environment
from sparsedeploy.runtimes.worker import Worker

TABLE = Path(__file__).with_name("families.json")
PAGE = Path(__file__).parent.parent / "docs" / "families.md"
# Stands where a row is older than what would be measured; the next run measures it.
NOT_MEASURED = "not measured"
_HEAD = """# Families

What the commands make of every model that transformers {version} builds small from its configuration: {causal} types of
its auto-mapping of causal LMs, then {more} more that also see or hear. Each is a random model of five layers, with
sliding windows of {window} tokens, experts and shared caches where its configuration has them.

- **masks**: six sequences are pruned to 50 % by Wanda, four at once; every mask is compared with one from hooks on
  whole forward passes of transformers (`tests/oracle.py`). `equal` means every mask, bit for bit, in float32.
- **eval**: the perplexity of three windows of {prompt} tokens against the definition, by whole forward passes with
  plain attention; within {rounding:g}. Then the same for rotary frequencies that switch at {switch} tokens, where the
  family takes them (`longrope`): `eval` is equal across the switch, and both exports are refused with a remedy.
- **deepsparse**, **onnxruntime**: the exported graph over {prompt} tokens of prompt and {steps} decoded ones, against
  whole forward passes: logits within {rounding:g} of the largest, and the same decoded tokens.

What is not equal is refused in one line before anything is written. A row is `not built` where transformers itself
cannot build the model, and `not tested` where that needs a package that is not installed.
`python -m tests.family_table` writes this page ({seconds:.0f} s of processor time); `tests/models/test_families.py`
holds the code to it.
"""


def load_table() -> dict[str, dict[str, Any]]:
    """Family -> column -> verdict, and the processor seconds of all columns."""
    text = TABLE.read_text() if TABLE.exists() else ""
    table: dict[str, dict[str, Any]] = json.loads(text or "{}")
    return table


def page(table: dict[str, dict[str, Any]]) -> str:
    """The page that shows a table."""
    import transformers

    from tests import families as known
    from tests import family_outcomes as made
    from tests.family_configs import WINDOW

    causal, more = known.families(), known.multimodal()
    text = _HEAD.format(
        version=transformers.__version__,
        causal=len(causal),
        more=len(more),
        window=WINDOW,
        prompt=made.PROMPT,
        switch=made.SWITCH,
        steps=made.STEPS,
        rounding=made.ROUNDING,
        seconds=sum(row["seconds"] for row in table.values()),
    )
    return text + _rows("Causal language models", causal, table) + _rows("Models that also see or hear", more, table)


def _rows(title: str, names: list[str], table: dict[str, dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    lines = []
    for name in names:
        row = table[name]
        cells = [row["masks"], _pair(row["eval"], row["longrope"]), row["deepsparse"], row["onnxruntime"]]
        lines.append(f"| {name} | {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        for column, cell in zip(("masks", "eval", "deepsparse", "onnxruntime"), cells, strict=True):
            key = f"{column}: {_kind(cell)}"
            counts[key] = counts.get(key, 0) + 1
    total = "; ".join(f"{key} {count}" for key, count in sorted(counts.items()))
    head = "| family | masks | eval | deepsparse | onnxruntime |\n|---|---|---|---|---|\n"
    return f"\n## {title}\n\n{total}.\n\n{head}" + "\n".join(lines) + "\n"


def _kind(cell: str) -> str:
    """What a cell says, in one or two words."""
    words = cell.split(":", maxsplit=1)[0].split(" ")
    return "equal but for ties" if words[0].isdigit() else " ".join(words[:2]) if words[0] == "not" else words[0]


def _pair(plain: str, longrope: str) -> str:
    return plain if longrope in ("-", plain) else f"{plain}; longrope: {longrope}"


@contextlib.contextmanager
def one_worker() -> Iterator[None]:
    """Let all exports share one process of a runtime: starting it takes longer than an export."""
    start, kept = Environment.worker, contextlib.ExitStack()
    workers: dict[str, Worker] = {}

    @contextlib.contextmanager
    def shared(self: Environment, timeout: float = 600.0) -> Iterator[Worker]:
        if self.runtime.name not in workers:
            workers[self.runtime.name] = kept.enter_context(start(self, timeout))
        yield workers[self.runtime.name]

    Environment.worker = shared  # type: ignore[assignment, method-assign]
    try:
        with kept:
            yield
    finally:
        Environment.worker = start  # type: ignore[method-assign]


def _add(name: str, row: dict[str, Any]) -> None:
    """Write a row into the table, which other parts write to, too."""
    with open(Path(tempfile.gettempdir()) / "family_table.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = TABLE.with_suffix(".partial")
        made.write_text(json.dumps({**load_table(), name: row}, indent=1, sort_keys=True) + "\n")
        made.replace(TABLE)


def main() -> None:
    from tests.families import families, multimodal
    from tests.family_outcomes import outcomes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="1/1", help="K/N: every N-th family, beginning with the K-th")
    parser.add_argument("--again", action="store_true", help="measure also what the table has")
    parser.add_argument("names", nargs="*", help="only these families")
    asked = parser.parse_args()
    logging.disable(logging.ERROR)
    first, step = map(int, asked.part.split("/"))
    everything = [*families(), *multimodal()]
    wanted = asked.names or everything[first - 1 :: step]
    with one_worker():
        for name in wanted:
            known = load_table().get(name, {"masks": NOT_MEASURED})
            if NOT_MEASURED not in known.values() and not asked.again:
                continue
            started = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                row: dict[str, Any] = dict(outcomes(name, Path(folder)))
            row["seconds"] = round(time.process_time() - started, 2)
            print(name, row, file=sys.stderr, flush=True)
            _add(name, row)
    if set(load_table()) >= set(everything):
        PAGE.write_text(page(load_table()))


if __name__ == "__main__":
    main()
