"""A method is one file: in a folder or another distribution, without another edit anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparsedeploy.allocation import allocate, model_layers
from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.checkpoint.manifest import RECIPE, load_manifest
from sparsedeploy.errors import UserError
from sparsedeploy.plan import parse_pattern
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES, REGISTRIES, TARGETS, discover
from sparsedeploy.targets.registry import export_checkpoint
from sparsedeploy.workflows.options import PruneOptions, RecoverOptions
from sparsedeploy.workflows.prune import prune
from sparsedeploy.workflows.recipes import parse_recipe
from sparsedeploy.workflows.recover import prune_and_recover
from tests.small_models import random_model, save_model

DEPTH = '''
from dataclasses import dataclass

from sparsedeploy.allocation.base import Allocation, layer_units
from sparsedeploy.options import Options, option
from sparsedeploy.registry import ALLOCATORS


@dataclass(frozen=True)
class DepthOptions(Options):
    """How steep."""

    slope: float = option(0.02, "Rate by which each layer loses more than the one before.", at_least=0)


@ALLOCATORS.register("by-depth", DepthOptions, needs="inputs", strength="slope")
class ByDepth:
    """Later layers lose more, where their inputs are larger."""

    def __init__(self, options):
        self.options = options

    def measure(self, layer):
        return float(layer.inputs.abs().mean())

    def allocate(self, measured, layers, sparsity):
        middle = (len(layers) - 1) / 2
        return Allocation(layer_units(layers, [self.options.slope * (at - middle) for at in range(len(layers))]))
'''
COLUMN = '''
from dataclasses import dataclass

from sparsedeploy.masks import apply_mask
from sparsedeploy.options import Options, option
from sparsedeploy.pruning.base import Pruned
from sparsedeploy.pruning.selection import keep_by_target
from sparsedeploy.registry import PRUNERS


@dataclass(frozen=True)
class ColumnOptions(Options):
    """How the norm counts."""

    power: float = option(1.0, "Of the column's norm.", at_least=0)


@PRUNERS.register("column", ColumnOptions, needs="none")
def column(weight, statistics, target, options):
    """Drop what is small beside its own column."""
    norms = weight.float().norm(dim=0).clamp_min(1e-12)
    mask = keep_by_target(weight.float().abs() / norms**options.power, target)
    return Pruned(mask, apply_mask(weight, mask))
'''
RESCALE = '''
from dataclasses import dataclass

from sparsedeploy.options import Options, option
from sparsedeploy.recovery.base import Recovered
from sparsedeploy.registry import RECOVERIES


@dataclass(frozen=True)
class RescaleOptions(Options):
    """By how much."""

    factor: float = option(1.1, "Of every weight that is kept.", above=0)


@RECOVERIES.register("rescale", RescaleOptions, starts_from="pruned", trains=False, calibrates=False)
def rescale(job, options):
    """Make the weights that are kept larger."""
    for linear in job.linears.values():
        linear.weight.data.mul_(options.factor)
    return Recovered(job.plan, job.masks, {}, {"factor": options.factor})
'''
PLAIN = '''
import shutil
from dataclasses import dataclass

from sparsedeploy.artifacts.description import Engine, Sparsity
from sparsedeploy.options import Options, option
from sparsedeploy.registry import TARGETS
from sparsedeploy.targets.base import describe


@dataclass(frozen=True)
class PlainOptions(Options):
    """What is copied."""

    note: str = option("none", "A line that is written beside the weights.")


@TARGETS.register("plain", PlainOptions)
def plain(job, options):
    """The folder as it is."""
    opened = job.open()
    with job.new_folder() as folder:
        shutil.copyfile(opened.folder / "model.safetensors", folder / "model.safetensors")
        (folder / "note.txt").write_text(options.note)
        engine = Engine("plain", "1")
        return describe(folder, opened, target="plain", dtype="float32", sparsity=Sparsity(2, 1), engine=engine)
'''
FILES = {"by_depth.py": DEPTH, "column.py": COLUMN, "rescale.py": RESCALE, "plain.py": PLAIN}
HELPER = "def register(text):\n    return text  # not a method: it has no line that registers one\n"


@pytest.fixture
def methods(tmp_path: Path) -> Iterator[Path]:
    """A folder with one file a method and a helper, known until the test ends."""
    folder = tmp_path / "methods"
    folder.mkdir()
    for name, text in {**FILES, "helper.py": HELPER}.items():
        (folder / name).write_text(text)
    for registry in REGISTRIES.values():
        registry.names()
    for each in REGISTRIES.values():
        list(each)  # a method registers once, when its module is imported: all before the copy
    before = {name: (dict(each._methods), dict(each._found)) for name, each in REGISTRIES.items()}
    modules = set(sys.modules)
    try:
        yield folder
    finally:
        for name, (known, found) in before.items():
            REGISTRIES[name]._methods, REGISTRIES[name]._found = known, found
        for name in set(sys.modules) - modules:
            if name.startswith("sparsedeploy_method_") or name == "their_column":
                del sys.modules[name]


def help_of(command: str, methods: Path) -> str:
    """The help in a process of its own: the commands of this one were built without the methods."""
    code = (
        "import sys; from pathlib import Path; from sparsedeploy.registry import discover\n"
        "discover(Path(sys.argv[2]))\n"
        "from sparsedeploy.cli.main import app; app(args=[sys.argv[1], '--help'])"
    )
    run = [sys.executable, "-c", code, command, str(methods)]
    return subprocess.run(run, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, check=True).stdout


def test_names_are_known_without_an_import(methods: Path) -> None:
    assert discover(methods) == ["by-depth", "column", "plain", "rescale"]
    assert not any(name.startswith("sparsedeploy_method_") for name in sys.modules)
    for registry, name in ((ALLOCATORS, "by-depth"), (PRUNERS, "column"), (RECOVERIES, "rescale"), (TARGETS, "plain")):
        assert name in registry.names()
    with pytest.raises(UserError, match=r"unknown pruning method 'colunm'\. Known: .*column"):
        PRUNERS.get("colunm")


def test_help_recipe_matrix_and_manifest(methods: Path, tmp_path: Path) -> None:
    discover(methods)
    for command, words in (("prune", ("by-depth", "column", "rescale")), ("export", ("plain",))):
        shown = help_of(command, methods)
        assert all(word in shown for word in words), command
    # Recipe.
    section = {"allocation": "by-depth", "allocation_options": {"slope": "0.01"}, "method": "column", "sparsity": 0.5}
    recipe = parse_recipe({"prune": section, "recover": {"method": "rescale", "options": {"factor": 2}}}, "mine")
    with pytest.raises(UserError, match=r"recipe mine: column: option power is -1\. It takes a finite number of at"):
        parse_recipe({"prune": {"method": "column", "method_options": {"power": -1}}}, "mine")
    # Matrix: every pattern that the tests of the built-in methods try.
    model = random_model("llama", num_hidden_layers=3)
    tokens = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    for pattern in ("unstructured", "mixed-2:4", "mixed-2:8"):
        parsed = parse_pattern(pattern)
        options: Any = ALLOCATORS.get("by-depth").make_options()
        plan = allocate(model, tokens, parsed.sparsity if parsed else 0.6, parsed, "by-depth", options)
        assert [target.name for target in plan.targets] == [m.name for layer in model_layers(model) for m in layer]
        pruned = prune_model(
            random_model("llama", num_hidden_layers=3), tokens, plan, "column", PRUNERS.get("column").make_options()
        )
        assert all(int((~pruned[t.name].mask).sum()) == t.zeros for t in plan.targets)
    # Manifest and llm-compressor's recipe, which it has no modifier for.
    save_model(tmp_path / "dense", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    calibration = CalibrationOptions(str(tmp_path / "text.txt"), sequences=2, length=32)
    asked = PruneOptions(**recipe.sections["prune"], calibration=calibration)
    prune(str(tmp_path / "dense"), tmp_path / "pruned", asked)
    manifest = load_manifest(tmp_path / "pruned")
    assert (manifest.method, manifest.plan.allocation, manifest.plan.options) == ("column", "by-depth", {"slope": 0.01})
    text = (tmp_path / "pruned" / RECIPE).read_text()
    assert yaml.safe_load(text) is None
    assert "llm-compressor has no modifier for the pruning method 'column'" in text
    # Recovery and export.
    recovered = prune_and_recover(
        str(tmp_path / "dense"), tmp_path / "recovered", asked, RecoverOptions(**recipe.sections["recover"])
    )
    assert recovered.recovery is not None
    assert (recovered.recovery.method, recovered.recovery.report) == ("rescale", {"factor": 2.0})
    artifact = export_checkpoint(tmp_path / "recovered", "plain", tmp_path / "artifact", {"note": "hello"})
    assert artifact.target == "plain"
    assert (tmp_path / "artifact" / "note.txt").read_text() == "hello"


def test_another_distribution_adds_a_method(methods: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    info = site / "columns-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "their_column.py").write_text(COLUMN.replace('"column"', '"their-column"'))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: columns\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sparsedeploy.methods]\nPRUNERS.their-column = their_column\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(PRUNERS, "_package", "sparsedeploy.pruning")
    assert "their-column" in PRUNERS.names()
    assert "their_column" not in sys.modules
    assert PRUNERS.get("their-column").summary == "Drop what is small beside its own column."
