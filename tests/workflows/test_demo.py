"""The whole pipeline with the real engine, as the demo runs it, on the tiny reference model."""

import importlib.util
import json
import shlex
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.errors import UserError
from sparsedeploy.reporting.explain import why
from sparsedeploy.reporting.summary import notes, summary_table
from sparsedeploy.workflows import demo_probe
from sparsedeploy.workflows.demo import _commands, demo
from sparsedeploy.workflows.options import DemoOptions, PruneOptions
from sparsedeploy.workflows.prune import prune
from tests.small_models import save_model

OPTIONS = DemoOptions(
    preset="tiny", sparsities=(0.5, 0.8), samples=16, prompt_length=32, decode_tokens=4, rounds=2, probe=False
)


class Page(HTMLParser):
    """Collects tags and refuses what a self-contained page must not have."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "img", "iframe")
        assert not any(name in ("src", "href") for name, _ in attributes)
        self.tags.append(tag)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("deepsparse_runtime", "one_core")
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = demo(tmp_path / "out", OPTIONS, command="sparsedeploy demo --preset tiny")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))
    names = [model["name"] for model in report["models"]]
    assert names == ["dense", "sparse-50", "sparse-80"]
    dense, half, most = (model["quality"]["perplexity"] for model in report["models"])
    assert dense < half < most
    for name, sparsity in (("sparse-50", 0.5), ("sparse-80", 0.8)):
        inspection = inspect_checkpoint(tmp_path / "out" / "checkpoints" / name)
        assert inspection.problems == []
        assert inspection.sparsity == pytest.approx(sparsity, abs=1e-3)
    engines = {one["engine"]: one for one in report["engines"]}
    assert len(engines) + len(report["skipped"]) == 2, "each engine has its rows, or a sentence"
    rows = engines["deepsparse"]["benchmark"]["rows"]
    assert [row["baseline"] for row in rows] == [True, False, False]
    assert len(engines["deepsparse"]["benchmark"]["samples"]) == 3 * OPTIONS.rounds
    assert all(sentence.endswith(".") for one in engines.values() for sentence in one["why"].values())
    assert all(set(one["why"]) == set(names) for one in engines.values())
    assert all(row["decode"]["speedup"]["median"] > 0 for row in rows[1:])
    table = Console(width=80, record=True)
    table.print(summary_table(report))
    assert all(len(line) <= 80 for line in table.export_text().splitlines())
    text = (tmp_path / "out" / "report.html").read_text()
    told = [one["why"][name] for one in engines.values() for name in names[1:]]
    assert all(sentence in unescape(text) for sentence in told), "the page has a sentence for each row"
    page = Page()
    page.feed(text)
    # Perplexity against speed, speedups, perplexity and sparsity, layers; summary, speed, perplexity, sizes, settings,
    # environment. By sparsity: a table for each model; of the two pruned ones two heat maps, and their values.
    assert page.tags.count("figure") == 3 + len(engines) + 2 * 2
    assert page.tags.count("table") == 4 + 2 * len(engines) + 3 + 2
    assert [list(model["commands"]) for model in report["models"]][1] == ["prune", "eval", "export"]
    # A second run keeps what is there and measures anew; it is asked for tasks and the probe besides.
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    small = {**demo_probe.SHAPE, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    monkeypatch.setattr(demo_probe, "SHAPE", {**small, "num_key_value_heads": 2})
    if importlib.util.find_spec("lm_eval") is None:
        report = demo(tmp_path / "out", replace(OPTIONS, probe=True))
    else:
        report = demo(tmp_path / "out", replace(OPTIONS, probe=True, tasks=("python_lines",)))
        for model in report["models"]:
            assert 0 <= model["quality"]["tasks"]["python_lines"]["acc"] <= 1
            assert model["commands"]["eval"].endswith(" --tasks python_lines")
        assert "python_lines" in (tmp_path / "out" / "report.html").read_text()
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert {path: now.pop(path) for path in made} == made
    assert all("probe-" in str(path) for path in now)
    assert {one["engine"] for one in report["probe"]["engines"]} == {one["engine"] for one in report["engines"]}
    rows = report["probe"]["engines"][0]["benchmark"]["rows"]
    assert [row["name"] for row in rows] == ["probe-dense", "probe-70"]
    assert rows[1]["sparsity"] == pytest.approx(0.7, abs=0.02)
    assert "random" in "".join(notes(report))


@pytest.mark.parametrize(
    ("decode", "prefill", "hidden", "expected"),
    [
        ((0.8, 0.9, 0.95), (1.1, 1.2, 1.3), 256, "Slower at decoding: with 256 features"),
        ((0.8, 0.9, 0.95), (0.8, 0.9, 0.95), 4096, "Slower at decoding: reading where the zeros are"),
        ((0.9, 1.0, 1.1), (1.1, 1.2, 1.3), 4096, "No difference at decoding is shown."),
        ((1.9, 2.0, 2.1), (1.1, 1.2, 1.3), 4096, "near what memory traffic allows"),
        ((1.2, 1.3, 1.4), (0.8, 0.9, 0.95), 4096, "attention, norms and the output head take the same time as before"),
        ((1.2, 1.3, 1.4), (0.8, 0.9, 0.95), 4096, "Prefill is slower"),
    ],
)
def test_every_row_says_why(decode: tuple[float, ...], prefill: tuple[float, ...], hidden: int, expected: str) -> None:
    def phase(values: tuple[float, ...]) -> dict[str, object]:
        return {"speedup": dict(zip(("low", "median", "high"), values, strict=True))}

    row = {"status": "measured", "baseline": False, "sparsity": 0.7, "decode_limit": 2.5}
    assert expected in why({**row, "decode": phase(decode), "prefill": phase(prefill)}, hidden)
    assert why({"status": "failed", "reason": "no memory"}, 64) == "Not measured: no memory."


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sparsity 1\.5 is outside"):
        demo(tmp_path / "out", DemoOptions(sparsities=(1.5,)))
    with pytest.raises(UserError, match="--model leaves no use"):
        demo(tmp_path / "out", DemoOptions(model="smollm2", train=True))
    with pytest.raises(UserError, match="given twice"):
        demo(tmp_path / "out", DemoOptions(sparsities=(0.5, 0.5)))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        demo(tmp_path / "file", DemoOptions())
    assert not (tmp_path / "out").exists()


def test_commands_to_repeat_survive_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "a folder; with $words"
    save_model(folder / "dense")
    checkpoint, artifact = folder / "sparse", folder / "artifact"
    prune(str(folder / "dense"), checkpoint, PruneOptions(sparsity=0.5, method="magnitude"))
    steps = _commands(folder / "dense", checkpoint, artifact, 0.5, replace(OPTIONS, method="magnitude"))
    words = {step: shlex.split(line) for step, line in steps.items()}
    assert str(folder / "dense") in words["prune"]
    assert "--data" not in words["prune"], "magnitude reads no text"
    assert str(artifact) in words["export"]
    assert all(str(checkpoint) in line for line in words.values())
