"""``deploy`` on the tiny reference model and the real DeepSparse: interrupted, resumed, refused."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.machine import this_machine
from sparsedeploy.recovery.options import DataOptions
from sparsedeploy.reference import reference_model
from sparsedeploy.runtimes.environments import Environment
from sparsedeploy.runtimes.specification import load_runtime
from sparsedeploy.workflows import deploy_plan
from sparsedeploy.workflows.deploy import _pruned
from sparsedeploy.workflows.deploy_plan import choose_aim
from sparsedeploy.workflows.deploy_report import _quality
from sparsedeploy.workflows.deploy_request import State, prepare
from sparsedeploy.workflows.deploy_search import Trial
from sparsedeploy.workflows.options import DeployOptions, RecoverOptions
from sparsedeploy.workflows.state_file import write_state
from tests.cli.conftest import Outcome, cli  # noqa: F401 - a fixture
from tests.small_models import save_model

_SEARCH = [
    *(
        "--rate",
        "0.3",
        "--rate",
        "0.5",
        "--rate",
        "0.9",
        "--method",
        "magnitude,wanda",
        "--allocation",
        "uniform",
        "--data",
        "stdlib",
    ),
    *("--samples", "8", "--calibration-length", "64", "--windows", "4", "--context", "64"),
    *("--rounds", "2", "--prompt-length", "16", "--decode-tokens", "4"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(reference_model("tiny"), tmp_path_factory.mktemp("deploy") / "tiny")


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
def test_interrupted_and_resumed(deepsparse_runtime: Environment, model: Path, tmp_path: Path, cli) -> None:  # noqa: F811
    """The first run is stopped after its first trial; the same command goes on and repeats nothing."""
    output = tmp_path / "out"
    words = ["deploy", str(model), "--for", "deepsparse", "--within", "60%", "-o", str(output), *_SEARCH]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsedeploy", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    state = output / "deploy.json"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if state.exists() and json.loads(state.read_text())["trials"]:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "What is done is kept: run the same command again to resume." in said
    before = json.loads(state.read_text())
    assert before["trials"]
    assert before["targets"]["deepsparse"]["result"] is None
    steps = cli(*words, "--dry-run")
    assert steps.code == 0, steps.err
    assert "done" in steps.out
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    after = json.loads(state.read_text())
    assert after["trials"][: len(before["trials"])] == before["trials"]  # the times too: nothing was done again
    result = after["targets"]["deepsparse"]["result"]
    line = next(line for line in outcome.out.splitlines() if "x decode over the dense model" in line)
    assert re.search(
        r"\d\.\d\dx decode .*perplexity [+-]\d+\.\d %.*\d\.\d\d of the size; serve it with: sparsedeploy", line
    )
    # What was chosen is within the bound, by its own figures, and is a sound checkpoint with a card that has them.
    chosen = result["chosen"]
    assert chosen["perplexity"] <= 1.6 * result["dense"]["perplexity"]
    checkpoint = Path(chosen["checkpoint"])
    assert inspect_checkpoint(checkpoint).problems == []
    assert "| base model | this model | change |" in (checkpoint / "README.md").read_text()
    assert [path.name for path in (output / "checkpoints").iterdir()] == [checkpoint.name]
    assert {row["method"] for row in result["compared"]} == {"magnitude", "wanda"}
    best = min(result["compared"], key=lambda row: row["perplexity"])["method"]
    assert {trial["method"] for trial in result["trials"]} == {best}
    assert not (output / "levels").exists()
    report = (output / "report-deepsparse.html").read_text()
    assert "Rates that were tried" in report
    assert "from one calibration" in report
    assert "decode over the dense model" in report
    # A format that failed, such as by a time limit, is tried again when the speed is measured; the others are kept.
    formats = after["targets"]["deepsparse"]["formats"]
    failed = {**formats["int8"], "perplexity": None, "reason": "did not answer"}
    after["targets"]["deepsparse"] |= {"formats": {**formats, "int8": failed}, "result": None}
    write_state(state, {key: value for key, value in after.items() if key != "sha256"})
    assert cli(*words).code == 0
    after = json.loads(state.read_text())
    assert after["targets"]["deepsparse"]["formats"] == formats
    result = after["targets"]["deepsparse"]["result"]
    # Everything is done: the next time says so at once and measures nothing.
    assert json.loads(cli(*words, "--json").out) == result
    # A recovery is added: the search is kept, and the rate above its answer trained.
    text = tmp_path / "train.txt"
    text.write_text(Path(shutil.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    more = ["--recover", "sparse-lora", "--train-data", str(text), "--train-samples", "24", "--train-length", "64"]
    more += ["--train-option", "learning_rate=1e-3", "--recover-option", "dropout=0"]
    assert "recover" in cli(*words, *more, "--dry-run").out
    outcome = cli(*words, *more)
    assert outcome.code == 0, outcome.err
    again = json.loads(state.read_text())
    assert again["trials"][: len(after["trials"])] == after["trials"]
    (trained,) = again["trials"][len(after["trials"]) :]
    (plain,) = [row for row in after["trials"] if row["rate"] == trained["rate"]]
    assert trained["recovery"] == "sparse-lora"
    assert trained["perplexity"] < plain["perplexity"]
    chosen = again["targets"]["deepsparse"]["result"]["chosen"]
    assert inspect_checkpoint(Path(chosen["checkpoint"])).problems == []
    told = json.loads((output / "report-deepsparse.json").read_text())["commands"]
    assert any(line.startswith("sparsedeploy recover ") for line in told) == (chosen["recovery"] == "sparse-lora")
    assert "was asked for differently (recovery)" in cli(*words).err
    other = cli(*["5" if before == "--windows" else word for before, word in zip(["", *words], words, strict=False)])
    assert other.code == 2
    assert "was asked for differently (windows, recovery)" in other.err


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("one_core")
def test_a_bound_that_nothing_meets(deepsparse_runtime: Environment, model: Path, tmp_path: Path, cli) -> None:  # noqa: F811
    outcome = cli("deploy", model, "--for", "deepsparse", "--within", "0.001%", "-o", tmp_path / "out", *_SEARCH)
    assert outcome.code == 2
    assert "no rate from 30% to 90% stays within 0.001%; the nearest is 30% with" in outcome.err
    assert "Allow more (--within)" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")


def refused(outcome: Outcome, message: str) -> None:
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert outcome.changed == []


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path, cli) -> None:  # noqa: F811
    words = ("deploy", model, "-o", tmp_path / "out", *_SEARCH, "--dry-run", "--for", "onnxruntime")
    outcome = cli(*words)
    assert (outcome.code, outcome.changed) == (0, []), outcome.err
    for word in ("magnitude, wanda with uniform at 50%", "the best pair at up to 2 of 30%, 50%, 90%"):
        assert word in outcome.out
    steps = json.loads(cli(*words, "--json").out)
    assert [step["step"] for step in steps] == ["runtime", "dense", "compare", "try", "export", "bench"]
    assert all(step["seconds"] is None or step["seconds"] > 0 for step in steps)


def test_refusals(model: Path, tmp_path: Path, cli) -> None:  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("some words " * 100)
    base = ("deploy", model, "-o", tmp_path / "out", "--for", "deepsparse")
    refused(cli(*base, "--data", "nowhere.txt", "--held-out", text), "no text at 'nowhere.txt'")
    refused(cli(*base, "--data", text), "has no split of its own to judge quality on. Name another text")
    refused(cli(*base, "--data", text, "--held-out", text), "has no split of its own")
    refused(cli(*base, "--data", "stdlib", "--within", "a lot"), "the bound is 'a lot'")
    refused(cli(*base, "--data", "stdlib", "--rate", "1.5"), "1.5")
    refused(cli(*base, "--data", "stdlib", "--method", "nothing"), "unknown pruning method 'nothing'")
    refused(cli("deploy", model, "--for", "toaster", "--data", "stdlib"), "unknown target 'toaster'. Use cpu, llamacpp")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    refused(cli("deploy", model, "-o", tmp_path / "mine", "--for", "deepsparse", "--data", "stdlib"), "other files")
    refused(cli("deploy", model, "-o", text, "--for", "deepsparse", "--data", "stdlib"), "is a file")


def test_a_text_that_has_changed_is_not_gone_on_with(model: Path, tmp_path: Path) -> None:
    """Perplexities of two texts would be compared with each other."""
    texts = {name: tmp_path / f"{name}.txt" for name in ("calibration", "held-out", "train")}
    for name, path in texts.items():
        path.write_text(f"some words of {name} " * 100)
    recovery = RecoverOptions("sparse-lora", data=DataOptions(str(texts["train"])))
    calibration = CalibrationOptions(str(texts["calibration"]))
    options = DeployOptions("onnxruntime", held_out=str(texts["held-out"]), calibration=calibration, recovery=recovery)
    output = tmp_path / "out"
    State(prepare(str(model), output, options)).save()
    prepare(str(model), output, options)
    for name, named in (("calibration", "contents of the texts"), ("held-out", "contents"), ("train", "recovery")):
        before = texts[name].read_text()
        texts[name].write_text("other words " * 100)
        with pytest.raises(UserError, match=rf"was asked for differently \({named}"):
            prepare(str(model), output, options)
        texts[name].write_text(before)
    prepare(str(model), output, options)


def test_the_report_has_the_artifacts_own_figures() -> None:
    """Beside what the dense model's result says of the text."""
    text = {"data": "t", "split": "test", "tokens_sha256": "s", "perplexity": 9.0, "cross_entropy": math.log(9)}
    text |= {"windows": 4, "context": 64}
    dense = {"model": "dense", "model_sha256": "d", "dtype": "float32", **text, "texts": {"held-out": text}}
    found = {"folder": "f", "perplexity": 10.0, "cross_entropy": math.log(10), "windows": 3, "context": 64}
    quality = _quality(dense, "a", Path("artifact"), {**found, "reason": None})
    assert (quality["model"], quality["model_sha256"]) == ("artifact", "a")
    for part in (quality, quality["texts"]["held-out"]):
        assert (part["perplexity"], part["cross_entropy"], part["windows"]) == (10.0, math.log(10), 3)
        assert (part["data"], part["split"], part["tokens_sha256"]) == ("t", "test", "s")


def test_a_recovery_that_deploy_does_not_run(model: Path, tmp_path: Path, cli) -> None:  # noqa: F811
    text, train, empty = tmp_path / "text.txt", tmp_path / "train.txt", tmp_path / "empty.txt"
    text.write_text("some words " * 100)
    train.write_text("other words " * 100)
    empty.write_text(" \n")
    base = ("deploy", model, "-o", tmp_path / "out", "--for", "onnxruntime", "-d", train, "--held-out", text)
    trained = ("--train-data", train)
    for name in ("lora", "losa"):
        message = f"which {name} does not do. Use --recover elsa or sparse-lora."
        refused(cli(*base, "--recover", name, *trained), message)
    refused(cli(*base, "--recover", "sparselo"), "which sparselo does not do. Use --recover elsa or sparse-lora.")
    refused(cli(*base, "--recover", "sparselo", *trained), "--train-data has no effect: sparselo does not train")
    refused(cli(*base, *trained), "--train-data has no effect: there is no --recover")
    for name in ("elsa", "sparse-lora"):
        refused(cli(*base, "--recover", name), f"{name} trains and no training text was given. Add --train-data.")
        refused(cli(*base, "--recover", name, "--train-data", ""), "--train-data is empty")
        refused(cli(*base, "--recover", name, "--train-data", empty), "empty.txt' holds no text")
        refused(cli(*base, "--recover", name, "--train-data", tmp_path / "none"), "no text at")
        for same in (text, tmp_path / "x" / ".." / "text.txt"):
            (tmp_path / "x").mkdir(exist_ok=True)
            outcome = cli(*base, "--recover", name, "--train-data", same)
            refused(outcome, "text.txt. Train on another text: --train-data FILE.")
    refused(cli(*base[:-4], "-d", empty, "--held-out", text), "empty.txt' holds no text")
    refused(cli(*base[:-2], "--held-out", empty), "empty.txt' holds no text")


def test_what_reads_no_calibration_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli) -> None:  # noqa: F811
    """Its default is no input, though a folder has its name, and what is typed for it is refused."""
    monkeypatch.chdir(tmp_path)
    text, dense = tmp_path / "text.txt", save_model(tmp_path / "dense")
    text.write_text("some words " * 100)
    Path("c4").mkdir()
    asked = DeployOptions(
        target="onnxruntime", methods=("magnitude",), allocations=("uniform", "alphapruning"), held_out=str(text)
    )
    assert prepare(str(dense), Path("c4/out"), asked).read == [dense, str(text)]
    for change in ({"methods": ("magnitude", "wanda")}, {"allocations": ("owl",)}, {"target": "deepsparse"}):
        with pytest.raises(UserError, match="'c4' holds no text"):  # deepsparse: the ranges of its integers
            prepare(str(dense), Path("c4/out"), replace(asked, **change))
    with pytest.raises(UserError, match="c4 has no split of its own"):
        prepare(str(dense), Path("c4/out"), replace(asked, held_out=None))
    base = ("deploy", dense, "--for", "onnxruntime", "--method", "magnitude", "--allocation", "uniform", "--dry-run")
    why = "magnitude and uniform read no calibration text"
    refused(cli(*base, "--held-out", text, "-d", text), f"--data has no effect: {why}")
    refused(cli(*base, "-d", "stdlib", "--samples", 4), f"--samples has no effect: {why}")


def test_elsa_trains_a_trial(tmp_path: Path) -> None:
    """Its weights are trained in float32, whatever the model's type is."""
    dense, text, train = save_model(tmp_path / "dense", dtype=torch.bfloat16), tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("some words " * 100)
    train.write_text("other words " * 100)
    recovery = RecoverOptions(
        "elsa", data=DataOptions(str(train), max_length=32), training={"epochs": 1, "batch_size": 4, "accumulation": 1}
    )
    asked = DeployOptions(
        target="onnxruntime",
        rates=(0.5,),
        methods=("magnitude",),
        allocations=("uniform",),
        held_out=str(text),
        context=32,
        recovery=recovery,
    )
    folder = _pruned(prepare(str(dense), tmp_path / "out", asked), Trial(0.5, "magnitude", "uniform", "elsa"))
    manifest = load_manifest(folder)
    assert manifest.recovery is not None
    assert manifest.recovery.method == "elsa"
    assert abs(manifest.achieved - 0.5) < 0.005
    assert inspect_checkpoint(folder).problems == []


def test_a_target_that_this_machine_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine than this one: what the specifications say about it decides."""
    arm = replace(this_machine(), machine="aarch64", system="Linux", flags=())
    monkeypatch.setattr(deploy_plan, "this_machine", lambda: arm)
    with pytest.raises(UserError, match=r"cannot run deepsparse: .* runs on x86_64, this is aarch64\. It can run"):
        choose_aim("deepsparse")
    windows = replace(arm, machine="AMD64", system="Windows")
    monkeypatch.setattr(deploy_plan, "this_machine", lambda: windows)
    with pytest.raises(UserError, match=r"no sparse runtime for CPUs runs here \(llama\.cpp runs on Linux"):
        choose_aim("cpu")


def test_cpu_prefers_what_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache folder in which only DeepSparse stands as complete."""
    monkeypatch.setenv("SPARSEDEPLOY_HOME", str(tmp_path))
    runtime = load_runtime("deepsparse")
    if (reason := runtime.why_not_here(this_machine())) is not None:
        pytest.skip(reason)
    home = tmp_path / "runtimes" / "deepsparse"
    (home / "env" / "bin").mkdir(parents=True)
    (home / "env" / "bin" / "python").symlink_to(sys.executable)
    (home / "complete.json").write_text(json.dumps({"requirements_sha256": runtime.requirements_sha256}))
    assert choose_aim("cpu").name == "deepsparse"
