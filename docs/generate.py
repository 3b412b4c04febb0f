"""Write the pages of docs/ that come from the code: one per command, one per method, and tables in written pages.

``make docs`` runs it; a test fails when a page is stale. Adding a command, a method or an option changes the pages by
itself; formulas are written by hand in ``formulas.md`` and included by name.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from command_pages import Command, command_index, command_page
from page_text import DOCS, NOTE, ROOT, cell, prose, table

from sparsedeploy.allocation import MixedOptions
from sparsedeploy.cli.main import app
from sparsedeploy.options import Facts, described
from sparsedeploy.recovery.training import TrainingOptions
from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES, TARGETS, Method, Registry

_BLOCK = re.compile(r"<!-- generated: (?P<name>[^>]+?) -->\n.*?<!-- end -->", re.DOTALL)
_EXPORTED_HERE = ("deepsparse", "vllm", "llmcompressor")  # targets that are written without their runtime's environment
_NEEDS = {
    "none": "nothing: neither calibration text nor weights",
    "weights": "the weights only, no calibration text",
    "inputs": "the hidden states of calibration text",
    "sum_squares": "calibration text (norms of each linear's inputs)",
    "hessian": "calibration text (second moments of each linear's inputs)",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One registry: where its pages lie, what the user types, and an example that runs."""

    title: str
    folder: str
    registry: Registry[Any]
    flag: str
    option_flag: str
    example: str


def families() -> list[Family]:
    """The registries, in the order of the pipeline."""
    data = "\\\n    --data my-text.txt --samples 8 --calibration-length 128"  # left out where no text is read
    train = "\\\n    --train-data my-text.txt --train-samples 32 --train-length 128"
    return [
        Family(
            "Allocations",
            "allocation",
            ALLOCATORS,
            "--allocation",
            "--allocation-option",
            f"sparsedeploy allocate MODEL -o plan.json --sparsity 0.7 --allocation {{name}} {data}",
        ),
        Family(
            "Pruning methods",
            "pruning",
            PRUNERS,
            "--method",
            "--method-option",
            f"sparsedeploy prune MODEL -o sparse --sparsity 0.7 --method {{name}} {data}",
        ),
        Family(
            "Recovery methods",
            "recovery",
            RECOVERIES,
            "--recover",
            "--recover-option",
            f"sparsedeploy recover pruned -o recovered --method {{name}} {train}",
        ),
        Family(
            "Export targets",
            "target",
            TARGETS,
            "--target",
            "--target-option",
            "sparsedeploy export pruned --target {name} -o artifact",
        ),
    ]


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    commands = [Command(str(info.name), info.callback) for info in app.registered_commands]
    commands += [Command(str(info.name), None, info.typer_instance) for info in app.registered_groups]
    found: dict[Path, str] = {DOCS / "commands" / "README.md": command_index(commands)}
    for command in commands:
        found[DOCS / "commands" / f"{command.name}.md"] = command_page(command)
    formulas = _formulas()
    training = formulas.pop("training")
    found[DOCS / "methods" / "README.md"] = _method_index()
    found[DOCS / "methods" / "patterns.md"] = _patterns_page(formulas)
    for family in families():
        for method in family.registry:
            page = _method_page(family, method, formulas.pop(f"{family.folder}: {method.name}", None), training)
            found[DOCS / "methods" / family.folder / f"{method.name}.md"] = page
    formulas.pop("patterns", None)
    rounding = formulas.pop("rounding: `--quantize`", None)
    if rounding is not None:
        found[DOCS / "methods" / "rounding.md"] = f"{NOTE}# Rounding in the sweep: `prune --quantize`\n\n{rounding}\n"
    if formulas:
        raise SystemExit(f"formulas.md has sections of methods that do not exist: {', '.join(formulas)}")
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if _BLOCK.search(text):
            found[path] = _BLOCK.sub(_block, text)
    return found


def stale() -> list[Path]:
    """Pages that differ from what the code says now, and pages of what no longer exists."""
    wanted = pages()
    changed = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    return changed + _leftovers(wanted)


def _leftovers(wanted: Iterable[Path]) -> list[Path]:
    there = {path for folder in ("commands", "methods") for path in (DOCS / folder).rglob("*.md")}
    return sorted(there - set(wanted))


def _block(match: re.Match[str]) -> str:
    """A block of a written page, with what stands between its two marker lines made anew."""
    name, _, rest = match["name"].partition(" ")
    content = {"knows": _knows, "runtimes": _runtimes}[name]() if name != "quote" else _quote(*rest.split("; "))
    return f"<!-- generated: {match['name']} -->\n{content}<!-- end -->"


def _quote(file: str, heading: str, rows: str = "") -> str:
    """The first table after a line of a results file that has ``heading`` in it.

    Args:
        rows: a regular expression; only the table's rows that it finds are quoted. Empty takes all.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    _, found, rest = text.partition(heading)
    found_table = re.search(r"^(\|.*\n\|[-:| ]+\|\n)((?:\|.*\n)+)", rest, re.MULTILINE)
    if not found or found_table is None:
        raise SystemExit(f"{file} has no table after '{heading}': the quotes of it in docs/ need another look")
    kept = [row for row in found_table[2].splitlines() if re.search(rows, row)]
    if not kept:
        raise SystemExit(f"the table after '{heading}' in {file} has no row like '{rows}'")
    return found_table[1] + "".join(f"{row}\n" for row in kept)


def _method_index() -> str:
    parts = [
        f"{NOTE}# Methods\n\nWhat is registered, by name. Adding one means adding one file; it then appears here.\n"
    ]
    for family in families():
        rows = [
            (f"[{method.name}]({family.folder}/{method.name}.md)", cell(method.summary)) for method in family.registry
        ]
        parts.append(f"## {family.title} (`{family.flag}`)\n\n{table(('name', 'what it does'), rows)}")
    recipes = [
        (file.stem, yaml.safe_load(file.read_text("utf-8"))) for file in sorted((ROOT / "recipes").glob("*.yaml"))
    ]
    listed = [
        (f"[{name}](../../recipes/{name}.yaml)", cell(recipe["title"]), cell(recipe["source"]))
        for name, recipe in recipes
    ]
    parts.append(f"## Recipes (`--recipe`)\n\n{table(('name', 'what it does', 'settings from'), listed)}")
    patterns, rounding = "[patterns](patterns.md), unstructured and N:M", "[rounding](rounding.md)"
    parts.append(f"Pages of their own: {patterns}, and {rounding}.\n")
    return "\n".join(parts)


def _method_page(family: Family, method: Method[Any], formula: str | None, training: str) -> str:
    module = sys.modules[method.function.__module__]
    file = Path(inspect.getfile(module)).resolve().relative_to(ROOT).as_posix()
    parts = [f"{NOTE}# {method.name}\n", f"{prose(method.summary)}\n", f"{prose(module.__doc__)}\n"]
    if formula:
        parts.append(f"## Formula and source\n\n{formula}\n")
    facts = _facts(family, method)
    if facts:
        parts.append("## Needs\n\n" + "".join(f"- {fact}\n" for fact in facts))
    example = family.example.format(name=method.name)
    if method.traits.get("needs") in ("none", "weights"):
        example = example.partition(" \\\n    --data")[0]
    if method.traits.get("trains") is False:
        example = example.partition(" \\\n    --train-data")[0]
    managed = family.folder == "target" and method.name not in _EXPORTED_HERE
    marker = "<!-- test: skip needs its managed environment -->\n" if managed else ""
    parts.append(f"## Use\n\n{marker}```bash\n{example}\n```\n")
    parts.append(f"## Options\n\n{_options(method.options, family.option_flag)}")
    if method.traits.get("trains"):
        parts.append(f"## Training\n\n`--loss`:\n\n{training}\n\n{_options(TrainingOptions, '--train-option')}")
    parts.append(f"Code: [{file}](../../../{file}).\n")
    return "\n".join(parts)


def _facts(family: Family, method: Method[Any]) -> list[str]:
    traits = method.traits
    facts = []
    if "needs" in traits:
        facts.append(f"Reads {_NEEDS[traits['needs']]}.")
    if "starts_from" in traits:
        start = {
            "dense": "Starts from the dense model: `prune --recover` runs it at once; `recover` finds the dense model "
            "by the checkpoint's own record, or by `--dense`.",
            "pruned": "Starts from a pruned checkpoint and "
            f"{'moves its masks, at the same budget' if traits.get('moves_masks') else 'keeps its masks'}.",
        }
        facts.append(start[traits["starts_from"]])
        facts.append(f"Training text: {'yes (`--train-data`)' if traits['trains'] else 'no, nothing is trained'}.")
        facts.append(f"Calibration text: {'yes (`--data`)' if traits['calibrates'] else 'no'}.")
    return facts


def _options(options: type[Any], flag: str) -> str:
    items = described(options)
    if not items:
        return "None.\n"
    rows = [
        (
            f"`{item.name}`",
            cell(_hint(item.hint) + _bounds(item.facts)),
            f"`{_plain(item.default)}`",
            cell(item.facts.text),
        )
        for item in items
    ]
    return f"Given as `{flag} NAME=VALUE`.\n\n{table(('name', 'value', 'default', 'meaning'), rows)}"


def _bounds(facts: Facts) -> str:
    limits = ((">=", facts.at_least), (">", facts.above), ("<=", facts.at_most), ("<", facts.below))
    return "".join(f", {sign} {limit:.12g}" for sign, limit in limits if limit is not None)


def _plain(value: Any) -> str:
    """A default as the user would type it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _hint(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if arm is type(None) else _hint(arm) for arm in typing.get_args(hint))
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}.get(hint, str(hint))


def _patterns_page(formulas: dict[str, str]) -> str:
    return (
        f"{NOTE}# Patterns\n\n{formulas.get('patterns', '')}\n\n## Options of mixed patterns\n\n"
        f"{_options(MixedOptions, '--pattern-option')}"
    )


def _formulas() -> dict[str, str]:
    """Section title -> text of formulas.md."""
    text = (DOCS / "formulas.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    return {title.strip(): body.strip() for title, _, body in (section.partition("\n") for section in sections)}


def _knows() -> str:
    rows = [
        (
            f"**{family.title}** (`{family.flag}`)",
            ", ".join(f"[{method.name}](docs/methods/{family.folder}/{method.name}.md)" for method in family.registry),
        )
        for family in families()
    ]
    return table(("", ""), rows)


def _runtimes() -> str:
    rows = []
    for file in sorted((ROOT / "export").glob("*/runtime.yaml")):
        runtime = yaml.safe_load(file.read_text(encoding="utf-8"))
        pins = (file.parent / "requirements.txt").read_text(encoding="utf-8")
        versions = [name for name in runtime["versions"] if re.search(rf"^{re.escape(name)}==", pins, re.MULTILINE)]
        shown = ", ".join(f"{name} {_pin(pins, name)}" for name in versions)
        python = f"{runtime['python']['min']} to {runtime['python']['max']}"
        machines = "; ".join(
            f"{machine} ({' or '.join(flags)})" if flags else machine for machine, flags in runtime["machines"].items()
        )
        targets = ", ".join(runtime.get("targets", []))
        parallel = str(runtime["server"].get("parallel", 1)) if "server" in runtime else "no server"
        rows.append((f"`{file.parent.name}`", cell(runtime["summary"]), targets, shown, python, machines, parallel))
    names = ("runtime", "what it is", "targets", "versions", "Python", "machines", "requests at once")
    return table(names, rows)


def _pin(pins: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}==(\S+)", pins, re.MULTILINE)
    assert found is not None
    return found[1]


def main() -> None:
    """Write the pages, or with ``--check`` name the stale ones and exit with code 1."""
    if "--check" in sys.argv[1:]:
        old = stale()
        for path in old:
            print(f"stale: {path.relative_to(ROOT)}")
        sys.exit(1 if old else 0)
    wanted = pages()
    for path in _leftovers(wanted):
        path.unlink()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"{len(wanted)} pages written")


if __name__ == "__main__":
    main()
