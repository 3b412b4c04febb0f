"""All weights trained while their mask moves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsedeploy.errors import UserError
from sparsedeploy.masks import apply_mask, broken_groups
from sparsedeploy.plan import ModuleTarget
from sparsedeploy.recovery.elsa import ElsaOptions, ElsaTraining, elsa
from sparsedeploy.recovery.state import RunState
from sparsedeploy.recovery.training import STATE, TrainingOptions
from tests.recovery.jobs import pruned_job, weights
from tests.small_models import random_model

OPTIONS = ElsaOptions(interval=3, penalty=0.3, settle=0.4)
TRAINING = TrainingOptions(learning_rate=3e-3, batch_size=2, accumulation=1, clip=1.0, save_every=1)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("scope", ["matrix", "row"])
@pytest.mark.parametrize("start", ["pruned", "dense"])
def test_the_mask_moves_and_the_budget_is_exact(pattern: str, scope: str, start: str) -> None:
    work = pruned_job(pattern=pattern, training=TRAINING)
    before = {name: mask.clone() for name, mask in (work.masks or {}).items()}
    options = dataclasses.replace(OPTIONS, scope=scope, start=start)
    recovered = elsa(work, options)
    assert work.plan is not None
    for name, target in work.plan.by_name.items():
        mask, weight = recovered.masks[name], work.linears[name].weight
        assert int((~mask).sum()) == target.zeros
        assert torch.equal(apply_mask(weight, mask), weight), "what the mask prunes is exactly zero"
        if pattern == "2:4":
            assert broken_groups(mask, 2, 4) == 0
        elif scope == "row":
            assert bool(((~mask).sum(dim=1) == target.zeros_per_row).all())
    moved = sum(int((recovered.masks[name] != before[name]).sum()) for name in before)
    assert moved > 0
    assert recovered.report["mask_moved"] == pytest.approx(moved / 2 / sum(int(m.sum()) for m in before.values()))


def test_what_is_not_pruned_stays_and_gradients_are_off() -> None:
    work = pruned_job(training=TRAINING)
    before = weights(work.model)
    elsa(work, OPTIONS)
    trained = {f"{name}.weight" for name in work.linears}
    for name, value in weights(work.model).items():
        assert torch.equal(value, before[name]) == (name not in trained)
    assert not any(parameter.requires_grad for parameter in work.model.parameters())


def test_weights_without_a_gradient_are_projected_too() -> None:
    """An expert that no token has reached yet: Adam knows nothing of it."""
    linears = {name: torch.nn.Linear(8, 4, bias=False) for name in ("reached", "idle")}
    masks = {name: torch.arange(32).reshape(4, 8) % 2 == 0 for name in linears}
    targets = {name: ModuleTarget(name, 4, 8, 4) for name in linears}
    training = ElsaTraining(linears, masks, targets, dataclasses.replace(OPTIONS, interval=1), 2)
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-2)
    for step in range(2):
        linears["reached"](torch.ones(1, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        training.stepped(optimizer, step, 2)
    for name, linear in linears.items():
        assert int((~training.masks[name]).sum()) == 16
        assert not linear.weight[~training.masks[name]].any()


def test_settle_one_trains_inside_the_pruners_mask() -> None:
    work = pruned_job(training=TRAINING)
    before = {name: mask.clone() for name, mask in (work.masks or {}).items()}
    recovered = elsa(work, dataclasses.replace(OPTIONS, settle=1.0))
    assert all(torch.equal(recovered.masks[name], before[name]) for name in before)
    assert recovered.report["mask_moved"] == 0


def test_it_learns_the_text() -> None:
    """One sequence over and over: the loss falls, after the mask has settled too."""
    work = pruned_job(training=dataclasses.replace(TRAINING, epochs=3))
    assert work.data is not None
    work.data = dataclasses.replace(work.data, sequences=[torch.arange(20)] * 40)
    report = elsa(work, OPTIONS).report
    assert report["last_loss"] < report["first_loss"] - 0.5


@pytest.mark.parametrize("states", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("killed_at", [4, 17])
def test_a_killed_run_resumes_bit_for_bit(states: str, killed_at: int, tmp_path: Path) -> None:
    """Killed while the mask moves (the 4th of 12 such steps), and after it has settled (the 17th of 20)."""
    options = dataclasses.replace(OPTIONS, states=states)
    whole = pruned_job(training=TRAINING)
    expected = elsa(whole, options)

    class Killed(Exception):
        pass

    class Dying(RunState):
        def save(self, name: str, tensors: Any, values: Any) -> None:
            super().save(name, tensors, values)
            if name == STATE and len(values["losses"]) == killed_at:
                raise Killed

    work = pruned_job(training=TRAINING, state=Dying(tmp_path / "out", {}, resume=False))
    with pytest.raises(Killed):
        elsa(work, options)
    work = pruned_job(training=TRAINING, state=RunState(tmp_path / "out", {}, resume=True))
    resumed = elsa(work, options)
    assert resumed.report["tokens"] == expected.report["tokens"]
    for name in expected.masks:
        assert torch.equal(resumed.masks[name], expected.masks[name])
        assert torch.equal(work.linears[name].weight, whole.linears[name].weight)


def test_the_projection_follows_the_gradients() -> None:
    """Of two equal weights the one whose gradient was larger is kept; by magnitude the first is dropped."""
    kept = []
    for projection in ("objective", "magnitude"):
        linear = torch.nn.Linear(4, 1, bias=False)
        linear.weight.data = torch.tensor([[1.0, 1.0, 3.0, 3.0]])
        masks = {"x": torch.tensor([[False, True, True, True]])}
        options = ElsaOptions(interval=1, projection=projection, penalty=1e-6)
        training = ElsaTraining({"x": linear}, masks, {"x": ModuleTarget("x", 1, 4, 1)}, options, 2)
        optimizer = torch.optim.AdamW(training.parameters(), lr=1e-6, weight_decay=0)
        linear.weight.grad = torch.tensor([[2.0, 0.5, 1.0, 1.0]])
        optimizer.step()
        training.stepped(optimizer, 0, 4)
        kept.append(training.masks["x"][0].tolist())
    assert kept[0] == [True, False, True, True]
    assert kept[1].count(False) == 1
    assert kept[1][2:] == [True, True]


def test_admm_reaches_the_best_sparse_point_of_a_quadratic() -> None:
    """min |x - c|^2 with two of four weights: the two largest of c, at their values."""
    wanted = torch.tensor([[3.0, -0.5, 2.0, 0.1]])
    linear = torch.nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    masks = {"x": linear.weight.data != 0}
    options = ElsaOptions(interval=2, penalty=0.05, projection="magnitude", ramp="constant", states="float32")
    training = ElsaTraining({"x": linear}, masks, {"x": ModuleTarget("x", 1, 4, 2)}, options, 300)
    optimizer = torch.optim.AdamW(training.parameters(), lr=0.03, weight_decay=0)
    for step in range(600):
        linear.weight.grad = 2 * (linear.weight.detach() - wanted)
        optimizer.step()
        training.stepped(optimizer, step, 600)
    torch.testing.assert_close(linear.weight.detach(), torch.tensor([[3.0, 0, 2.0, 0]]), rtol=0, atol=0.02)


def test_text_for_less_than_an_interval_moves_the_mask_once() -> None:
    work = pruned_job(count=4, training=TRAINING)
    recovered = elsa(work, dataclasses.replace(OPTIONS, interval=30, start="dense"))
    assert recovered.report["mask_moved"] > 0
    assert work.plan is not None
    assert all(int((~recovered.masks[t.name]).sum()) == t.zeros for t in work.plan.targets)


def test_weights_that_cannot_be_trained() -> None:
    work = pruned_job(model=random_model("llama").to(torch.bfloat16), training=TRAINING)
    with pytest.raises(UserError, match=r"bfloat16.*--dtype float32"):
        elsa(work, OPTIONS)
