"""The examples of the documents run as they are written, on the tiny reference model, without a network."""

from __future__ import annotations

import collections
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.machine import this_machine
from sparsedeploy.reference import reference_model
from sparsedeploy.registry import PRUNERS
from sparsedeploy.runtimes.environments import install
from sparsedeploy.runtimes.specification import load_runtime
from sparsedeploy.workflows.options import PruneOptions
from sparsedeploy.workflows.prune import prune
from tests.cli.conftest import Outcome, cli  # noqa: F401 - a fixture
from tests.docs.examples import Block, blocks, documents, run

pytestmark = pytest.mark.xdist_group("documents")
Cli = Callable[..., Outcome]
_ALL = [(document, found) for document in documents() if (found := blocks(document))]


def _missing(engine: str) -> str | None:
    """Why the engine cannot run here, or None."""
    return load_runtime(engine).why_not_here(this_machine())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples take for granted: MODEL, a pruned folder, two texts, and both models exported."""
    from sparsedeploy.targets.registry import export_checkpoint

    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(reference_model("tiny"), folder / "MODEL")
    sources = [Path(shutil.__file__), Path(collections.__file__)]
    for name, source in zip(("my-text.txt", "held-out.txt"), sources, strict=True):
        (folder / name).write_text(source.read_text(encoding="utf-8")[:24_000], encoding="utf-8")
    text = CalibrationOptions(data=str(folder / "my-text.txt"), sequences=8, length=128)
    prune(str(folder / "MODEL"), folder / "pruned", PruneOptions(sparsity=0.7, method="wanda", calibration=text))
    if any(block.engine == "deepsparse" for _, found in _ALL for block in found) and _missing("deepsparse") is None:
        install("deepsparse")
        for checkpoint, artifact in (("MODEL", "dense-ds"), ("pruned", "pruned-ds")):
            export_checkpoint(folder / checkpoint, "deepsparse", folder / artifact)
    return folder


def _why_not(block: Block) -> str | None:
    return block.skipped or (_missing(block.engine) if block.engine else None)


def _quick(words: tuple[str, ...]) -> tuple[str, ...]:
    """A benchmark with as few rounds as it takes: examples are run, not measured."""
    return (*words, "--rounds", "2") if words[0] == "bench" and not {"--rounds", "--compare"} & {*words} else words


@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize(("document", "found"), _ALL, ids=[found[0].document for _, found in _ALL])
def test_examples_run(
    document: Path,
    found: list[Block],
    prepared: Path,
    cli: Cli,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runnable = [block for block in found if _why_not(block) is None]
    if not runnable:
        pytest.skip("; ".join(sorted({str(_why_not(block)) for block in found})))
    made = {match for block in runnable for match in re.findall(r"-o (\S+)", block.code)}
    for path in prepared.iterdir():
        if path.name not in made:  # a document that makes it itself starts without it
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    list(PRUNERS)  # a method registers once, when its module is imported: all before the copy
    monkeypatch.setattr(PRUNERS, "_methods", dict(PRUNERS._methods))  # what an example registers ends with it

    for block in runnable:

        def sparsedeploy(*words: str, at: Block = block) -> None:
            outcome = cli(*_quick(words))
            assert outcome.code == 0, f"{at.document}:{at.line}: {' '.join(words)}: {outcome.err}"

        run(block, sparsedeploy, vars(module))


def test_most_examples_are_run(capsys: pytest.CaptureFixture[str]) -> None:
    every = [block for _, found in _ALL for block in found]
    left_out = collections.Counter(reason for block in every if (reason := _why_not(block)) is not None)
    executed = len(every) - left_out.total()
    with capsys.disabled():
        print(f"\ndocument examples: {executed} of {len(every)} executed", end="")
        print("".join(f"; {count} left out: {reason}" for reason, count in left_out.most_common()))
    assert executed >= 0.6 * len(every)
