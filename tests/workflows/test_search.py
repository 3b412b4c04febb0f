"""``auto`` and ``evolve`` on a small model: never worse than any allocation on the selection text, exact, resumable."""

import copy
import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsedeploy.allocation.allocate import allocate, model_layers
from sparsedeploy.allocation.mixed import MixedOptions
from sparsedeploy.errors import UserError
from sparsedeploy.grid import Grid
from sparsedeploy.models.layers import ResidentLayers
from sparsedeploy.plan import SparsityPlan, parse_pattern
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.pruning.levels import LevelDatabase, Wanted, add_levels
from sparsedeploy.quality.divergence import dense_predictions, divergence
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from sparsedeploy.workflows.search import PlanScores, search_plan
from tests.small_models import VOCABULARY, random_model

IDENTITY = {"model_sha256": "m", "method": "wanda", "calibration": {"sha256": "t"}}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    model = random_model("llama", num_hidden_layers=3)
    with torch.no_grad():  # random layers are all alike: make them tell apart
        for index, layer in enumerate(model.model.layers):
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4 * (1 + index))
                    parameter[:, : 2 + index] *= 4
    return model


def text(count: int, seed: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (count, 24), generator=torch.Generator().manual_seed(seed))


def search(
    model: nn.Module,
    name: str,
    folder: Path,
    pattern: str = "unstructured",
    *,
    grid: Grid | None = None,
    mixed: MixedOptions | None = None,
    **values: Any,
) -> SparsityPlan:
    options = ALLOCATORS.get(name).make_options({"database": str(folder), **values})
    parsed = parse_pattern(pattern)
    return search_plan(
        ResidentLayers(model),
        text(4, 0),
        text(4, 1),
        0.6 if parsed is None else parsed.sparsity,
        parsed,
        name,
        options,
        method="wanda",
        method_options=PRUNERS.get("wanda").make_options(),
        identity=IDENTITY,
        grid=grid,
        mixed=mixed,
    )


def test_the_coarse_divergence_is_zero_for_the_model_itself_and_below_the_full_one(model: nn.Module) -> None:
    windows = text(2, 2)
    dense = dense_predictions(model, windows, top=16)
    assert divergence(model, dense) == pytest.approx(0, abs=1e-6)
    other = random_model("llama", seed=5, num_hidden_layers=3)
    p, q = (torch.log_softmax(m(input_ids=windows).logits[:, :-1].double(), dim=-1) for m in (model, other))
    full = (p.exp() * (p - q)).sum(dim=-1).mean().item()
    coarse = divergence(other, dense)
    assert 0 < coarse <= full + 1e-6
    assert divergence(other, dense_predictions(model, windows, top=10**6)) == pytest.approx(full, rel=1e-3)
    assert coarse == pytest.approx((divergence(other, dense, [0]) + divergence(other, dense, [1])) / 2)


def test_a_level_is_what_the_method_leaves_and_comes_back_from_disk(model: nn.Module, tmp_path: Path) -> None:
    plan = allocate(model, None, 0.6, None, "uniform", ALLOCATORS.get("uniform").make_options())
    database = LevelDatabase(tmp_path / "db", IDENTITY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = PRUNERS.get("magnitude").make_options()
    add_levels(ResidentLayers(model), None, [Wanted(database, plan.targets, "magnitude", options)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    pruned = random_model("llama", num_hidden_layers=3)
    pruned.load_state_dict(before)
    expected = prune_model(pruned, None, plan, "magnitude", options)
    for target in plan.targets:
        assert torch.equal(database.read(target), expected[target.name].weight)
    windows = text(2, 3)
    score = PlanScores(model, database, windows)(plan.targets)
    assert score == pytest.approx(divergence(pruned, dense_predictions(model, windows)), rel=1e-6)


def really(model: nn.Module, plan: SparsityPlan, grid: Grid | None = None) -> float:
    """The divergence of the model that is pruned by the plan."""
    candidate = copy.deepcopy(model)
    prune_model(candidate, text(4, 0), plan, "wanda", PRUNERS.get("wanda").make_options(), grid=grid)
    return divergence(candidate, dense_predictions(model, text(4, 1)))


def test_levels_are_rounded_as_the_pruning_is(model: nn.Module, tmp_path: Path) -> None:
    """In the first layer, whose inputs no pruning changes, a level is the very weight that pruning leaves."""
    grid = Grid(4)
    found = search(model, "auto", tmp_path / "db", grid=grid)
    confirmed = found.details["search"]["confirmed"]
    assert really(model, found, grid) == pytest.approx(min(confirmed.values()), rel=1e-6)
    pruned = copy.deepcopy(model)
    prune_model(pruned, text(4, 0), found, "wanda", PRUNERS.get("wanda").make_options(), grid=grid)
    database = LevelDatabase(tmp_path / "db", IDENTITY)
    linears = ResidentLayers(pruned).stack.linears(0)
    by_name = found.by_name
    assert linears
    for name, linear in linears.items():
        assert torch.equal(database.read(by_name[name]), linear.weight)


@pytest.mark.parametrize("pattern", ["unstructured", "mixed-2:8"])
def test_evolve_is_never_worse_than_auto_and_auto_than_any(model: nn.Module, tmp_path: Path, pattern: str) -> None:
    auto = search(model, "auto", tmp_path / "db", pattern)
    found = search(model, "evolve", tmp_path / "db", pattern, generations=6, offspring=8)
    scores, confirmed = (auto.details["search"][key] for key in ("scores", "confirmed"))
    assert set(scores) == {name for name in ALLOCATORS.names() if name not in ("auto", "evolve")}
    closest = sorted((value, name) for name, value in scores.items() if name != "uniform")[:3]
    assert set(confirmed) == {"uniform", *(name for _, name in closest)}
    assert really(model, auto) == pytest.approx(min(confirmed.values()), rel=1e-6)
    assert set(found.details["search"]["confirmed"]) == {*confirmed, "evolve"}
    assert really(model, found) <= really(model, auto) * (1 + 1e-6)
    trusting = search(model, "auto", tmp_path / "db", pattern, confirm=0)
    score = PlanScores(model, LevelDatabase(tmp_path / "db", IDENTITY), text(4, 1))
    assert score(trusting.targets) == pytest.approx(min(trusting.details["search"]["scores"].values()), rel=1e-9)
    for plan in (auto, found):
        unit = max(t.rows for t in plan.targets) if pattern == "unstructured" else max(t.size / 8 for t in plan.targets)
        excess = plan.achieved * sum(t.size for t in plan.targets) - plan.sparsity * sum(t.size for t in plan.targets)
        assert abs(excess) <= unit
        assert SparsityPlan.from_dict(json.loads(json.dumps(plan.to_dict()))).targets == plan.targets
        plan.check_modules([shape for layer in model_layers(model) for shape in layer])


def test_evolve_keeps_the_bounds_of_a_mixed_pattern(model: nn.Module, tmp_path: Path) -> None:
    mixed = MixedOptions(n_min=2, n_max=4)
    settings = {"generations": 8, "offspring": 8, "confirm": 0, "patience": 0}
    found = search(model, "evolve", tmp_path / "db", "mixed-3:8", mixed=mixed, **settings)
    free = search(model, "evolve", tmp_path / "db", "mixed-3:8", **settings)
    kept, every = ({t.pattern.n for t in plan.targets if t.pattern} for plan in (found, free))
    assert kept <= {2, 3, 4}
    assert not every <= {2, 3, 4}, "without bounds, others are found"


def test_an_interrupted_search_goes_on_and_ends_the_same(model: nn.Module, tmp_path: Path) -> None:
    whole = search(model, "evolve", tmp_path / "whole", generations=6, offspring=4, patience=0)
    cut = tmp_path / "cut"
    search(model, "evolve", cut, generations=3, offspring=4, patience=0)
    (record,) = cut.glob("search-*.jsonl")
    with open(record, "a") as file:
        file.write('{"generation": 4, "lev')
    missing = max(next(cut.glob("model.layers.1*")).iterdir(), key=lambda path: path.stat().st_size)
    stored = missing.read_bytes()
    missing.unlink()
    again = search(model, "evolve", cut, generations=6, offspring=4, patience=0)
    assert again.targets == whole.targets
    assert missing.read_bytes() == stored
    assert [json.loads(line)["generation"] for line in record.read_text().splitlines()] == list(range(7))


def test_an_edited_search_is_not_resumed(model: nn.Module, tmp_path: Path) -> None:
    search(model, "evolve", tmp_path / "db", generations=2, offspring=4, patience=0)
    (record,) = (tmp_path / "db").glob("search-*.jsonl")
    sound = record.read_bytes()
    before, last, _ = sound.rsplit(b"\n", 2)
    for key, value in itertools.product(json.loads(last), (None, "x", [], [0], {}, -1, [10**6])):
        record.write_bytes(b"\n".join([before, json.dumps({**json.loads(last), key: value}).encode(), b""]))
        if key == "fitness" and value == -1:
            continue
        with pytest.raises(UserError, match=r"was edited, or is of another search\. Delete it"):
            search(model, "evolve", tmp_path / "db", generations=3, offspring=4, patience=0)
    for damage in (b"null\n", b"\xff\n", b"[" * 5000 + b"\n", b"{}\n"):
        record.write_bytes(damage)
        with pytest.raises(UserError, match="Delete it"):
            search(model, "evolve", tmp_path / "db", generations=3, offspring=4, patience=0)


def test_a_database_of_another_run_and_a_broken_file_are_refused(model: nn.Module, tmp_path: Path) -> None:
    plan = search(model, "auto", tmp_path / "db")
    with pytest.raises(UserError, match=r"is for another run: calibration differ.*Name another folder"):
        LevelDatabase(tmp_path / "db", {**IDENTITY, "calibration": {"sha256": "other"}})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="is not a level database"):
        LevelDatabase(tmp_path / "other", IDENTITY)
    path = next((tmp_path / "db" / plan.targets[0].name).iterdir())
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="missing or broken"):
        search(model, "auto", tmp_path / "db")


def test_what_cannot_be_searched_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pattern 2:4 leaves evolve nothing to search"):
        search(model, "evolve", tmp_path / "db", "2:4")
    assert {t.pattern.n for t in search(model, "auto", tmp_path / "db", "2:4").targets if t.pattern} == {2}
    with pytest.raises(UserError, match="no levels of the database meet the budget"):
        search(model, "evolve", tmp_path / "db", highest=0.5, generations=1)


def test_slopes_are_the_changes_of_the_divergence_to_first_order(tmp_path: Path) -> None:
    """Against the divergence itself, of a level that differs by little: magnitude's next zero in each row."""
    model = random_model("llama", num_hidden_layers=3)
    plan = allocate(model, None, 0.8, None, "uniform", ALLOCATORS.get("uniform").make_options())
    database = LevelDatabase(tmp_path / "db", IDENTITY)
    more = [replace(target, zeros_per_row=target.zeros_per_row + 1) for target in plan.targets]
    options = PRUNERS.get("magnitude").make_options()
    add_levels(ResidentLayers(model), None, [Wanted(database, [*plan.targets, *more], "magnitude", options)])
    score = PlanScores(model, database, text(4, 1))
    base = score(plan.targets)
    slopes = score.slopes(plan.targets, [(None, level) for level in more], range(4))
    assert slopes is not None
    measured = []
    for at, level in enumerate(more):
        measured.append(score([*plan.targets[:at], level, *plan.targets[at + 1 :]]) - base)
    expected = torch.tensor([up for _, up in slopes])
    assert all(math.isnan(down) for down, _ in slopes), "no level, no number"
    assert torch.corrcoef(torch.stack([expected, torch.tensor(measured)]))[0, 1] > 0.7
    assert score(plan.targets) == base, "the model is as it was"


def test_a_full_disk_is_found_out_before_the_pass(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(UserError, match="the disk is too full"):
        search(model, "auto", tmp_path / "db")
    assert [path.name for path in (tmp_path / "db").iterdir()] == ["levels.json"]
