"""A command that a job wrote down repeats what the job did, through the command line itself."""

import shlex
from collections.abc import Callable
from pathlib import Path

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.quality.evaluate import evaluate
from sparsedeploy.quality.options import EvalOptions, TaskOptions, TextOptions
from sparsedeploy.targets.options import ExportOptions
from sparsedeploy.workflows.commands import command_line
from sparsedeploy.workflows.options import PruneOptions
from sparsedeploy.workflows.prune import prune
from tests.cli.conftest import Outcome
from tests.small_models import save_model


def test_prune_and_eval(tmp_path: Path, cli: Callable[..., Outcome]) -> None:
    folder = tmp_path / "a folder; with $words"
    save_model(folder / "dense")
    text = folder / "text.txt"
    text.write_text("words and other words, " * 400)
    asked = PruneOptions(
        sparsity=0.6,
        method="alps",
        allocation="owl",
        method_options={"iterations": 5},
        allocation_options={"strength": 0.05},
        reconstruct=True,
        calibration=CalibrationOptions(data=str(text), sequences=5, length=24, seed=3),
    )
    prune(str(folder / "dense"), folder / "one", asked)
    done = cli(*shlex.split(command_line("prune", folder / "dense", asked, output=folder / "two"))[1:])
    assert done.code == 0, done.err
    assert model_sha256(folder / "two") == model_sha256(folder / "one") != model_sha256(folder / "dense")
    judge = EvalOptions(TextOptions((f"name={text}",), max_windows=3), context=16, batch_size=2)
    load = LoadOptions(dtype="float32")
    line = command_line("eval", folder / "one", judge, load, output=folder / "quality.json")
    assert cli(*shlex.split(line)[1:]).code == 0
    found = evaluate(folder / "one", judge, load)
    assert f'"perplexity": {found["perplexity"]!r}' in (folder / "quality.json").read_text()


def test_what_has_its_default_is_left_out() -> None:
    tasks = TaskOptions(("python_lines",))
    assert command_line("prune", "M", PruneOptions(sparsity=0.5)) == "sparsedeploy prune M --sparsity 0.5"
    line = command_line("eval", Path("M"), EvalOptions(TextOptions(("stdlib",)), tasks=tasks))
    assert line == "sparsedeploy eval M --data stdlib --tasks python_lines"
    asked = ExportOptions("llamacpp", options={"quantize": "q8_0"})
    line = command_line("export", "M", asked, output=Path("out"))
    assert line == "sparsedeploy export M -o out --target llamacpp --target-option quantize=q8_0"
