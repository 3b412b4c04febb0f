"""``prune --engine`` and ``export --quantize``: what does not go together is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Outcome
from tests.cli.test_bad_input import prune, refused

Cli = Callable[..., Outcome]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "nosuch"], "--engine is 'nosuch'. It takes sparsedeploy or llmcompressor"),
        (["--engine", "llmcompressor", "-m", "magnitude"], "cannot prune by magnitude"),
        (["--engine", "llmcompressor", "--resume"], "has no --resume"),
        (["--engine", "llmcompressor", "--reconstruct"], "has no --reconstruct"),
        (["--engine", "llmcompressor", "--quantize", "int8"], "has no --quantize"),
        (["--engine", "llmcompressor", "--recover", "losa"], "--recover cannot be combined with --engine"),
        (["--engine", "llmcompressor", "--trust-remote-code"], "has no --trust-remote-code"),
        (["--engine", "llmcompressor"], "runtime llmcompressor is not installed"),
    ],
)
def test_prune_with_another_engine(
    cli: Cli, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(text.parent / "empty"))
    refused(prune(cli, model, text, "-s", "0.5", *options), message, model.parent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["vllm", "--quantize", "int3"], "option quantize is 'int3'. It takes fp8-dynamic, w8a8 or w4a16"),
        (["deepsparse", "--quantize", "w8a8"], "--target deepsparse cannot quantise"),
        (["vllm", "--quantize", "w8a8"], "has no sparsity.json"),
        (
            ["vllm", "--quantize", "w8a8", "--target-option", "windows=-1"],
            "option windows is '-1'. It takes a whole number",
        ),
        (["vllm", "--quantize", "w8a8", "--target-option", "nosuch=1"], "vllm has no option 'nosuch'"),
        (["llmcompressor"], "has no sparsity.json. Give a folder that sparsedeploy prune wrote"),
    ],
)
def test_export(cli: Cli, model: Path, options: list[str], message: str) -> None:
    target, *more = options
    refused(cli("export", model, "-o", model.parent / "out", "-t", target, *more), message, model.parent)


def test_quantising_needs_the_environment(
    cli: Cli, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path / "empty"))
    sparse = model.parent / "sparse"
    base = ("prune", model, "-o", sparse, "--data", text, "-n", 2, "--calibration-length", 32, "--device", "cpu")
    assert cli(*base, "-s", "0.5").code == 0
    outcome = cli("export", sparse, "-o", model.parent / "out", "-t", "vllm", "--quantize", "w8a8")
    refused(outcome, "runtime llmcompressor is not installed. Run: sparsedeploy runtime install", model.parent)
