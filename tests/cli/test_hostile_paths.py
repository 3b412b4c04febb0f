"""Paths that bite, given as every argument that is a path: one clear line and exit code 2, or the right result."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.cli.conftest import Outcome, contents
from tests.cli.test_bad_input import prune, refused
from tests.cli.test_hostile_json import answered

Cli = Callable[..., Outcome]


def odd_paths(place: Path) -> list[str]:
    """Names of things that are there and are not what is asked for, and of nothing."""
    (place / "file").write_text("x")
    (place / "empty").mkdir()
    (place / "full").mkdir()
    (place / "full" / "precious").write_text("x")
    (place / "dangling").symlink_to("gone")
    (place / "circle").symlink_to("circle")
    (place / "to_empty").symlink_to("empty")
    (place / "to_file").symlink_to("file")
    os.mkfifo(place / "pipe")
    (place / "locked").mkdir()
    (place / "locked").chmod(0o500)
    inside = ("file", "empty", "full", "dangling", "circle", "to_empty", "to_file", "pipe", "locked/x", "file/x")
    odd = ("a b", "m[/b]", "-x", "ünï", "x\ny", "\x1b[2J", "x" * 255, "x" * 256, "a/b/c", ".hidden", "full/../full")
    elsewhere = (
        "",
        ".",
        "..",
        "/",
        "/dev/null",
        "/dev/stdin",
        "/proc/self/x",
        "/proc/1/mem",
        "~nosuchuser/x",
        "x" * 5000,
    )
    return [*(str(place / name) for name in (*inside, *odd)), *elsewhere, "/dev/full", "//", "\udcff"]


def test_models(cli: Cli, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(model.parent)
    for path in odd_paths(model.parent):
        assert answered(cli("eval", path, "-d", text, "--context", 32), path.encode(errors="replace")), path
        assert answered(cli("inspect", path), path.encode(errors="replace")), path


def test_texts(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    readable = {str(model.parent / name) for name in ("file", "to_file", "full", "full/../full")} | {".", ".."}
    for path in odd_paths(model.parent):
        if path in ("..", "/", "//"):  # the folders of the machine
            continue
        refused = answered(cli("eval", model, "-d", path, "--context", 32), path.encode(errors="replace"))
        assert refused or path in readable, path


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_outputs(cli: Cli, model: Path, text: Path, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays; a run that succeeds has written the whole checkpoint there and nothing beside it."""
    (model.parent / "work").mkdir()
    monkeypatch.chdir(model.parent / "work")
    for path in odd_paths(model.parent / "work"):
        before = contents(model.parent)
        outcome = cli("prune", model, "-o", path, "-s", 0.5, "-m", "magnitude", *more)
        if answered(outcome, path.encode(errors="replace")):
            continue
        made = Path(path).resolve()
        assert len(load_file(made / "model.safetensors")) == 21, path
        assert cli("inspect", made).code == 0
        shutil.rmtree(made)
        after = contents(model.parent)
        assert {name for name in before if name not in after} <= {"work/empty"}, path


def test_overwriting_what_is_read(cli: Cli, model: Path, text: Path) -> None:
    """The output may not be, hold, or lie in an input, however it is written."""
    assert prune(cli, model, text, "-s", 0.5).code == 0
    pruned = model.parent / "out"
    (model.parent / "alias").symlink_to("out")
    (pruned / "inner").mkdir()
    shutil.copyfile(text, pruned / "inner" / "text.txt")
    for output in (
        pruned,
        pruned / ".",
        pruned.parent / "alias",
        pruned / "..",
        pruned.parent,
        pruned / "inner" / "..",
    ):
        for source in (pruned, pruned.parent / "alias", pruned / "inner" / ".."):
            outcome = cli("prune", source, "-o", output, "-s", 0.6, "-m", "magnitude", "--overwrite")
            assert answered(outcome, str(output).encode()), (source, output)
    options = ("-s", 0.5, "-n", 2, "--calibration-length", 32, "--overwrite")
    outcome = cli("prune", model, "-o", pruned, "--data", pruned / "inner" / "text.txt", *options)
    assert answered(outcome, b"a text inside the output")


@pytest.mark.parametrize("place", ["sub", "sub/deep", "../dense/sub", "../alias/sub"])
def test_no_command_writes_into_what_it_reads(cli: Cli, model: Path, text: Path, place: str) -> None:
    """A folder in the model's would travel with its next copy, and one in the text's be read as text."""
    parent = model.parent
    (parent / "alias").symlink_to("dense")
    (parent / "texts").mkdir()
    shutil.copyfile(text, parent / "texts" / "a.txt")
    (parent / "sweep.yaml").write_text(f"model: {model}\nrates: [0.5]\nmethods: [magnitude]\neval: {{data: {text}}}\n")
    assert prune(cli, model, text, "-s", 0.5).code == 0
    pruned, plain = parent / "out", ("-s", 0.5, "-m", "magnitude")
    train = ("-m", "lora", "--train-data", text, "--train-length", 32)
    commands: list[tuple[object, ...]] = [
        ("prune", model, "-o", model / place, *plain),
        ("prune", model, "-o", model / place, *plain, "--overwrite"),
        ("prune", model, "-o", model / place, *plain, "--engine", "llmcompressor"),
        ("prune", model, "-o", model / place, *plain, "--recover", "lora", "--train-data", text),
        ("export", model, "-o", model / place, "--target", "deepsparse"),
        ("recover", pruned, "-o", pruned / "sub", *train),
        ("recover", pruned, "-o", model / place, "-m", "losa", "--dense", model, *train[2:]),
        ("sweep", parent / "sweep.yaml", "-o", model / place),
        ("deploy", model, "-o", model / place, "-d", text, "--held-out", parent / "texts"),
        ("demo", "--model", model, "-o", model / place),
    ]
    if place == "sub":
        sub = parent / "texts" / "sub"
        commands += [
            ("prune", model, "-o", sub, "-s", 0.5, "--data", parent / "texts"),
            ("recover", pruned, "-o", sub, "-m", "lora", "--train-data", parent / "texts"),
            ("deploy", model, "-o", sub, "-d", text, "--held-out", parent / "texts"),
        ]
    for command in commands:
        refused(cli(*command), "lies in the input", parent)
    assert not (model / "sub").exists()
    assert not (pruned / "sub").exists()
    assert [path.name for path in (parent / "texts").iterdir()] == ["a.txt"]


def test_a_default_is_an_input_only_where_it_is_read(cli: Cli, model: Path, text: Path, monkeypatch: Any) -> None:
    """A folder has the name of the default of --data; what does not read text may write into it."""
    monkeypatch.chdir(model.parent)
    Path("c4").mkdir()
    shutil.copyfile(text, "c4/a.txt")
    Path("sweep.yaml").write_text(
        "model: dense\nrates: [0.5]\nmethods: [magnitude]\neval: {data: text.txt, context: 32, max_windows: 1}\n"
    )
    plain = ("-s", 0.5, "-m", "magnitude")
    train = ("--train-data", "text.txt", "--train-length", 32, "--train-samples", 32)
    commands: list[tuple[object, ...]] = [
        ("prune", "dense", "-o", "c4/pruned", *plain),
        ("prune", "dense", "-o", "c4/trained", *plain, "--recover", "sparse-lora", *train),
        ("recover", "c4/pruned", "-o", "c4/again", "-m", "sparse-lora", *train),
        ("allocate", "dense", "-o", "c4/plan.json", "-s", 0.5),
        ("sweep", "sweep.yaml", "-o", "c4/swept"),
    ]
    for command in commands:
        outcome = cli(*command)
        assert outcome.code == 0, outcome.err
    for command in (
        ("prune", "dense", "-o", "c4/out", "-s", 0.5, "-m", "wanda"),
        ("prune", "dense", "-o", "c4/out", *plain, "--reconstruct"),
        ("prune", "dense", "-o", "c4/out", *plain, "--recover", "losa", *train),
        ("prune", "dense", "-o", "c4/out", *plain, "--engine", "llmcompressor"),
        ("recover", "c4/pruned", "-o", "c4/out", "-m", "losa", "--data", "c4", *train),
        ("allocate", "dense", "-o", "c4/new.json", "-s", 0.5, "-a", "owl"),
        ("allocate", "dense", "-o", "c4/new.json", "-s", 0.5, "-a", "atp", "--allocation-option", "search=true"),
    ):
        refused(cli(*command), "lies in the input c4", model.parent)


def test_an_import_replaces_its_own_folder(cli: Cli, model: Path) -> None:
    """Its output is a folder, so an older one is nothing else."""
    (model.parent / "x.gguf").write_bytes(b"GGUF")
    (model.parent / "imported").mkdir()
    outcome = cli("import", model.parent / "x.gguf", "-o", model.parent / "imported", "--overwrite")
    refused(outcome, "x.gguf is damaged", model.parent)


@pytest.mark.parametrize("word", ["owl", "block"])
def test_a_word_that_is_also_a_folder(cli: Cli, model: Path, text: Path, word: str, monkeypatch: Any) -> None:
    """A method's or an option's name is not a path: what has the same name may be written into, again and again."""
    monkeypatch.chdir(model.parent)
    text_of = ("-d", text, "-n", 2, "--calibration-length", 32)
    chosen = ("-a", "owl") if word == "owl" else ("-a", "lsa", "--allocation-option", "granularity=block")
    command = ("allocate", model, "-o", f"{word}/plan.json", "-s", 0.5, *chosen, *text_of, "--overwrite")
    for _ in range(2):
        outcome = cli(*command)
        assert outcome.code == 0, outcome.err
    Path(word, "again.json").write_text("{}")
    outcome = cli("eval", model, "-d", text, "--data-field", word, "--context", 32, "-o", f"{word}/again.json")
    assert outcome.code == 0, outcome.err


def test_a_value_that_is_also_a_folder(cli: Cli, model: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(model.parent)
    Path("64").mkdir()
    outcome = cli("export", model, "--target", "deepsparse", "--target-option", "max_positions=64", "-o", "64/out")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    "options", [("--plan", "out/plan.json"), ("-s", 0.5, "-a", "auto", "--allocation-option", "text=out/text.txt")]
)
def test_a_folder_that_holds_what_is_read_is_not_replaced(
    cli: Cli, model: Path, text: Path, options: tuple[object, ...], monkeypatch: Any
) -> None:
    monkeypatch.chdir(model.parent)
    assert prune(cli, model, text, "-s", 0.5).code == 0
    assert cli("allocate", model, "-s", 0.5, "-o", "plan.json").code == 0
    shutil.move("plan.json", "out/plan.json")
    shutil.copyfile(text, "out/text.txt")
    outcome = cli("prune", model, "-o", "out", "-m", "magnitude", *options, "--overwrite")
    refused(outcome, "output out holds the input out/", model.parent)


@pytest.mark.parametrize("there", [False, True], ids=["new", "existing"])
def test_a_result_is_not_written_into_what_is_read(cli: Cli, model: Path, text: Path, there: bool) -> None:
    """The first run says what the second would say; what lies in a text's folder would be read as text."""
    texts, parent = text.parent / "texts", model.parent
    texts.mkdir()
    shutil.copyfile(text, texts / "a.txt")
    assert prune(cli, model, text, "-s", 0.5).code == 0
    if there:
        for place in (texts, model, parent / "out"):
            (place / "r.json").write_text("{}")
    for command, place in (
        (("eval", model, "-d", texts), texts),
        (("eval", model, "-d", f"mine={texts}"), texts),
        (("eval", model, "-d", text), model),
        (("allocate", model, "-s", 0.5, "-d", texts, "--overwrite"), texts),
        (("allocate", model, "-s", 0.5, "-a", "atp", "--allocation-option", f"text={texts}", "--overwrite"), texts),
        (("bench", parent / "out", "--baseline", model), model),
        (("bench", f"torch={parent / 'out'}", "--baseline", model), parent / "out"),
    ):
        refused(cli(*command, "-o", place / "r.json"), "lies in the input", parent)


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "out", "--plot", "a.svg", "--mask", "a.svg"),
        ("bench", "out", "--baseline", "dense", "-o", "a.json", "--csv", "./a.json"),
        ("bench", "out", "--baseline", "dense", "--html", "a.html", "--csv", "b/../a.html"),
    ],
)
def test_one_file_for_two_outputs(
    cli: Cli, model: Path, text: Path, command: tuple[str, ...], monkeypatch: Any
) -> None:
    monkeypatch.chdir(model.parent)
    assert prune(cli, model, text, "-s", 0.5).code == 0
    refused(cli(*command), "is given for two outputs", model.parent)


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (("push", "", "me/x"), "an argument"),
        (("push", "pruned", ""), "an argument"),
        (("prune", "", "-o", "out", "-s", "0.5"), "an argument"),
        (("prune", ".", "-o", "", "-s", "0.5"), "-o"),
        (("inspect", ""), "an argument"),
        (("inspect", ".", "--against", ""), "--against"),
        (("eval", ".", "--data="), "--data"),
        (("bench", "", "--baseline", "."), "an argument"),
        (("serve", ".", "--host", ""), "--host"),
        (("serve", ".", "--host="), "--host"),
        (("generate", ".", ""), "an argument"),
        (("generate", ".", "--", ""), "an argument"),
    ],
)
def test_an_empty_argument_is_not_the_working_folder(
    cli: Cli, model: Path, command: tuple[str, ...], what: str, monkeypatch: Any
) -> None:
    """Not even in a folder that would do, and no server on all addresses."""
    assert cli("prune", model, "-o", model.parent / "pruned", "-s", 0.5, "-m", "magnitude").code == 0
    monkeypatch.chdir(model.parent / "pruned")
    refused(cli(*command), f"{what} is empty", model.parent)


def test_a_prompt_may_look_like_an_option(cli: Cli, model: Path) -> None:
    assert "has no artifact.json" in cli("generate", model, "--", "--x=").err


def test_a_word_may_start_with_a_tilde(cli: Cli, model: Path, text: Path) -> None:
    outcome = cli("eval", model, "-d", text, "--data-field", "~nobody", "--context", 32)
    assert outcome.code == 0, outcome.err
