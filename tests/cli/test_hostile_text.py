"""Texts, recipes and numbers of the command line, hostile by the dozen: one clear line, or the right result."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.workflows.recipes import load_recipe
from tests.cli.conftest import Outcome
from tests.cli.mutations import FILES, OTHERS, damaged_bytes, unless_refused
from tests.cli.test_bad_input import prune
from tests.cli.test_hostile_json import answered

Cli = Callable[..., Outcome]
# What some program somewhere takes for the end of a line, or for nothing.
SEPARATORS = ("\n", "\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\ufeff", "\0")
ROWS = ('{"text": "a b"}', '{"text": "\\u2028"}', "{}", "null", "[]", "3", '"x"', '{"text": null}', '{"text": 3}')
NAMES = ("a.txt", "a.jsonl", "a.json")


@pytest.mark.parametrize("seed", range(3))
def test_documents(tmp_path: Path, seed: int) -> None:
    """A file has one reading, alone or in a folder; rows are those that JSON and ``\\n`` give."""
    generator = random.Random(seed + OTHERS)
    for _ in range(60):
        separator = generator.choice(SEPARATORS)
        rows = generator.choices(ROWS, k=generator.randrange(1, 4))
        if generator.random() < 0.5:
            rows = [ROWS[0]] * len(rows)
        content = separator.join(rows)
        name = generator.choice(NAMES)
        if name == "a.json" and generator.random() < 0.5:
            content = f"[{','.join(rows)}]"
        if generator.random() < 0.2:
            content = "\ufeff" + content
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        alone, inside = (unless_refused(lambda at=at: load_documents(str(at))) for at in (tmp_path / name, tmp_path))
        assert alone == inside, content
        assert alone is None or alone == _expected(name, content), content
        (tmp_path / name).unlink()


def test_files_that_are_no_rows(tmp_path: Path) -> None:
    sound = b'{"text": "one"}\n{"text": "two"}\n'
    for name in ("a.jsonl", "a.json"):
        for content in (*FILES, *damaged_bytes(sound, 40, 1)):
            (tmp_path / name).write_bytes(content)
            documents = unless_refused(lambda at=tmp_path / name: load_documents(str(at)))
            assert documents is None or documents == _expected(name, content.decode("utf-8-sig")), content


def _expected(name: str, content: str) -> list[str]:
    content = content.removeprefix("\ufeff").replace("\r\n", "\n")
    if name == "a.txt":
        return [content]
    whole = name == "a.json" and content.lstrip().startswith("[")
    rows = json.loads(content) if whole else [json.loads(line) for line in content.split("\n") if line.strip()]
    return [row["text"] for row in rows if row["text"].strip()]


RECIPE = "title: t\nprune:\n  sparsity: 0.5\n  method: wanda\n  pattern: 2:4\ncalibration: {data: a, sequences: 2}\n"
YAML_VALUES = (
    *(".inf", "-.nan", "1e999", "0x10", "0o7", "1_000", "2:4", "2001-01-01", "yes", "~", "null", "[]", "{}", "[1, 2]"),
    *("{a: b}", "!!python/object:os.system x", "!!binary aGk=", "&a x", "*a", "'", '"\\x1b[2J"', "|", "-1", "0"),
    *("9" * 5000, "x" * 5000, "0.5.5", "50%", "'0.5'", "\t", "?", "@", "`", "1.5", "true", "<<: {a: b}"),
)


@pytest.mark.parametrize("key", ["sparsity", "method", "pattern", "data", "sequences", "title"])
def test_recipes(tmp_path: Path, key: str) -> None:
    """Each value in each place: read as a value of the option's type, or refused naming the recipe."""
    path = tmp_path / "r.yaml"
    kinds = {"sparsity": float, "sequences": int, "title": str, "data": str, "method": str, "pattern": str}
    for value in YAML_VALUES:
        start = RECIPE.index(f"{key}: ") + len(key) + 2
        ends = [at for at in (RECIPE.find(end, start) for end in (",", "\n", "}")) if at > 0]
        path.write_text(RECIPE[:start] + value + RECIPE[min(ends) :])
        recipe = unless_refused(lambda: load_recipe(str(path)))
        if recipe is None:
            continue
        found = {"title": recipe.title, **recipe.sections.get("prune", {}), **recipe.sections.get("calibration", {})}
        assert isinstance(found.get(key, kinds[key]()), kinds[key]), value


def test_damaged_recipes(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for content in (*FILES, *damaged_bytes(RECIPE.encode(), 60, 2)):
        path.write_bytes(content)
        unless_refused(lambda: load_recipe(str(path)))


NUMBERS = (
    *("0", "-1", "1", "2", "1e9", "1000000000", "9" * 19, "9" * 40, "1.5", "0x10", "nan", "inf", "-inf", "1e308", ""),
    *(
        " 1",
        "1_0",
        "١",
        "½",
        "+1",
        "--",
        "NaN",
        "None",
        "true",
        "1,5",
        "1;2",
        "0.5",
        "1e-400",
        "2**3",
        "1\n",
        "\x1b[2J",
    ),
)
FLAGS = ("--sparsity", "--samples", "--calibration-length", "--seed", "--batch-size")


@pytest.mark.parametrize("flag", FLAGS)
def test_numbers_of_prune(cli: Cli, model: Path, text: Path, flag: str) -> None:
    """Against a text of 2,700 tokens: a checkpoint of the asked sparsity, or one line; never hours of work."""
    for value in NUMBERS:
        if "\0" in value:
            continue
        sparsity = () if flag == "--sparsity" else ("-s", 0.5)
        outcome = prune(cli, model, text, *sparsity, flag, value, "--overwrite")
        if not answered(outcome, f"{flag} {value}".encode()):
            manifest = json.loads((model.parent / "out" / "sparsity.json").read_text())
            asked = float(value) if flag == "--sparsity" else 0.5
            assert abs(manifest["plan"]["achieved"] - asked) < 0.01 if "achieved" in manifest["plan"] else True


@pytest.mark.parametrize("flag", ["--context", "--max-windows", "--batch-size"])
def test_numbers_of_eval(cli: Cli, model: Path, text: Path, flag: str) -> None:
    for value in NUMBERS:
        defaults = {"--context": 64, "--max-windows": 2, flag: value}
        outcome = cli("eval", model, "-d", text, *(word for pair in defaults.items() for word in pair), "--json")
        if not answered(outcome, f"{flag} {value}".encode()):
            assert json.loads(outcome.out)["windows"] <= (int(value) if flag == "--max-windows" else 2)


def test_tokenizers_of_other_models(cli: Cli, model: Path, text: Path) -> None:
    """Fewer rows than tokens is refused; a tokenizer with fewer tokens is not an error by itself."""
    config = json.loads((model / "config.json").read_text())
    tokens = len(AutoTokenizer.from_pretrained(model))
    for size in (1, 2, 100, 255, 256, 257, 258, tokens, tokens + 1, tokens + 1000):
        (model / "config.json").write_text(json.dumps({**config, "vocab_size": size}))
        outcome = cli("eval", model, "-d", text, "--context", 32)
        assert answered(outcome, str(size).encode()) == (size != tokens), (size, outcome.err)
