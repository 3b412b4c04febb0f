"""What a shell offers for the word that is being typed: names of methods, allocations, recipes, targets and runtimes.

Everything here answers from names of files: nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sparsedeploy.runtimes.specification import runtime_names


def offers(names: Callable[[], Iterable[object]]) -> Callable[[str], list[str]]:
    """A completion from names that are asked for when they are needed; after a comma the next one is offered."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in map(str, names()) if name.startswith(last)]

    return complete


complete_runtime = offers(runtime_names)
