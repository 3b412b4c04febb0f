"""Every JSON file that a command reads, damaged in dozens of ways: one clear line, or the right result."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsedeploy.artifacts.folder import describe_folder
from sparsedeploy.checkpoint.journal import Journal
from sparsedeploy.folders import JOURNAL
from tests.cli.conftest import Outcome
from tests.cli.mutations import damaged_bytes, mutations, unless_refused
from tests.cli.test_bad_input import prune, refused
from tests.runtimes.artifacts import refresh

Cli = Callable[..., Outcome]
INDEX = "model.safetensors.index.json"
COUNT = 40


def answered(outcome: Outcome, what: bytes) -> bool:
    """Whether the command refused its input, in one line with a fix; else it must have succeeded."""
    if outcome.code == 0:
        assert "Traceback" not in outcome.err
        return False
    try:
        refused(outcome, "", outcome.place)
    except AssertionError as error:
        raise AssertionError(f"{what[:300]!r}: {error}") from error
    return True


def perplexity(folder: Path, text: Path) -> float:
    """Of the first window of 32 tokens, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    row = torch.tensor(AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"][:32])
    with torch.no_grad():
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].double()
    return math.exp(torch.nn.functional.cross_entropy(logits, row[1:]))


def evaluated(cli: Cli, folder: Path, text: Path) -> Outcome:
    options = ("--context", 32, "--max-windows", 1, "--device", "cpu", "--dtype", "float32", "--json")
    return cli("eval", folder, "-d", text, *options)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_of_a_model(cli: Cli, model: Path, text: Path, name: str) -> None:
    """What is accepted gives the perplexity that transformers gives; ``prune`` says the same as ``eval``."""
    sound = (model / name).read_bytes()
    for at, content in enumerate(mutations(sound, COUNT, 1, lambda place: place[-1] == "dtype")):
        (model / name).write_bytes(content)
        outcome = evaluated(cli, model, text)
        if answered(outcome, content):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = perplexity(model, text)
        assert np.isclose(json.loads(outcome.out)["perplexity"], expected, rtol=1e-4), content[:300]
        if at % 4 == 0:
            made = cli("prune", model, "-o", model.parent / "out", "-s", 0.5, "-m", "magnitude", "--overwrite")
            answered(made, content)
    (model / name).write_bytes(sound)


def test_an_index(cli: Cli, model: Path, text: Path) -> None:
    """What is accepted names the same tensors in the same files."""
    names = load_file(model / "model.safetensors")
    sound = json.dumps(
        {"metadata": {"total_size": 5}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    ).encode()
    (model / INDEX).write_bytes(sound)
    before = json.loads(evaluated(cli, model, text).out)["perplexity"]
    for content in mutations(sound, COUNT, 2):
        (model / INDEX).write_bytes(content)
        outcome = evaluated(cli, model, text)
        if not answered(outcome, content):
            assert json.loads(outcome.out)["perplexity"] == before, content[:300]


def test_a_weight_header(cli: Cli, model: Path, text: Path) -> None:
    """What is accepted is what the safetensors library reads."""
    path = model / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, rest = whole[8 : 8 + length], whole[8 + length :]
    before = json.loads(evaluated(cli, model, text).out)["perplexity"]
    files = [len(one).to_bytes(8, "little") + one + rest for one in mutations(header, COUNT, 3)]
    files += damaged_bytes(whole[: 8 + length], 40, 4)
    for content in files:
        path.write_bytes(content if len(content) > len(rest) else content + rest)
        outcome = evaluated(cli, model, text)
        if not answered(outcome, content):
            load_file(path)
            found = json.loads(outcome.out)["perplexity"]
            assert found == before or np.isclose(found, perplexity(model, text), rtol=1e-4), content[:300]


@pytest.fixture
def pruned(cli: Cli, model: Path, text: Path) -> Path:
    assert prune(cli, model, text, "-s", 0.5).code == 0
    return model.parent / "out"


def test_a_manifest(cli: Cli, pruned: Path, text: Path) -> None:
    """``inspect`` and ``recover`` read it; ``eval`` does not."""
    path = pruned / "sparsity.json"
    sound = path.read_bytes()
    for at, content in enumerate(mutations(sound, 2 * COUNT, 5)):
        path.write_bytes(content)
        outcome = cli("inspect", pruned)
        if outcome.code == 0 or not any(line.startswith("error: ") for line in outcome.err.splitlines()):
            assert outcome.code in (0, 2), content[:300]  # a list of what does not match
            assert "unexpected" not in outcome.err
        else:
            answered(outcome, content)
        if at % 4 == 0:
            train = ("--train-data", text, "--train-length", 32, "--device", "cpu")
            target = pruned.parent / "recovered"
            answered(cli("recover", pruned, "-o", target, "-m", "lora", *train, "--overwrite"), content)


def test_masks(cli: Cli, pruned: Path) -> None:
    """Any change to the stored masks is found."""
    (path,) = pruned.glob("*.masks")
    for content in damaged_bytes(path.read_bytes(), 30, 11):
        changed = content != path.read_bytes()
        sound = path.read_bytes()
        path.write_bytes(content)
        outcome = cli("inspect", pruned)
        assert (outcome.code == 2) == changed, outcome.err
        assert "unexpected" not in outcome.err
        path.write_bytes(sound)


def test_a_journal(cli: Cli, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged journal is refused and kept; what is accepted gives the checkpoint of a run without interruption."""
    output = model.parent / "out"
    assert prune(cli, model, text, "-s", 0.5).code == 0
    expected = load_file(output / "model.safetensors")
    shutil.rmtree(output)
    record = Journal.record_layer

    def stopped(self: Journal, index: int, losses: Mapping[str, float]) -> None:
        record(self, index, losses)
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "record_layer", stopped)
    assert prune(cli, model, text, "-s", 0.5).code == 130
    monkeypatch.undo()
    (kept,) = model.parent.glob(".*.partial")
    shutil.move(kept, model.parent / "kept")
    lines = (model.parent / "kept" / JOURNAL).read_bytes().splitlines()
    journal = b"[" + b",".join(lines) + b"]"
    for content in mutations(journal, COUNT, 6):
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(model.parent / "kept", kept)
        try:
            made = "".join(json.dumps(line) + "\n" for line in json.loads(content)).encode()
        except (ValueError, TypeError, RecursionError):
            made = content + b"\n"
        (kept / JOURNAL).write_bytes(made)
        outcome = prune(cli, model, text, "-s", 0.5, "--resume")
        if not answered(outcome, made):
            found = load_file(output / "model.safetensors")
            assert all(torch.equal(found[name], expected[name]) for name in expected), made[:600]


def test_a_plan(cli: Cli, model: Path, text: Path) -> None:
    made = cli("allocate", model, "-s", 0.5, "-a", "uniform", "-o", model.parent / "plan.json")
    assert made.code == 0, made.err
    path = model.parent / "plan.json"
    sound = path.read_bytes()
    for content in mutations(sound, COUNT, 7):
        path.write_bytes(content)
        outcome = cli("prune", model, "-o", model.parent / "out", "-m", "magnitude", "--plan", path, "--overwrite")
        if not answered(outcome, content):
            assert cli("inspect", model.parent / "out").code == 0, content[:300]


def test_an_artifact(cli: Cli, model: Path) -> None:
    """Files that differ from their hashes are refused; a description that says too little or nonsense is, too."""
    artifact = model.parent / "artifact"
    made = cli("export", model, "--target", "deepsparse", "-o", artifact)
    assert made.code == 0, made.err
    for path in sorted(artifact.iterdir()):
        sound = path.read_bytes()
        damaged = damaged_bytes(sound, 12, 8)
        if path.name == "artifact.json":
            damaged += mutations(sound, COUNT, 9)
        for content in damaged:
            path.write_bytes(content)
            if unless_refused(lambda: describe_folder(artifact, verify=True)) is not None:
                # The card may be edited; the description may have another layout, or no hash as in earlier versions.
                same = content == sound or path.name == "README.md"
                if path.name == "artifact.json" and not same:
                    found = json.loads(content)
                    same = "sha256" not in found or found == json.loads(sound)
                assert same, (path.name, content[:300])
        path.write_bytes(sound)


def test_a_packed_checkpoint(cli: Cli, model: Path, text: Path) -> None:
    """Weights that are packed for vLLM, damaged: refused, or what the sound folder gives."""
    packed = model.parent / "packed"
    assert cli("prune", model, "-o", model.parent / "sparse", "-s", 0.7, "-m", "magnitude").code == 0
    made = cli("export", model.parent / "sparse", "--target", "vllm", "-o", packed)
    assert made.code == 0, made.err
    path = packed / "config.json"
    sound = path.read_bytes()
    outcome = evaluated(cli, packed, text)
    before = None if answered(outcome, b"sound") else json.loads(outcome.out)["perplexity"]
    for content in mutations(sound, COUNT, 10, lambda place: place[0] != "quantization_config"):
        path.write_bytes(content)
        refresh(packed)
        outcome = evaluated(cli, packed, text)
        if not answered(outcome, content):
            assert json.loads(outcome.out)["perplexity"] == before, content[:300]
        answered(cli("export", packed, "--target", "deepsparse", "-o", model.parent / "again"), content)
