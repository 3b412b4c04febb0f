"""Tokenizers that bite: every command that reads text says the same of a folder, and what it reads is right."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsedeploy.artifacts.folder import describe_folder
from sparsedeploy.errors import UserError
from sparsedeploy.runtimes.text import load_text_tools
from tests.cli.conftest import Outcome
from tests.cli.test_bad_input import prune
from tests.cli.test_hostile_json import answered, evaluated, perplexity
from tests.runtimes.artifacts import refresh

Cli = Callable[..., Outcome]
Damage = Callable[[Path], object]


def whole(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """Edit ``tokenizer.json``."""
    return lambda folder: edited(folder / "tokenizer.json", edit)


def settings(**values: object) -> Damage:
    """Set lines of ``tokenizer_config.json``."""
    return lambda folder: edited(folder / "tokenizer_config.json", lambda read: read.update(values))


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    edit(values)
    path.write_text(json.dumps(values))


def file(name: str, content: str | bytes) -> Damage:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def only(*damages: Damage) -> Damage:
    """The tokenizer's own files go before the damage."""

    def do(folder: Path) -> None:
        for path in folder.glob("*token*"):
            path.unlink()
        for damage in damages:
            damage(folder)

    return do


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def added(number: int, content: str, special: bool = False) -> Damage:
    token = {"id": number, "content": content, "special": special}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return whole(lambda read: read["added_tokens"].append(token))


def model_of(**values: object) -> Damage:
    return whole(lambda read: read["model"].update(values))


def another(kind: str, **values: object) -> Damage:
    return whole(lambda read: read.update(model={"type": kind, **values}))


def pipe(name: str) -> Damage:
    return lambda folder: os.mkfifo(folder / name)


def template(read: dict[str, Any]) -> None:
    piece = {"SpecialToken": {"id": "<x>", "type_id": 0}}
    token = {"<x>": {"id": "<x>", "ids": [10**6], "tokens": ["<x>"]}}
    single = [piece, {"Sequence": {"id": "A", "type_id": 0}}]
    read["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": token}


WORDS = {"the": 0, "quick": 1, "brown": 2, "<unk>": 3}
LOOP = "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}"
SHORT = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
PAD = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 9, "pad_type_id": 0}
# Kind -> damage, and whether it can be read at all: True, False, or None where either is right.
KINDS: dict[str, tuple[Damage, bool | None]] = {
    "an added token beyond the embedding, unused": (added(259, "<|image|>"), True),
    "an added token beyond the embedding, in the text": (added(259, "quick"), False),
    "a special token beyond the embedding": (both(added(259, "<end>", True), settings(eos_token="<end>")), False),
    "an added token far beyond": (added(2**31 - 1, "<far>"), None),
    "an added token with a negative number": (added(-1, "<minus>"), False),
    "one number for two tokens": (whole(lambda read: read["model"]["vocab"].update(zz=5)), None),
    "a number below zero": (whole(lambda read: read["model"]["vocab"].update(zz=-5)), False),
    "a number beyond 32 bits": (whole(lambda read: read["model"]["vocab"].update(zz=2**40)), False),
    "a number far beyond": (whole(lambda read: read["model"]["vocab"].update(zz=10**7)), False),
    "no vocabulary": (model_of(vocab={}), None),
    "a vocabulary with holes": (whole(lambda read: read["model"]["vocab"].pop("e")), None),
    "a list as vocabulary": (model_of(vocab=["a"]), False),
    "merges of unknown tokens": (model_of(merges=[["zz", "yy"]]), False),
    "merges of one part": (model_of(merges=["x"]), False),
    "an unknown token that is not there": (model_of(unk_token="<none>"), None),
    "another type": (another("WordLevel", vocab=WORDS, unk_token="<unk>"), True),
    "another type without its unknown token": (another("WordLevel", vocab=WORDS, unk_token="<none>"), False),
    "a type that nobody knows": (another("Nope", vocab=WORDS), False),
    "WordPiece": (another("WordPiece", vocab=WORDS, unk_token="<unk>", continuing_subword_prefix="##"), None),
    "Unigram with nothing": (another("Unigram", vocab=[], unk_id=None), None),
    "Unigram whose unknown token is outside": (another("Unigram", vocab=[["a", -1.0]], unk_id=7), False),
    "Unigram with numbers that are none": (another("Unigram", vocab=[["a", "x"]], unk_id=0), False),
    "a template that adds a number beyond": (whole(template), False),
    "truncation": (whole(lambda read: read.update(truncation=SHORT)), True),
    "padding": (whole(lambda read: read.update(padding={**PAD, "pad_token": "x"})), True),
    "a broken pattern": (whole(lambda r: r.update(normalizer={"type": "Replace", "pattern": {"Regex": "("}})), False),
    "a class that nobody knows": (settings(tokenizer_class="NopeTokenizer"), None),
    "a class of another model": (settings(tokenizer_class="BertTokenizer"), None),
    "a class that is a number": (settings(tokenizer_class=3), None),
    "an end that is a list": (settings(eos_token=["a"]), None),
    "an end that is not in the vocabulary": (settings(eos_token="<nowhere>"), False),
    "a length that is text": (settings(model_max_length="long"), None),
    "a negative length": (settings(model_max_length=-1), None),
    "maps of special tokens that disagree": (file("special_tokens_map.json", '{"eos_token": "a"}'), None),
    "a map of special tokens that is a list": (file("special_tokens_map.json", "[]"), None),
    "added tokens that are a list": (file("added_tokens.json", "[1]"), None),
    "added tokens beyond": (file("added_tokens.json", '{"quick": 100000}'), None),
    "a chat template that is broken": (settings(chat_template="{% for x in %}{{"), True),
    "a chat template without an end": (settings(chat_template=LOOP), True),
    "a chat template that is a number": (settings(chat_template=3), None),
    "a chat template's file that is not text": (file("chat_template.jinja", b"\xff\xfe"), None),
    "only SentencePiece, broken": (only(file("tokenizer.model", b"\x0a\x03abc")), False),
    "only SentencePiece, empty": (only(file("tokenizer.model", b"")), False),
    "only a vocabulary of another model": (
        only(file("vocab.json", json.dumps(WORDS)), file("merges.txt", "#version: 0.2\n")),
        None,
    ),
    "only a vocabulary that is a list": (only(file("vocab.json", "[]"), file("merges.txt", "")), False),
    "only settings": (only(settings(tokenizer_class="LlamaTokenizer")), None),
    "only a vocabulary's text": (only(file("vocab.txt", "a\nb\n")), None),
    **{
        f"a pipe: {name}": (both(lambda folder, name=name: (folder / name).unlink(missing_ok=True), pipe(name)), None)
        for name in (
            *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer_config.json"),
            *("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model"),
        )
    },
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sparsedeploy.targets.registry import export_checkpoint
    from tests.small_models import save_model

    place = tmp_path_factory.mktemp("artifact")
    export_checkpoint(save_model(place / "dense"), "deepsparse", place / "artifact")
    return place / "artifact"


def prompted(artifact: Path, place: Path, damage: Damage, text: Path) -> str:
    """What ``generate`` says before it starts an engine; empty where it takes the prompt."""
    folder = shutil.copytree(artifact, place / "artifact")
    try:
        damage(folder)
        if not any((folder / name).is_fifo() for name in os.listdir(folder)):
            refresh(folder)
        load_text_tools(folder).encode(text.read_text())
    except UserError as error:
        return str(error)
    finally:
        shutil.rmtree(folder)
    return ""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A pipe that nobody writes into, or a loop, ends the test."""

    def stop(*_: object) -> None:
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", KINDS)
def test_one_verdict(cli: Cli, model: Path, text: Path, artifact: Path, kind: str) -> None:
    damage, readable = KINDS[kind]
    damage(model)
    outcome = evaluated(cli, model, text)
    refused = answered(outcome, kind.encode())
    assert readable is None or readable != refused, (kind, outcome.err)
    if not refused:
        assert np.isclose(json.loads(outcome.out)["perplexity"], perplexity(model, text), rtol=1e-4)
    drawn = ("-d", text, "-n", 2, "--calibration-length", 32)
    commands = {
        "prune": lambda: prune(cli, model, text, "-s", 0.5, "-m", "wanda"),
        "allocate": lambda: cli("allocate", model, "-s", 0.5, "-a", "owl", *drawn, "-o", model.parent / "plan.json"),
    }
    said = {name: run() for name, run in commands.items()}
    assert {name: answered(one, kind.encode()) for name, one in said.items()} == dict.fromkeys(commands, refused), {
        "eval": outcome.err,
        **{name: one.err for name, one in said.items()},
    }
    reason = prompted(artifact, text.parent, damage, text)
    assert bool(reason) == refused, (outcome.err, reason)


@pytest.mark.parametrize(
    "kind",
    [
        "an added token beyond the embedding, unused",
        "an added token beyond the embedding, in the text",
        "a special token beyond the embedding",
        "another type without its unknown token",
        "a template that adds a number beyond",
        "truncation",
        "an end that is not in the vocabulary",
        "a chat template without an end",
        "only SentencePiece, broken",
        "a pipe: tokenizer.json",
    ],
)
def test_recover_and_export_say_the_same(cli: Cli, model: Path, text: Path, kind: str) -> None:
    """``export`` reads no text: what only shows in a text is refused where there is one."""
    pruned = model.parent / "pruned"
    assert cli("prune", model, "-o", pruned, "-s", 0.5, "-m", "magnitude").code == 0
    KINDS[kind][0](pruned)
    scored = evaluated(cli, pruned, text)
    refused = answered(scored, kind.encode())
    data = ("--train-data", text, "--train-length", 32, "--train-samples", 32, "--device", "cpu")
    recovered = cli("recover", pruned, "-o", model.parent / "recovered", "-m", "sparse-lora", *data)
    assert answered(recovered, kind.encode()) == refused, (scored.err, recovered.err)
    options = ("search=true", "trials=2", "patience=0", "windows=2", f"text={text}")
    search = ("-a", "atp", *(word for option in options for word in ("--allocation-option", option)))
    searched = cli("allocate", pruned, "-o", model.parent / "plan.json", "-s", 0.6, "-m", "magnitude", *search)
    assert answered(searched, kind.encode()) == refused, (scored.err, searched.err)
    exported = cli("export", pruned, "-o", model.parent / "packed", "--target", "vllm")
    assert answered(exported, kind.encode()) == (refused and "in the text" not in kind), (scored.err, exported.err)


def test_the_artifact_of_the_test_is_sound(artifact: Path) -> None:
    assert describe_folder(artifact, verify=True).target == "deepsparse"
