"""The dynamic loop with every kind of pattern and pruner."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from sparsedeploy.masks import broken_groups
from sparsedeploy.recovery import losa as module
from sparsedeploy.recovery.base import RecoveryJob
from sparsedeploy.recovery.losa import LosaOptions, losa
from sparsedeploy.recovery.reconstruction import reconstruction_losses, relative_error
from sparsedeploy.recovery.state import RunState
from sparsedeploy.registry import ALLOCATORS
from tests.recovery.jobs import job, train_adapters, weights
from tests.small_models import random_model

THREE = LosaOptions(steps=3, first_rank=2, r_max=4, dropout=0.1)


@pytest.mark.parametrize("pruner", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "mixed-2:8"])
def test_zeros_are_the_masks_complement_after_every_phase(
    pruner: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job(sparsity=0.6, pattern=pattern, pruner=pruner)
    phases: list[str] = []
    original_prune, original_train = module._Run.prune, module._Run.train

    def check(run: module._Run, phase: str) -> None:
        phases.append(phase)
        for name, linear in run.linears.items():
            mask = run.masks[name]
            assert not linear.weight[~mask].any(), f"{phase}: {name}"
            assert not run.adapters[name].delta()[~mask].any(), f"{phase}: {name}"
            assert int((~mask).sum()) == run.plan.by_name[name].zeros  # type: ignore[union-attr]

    def prune(run: module._Run, *args: object) -> None:
        original_prune(run, *args)  # type: ignore[arg-type]
        check(run, "prune")

    def train(run: module._Run, *args: object) -> None:
        original_train(run, *args)  # type: ignore[arg-type]
        check(run, "train")

    monkeypatch.setattr(module._Run, "prune", prune)
    monkeypatch.setattr(module._Run, "train", train)
    result = losa(work, THREE)
    assert phases == ["prune", "train"] * 3
    total = sum(t.size for t in result.plan.targets)
    row_unit = 0.0 if work.pattern else max(t.rows for t in result.plan.targets) / total
    assert abs(result.plan.achieved - work.sparsity) <= row_unit + 1e-12
    for name, linear in work.linears.items():
        mask = result.masks[name]
        assert not linear.weight[~mask].any()
        target = result.plan.by_name[name]
        if target.pattern:
            assert broken_groups(mask, target.pattern.n, target.pattern.m) == 0


def test_sparsity_after_each_step_is_the_schedules() -> None:
    result = losa(job(sparsity=0.7), THREE)
    reached = [step["sparsity"] for step in result.report["steps"]]
    assert reached == pytest.approx([0.7 * (1 - (2 / 3) ** 3), 0.7 * (1 - (1 / 3) ** 3), 0.7], abs=2e-3)
    assert [sum(step["ranks"]) for step in result.report["steps"]] == [8, 12, 16]


def test_merged_forward_is_the_unmerged_one(monkeypatch: pytest.MonkeyPatch) -> None:
    work = job()
    tokens = torch.randint(0, 250, (2, 16))
    seen: list[torch.Tensor] = []
    original = module._Run.finish

    def finish(run: module._Run) -> object:
        from sparsedeploy.recovery.adapters import attached

        with torch.no_grad(), attached(run.linears, run.adapters):
            seen.append(work.model(input_ids=tokens).logits)
        assert any(adapter.delta().abs().max() > 1e-3 for adapter in run.adapters.values()), "training did nothing"
        return original(run)

    monkeypatch.setattr(module._Run, "finish", finish)
    losa(work, THREE)
    with torch.no_grad():
        torch.testing.assert_close(work.model(input_ids=tokens).logits, seen[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_models_keep_their_zeros() -> None:
    work = job(random_model("llama", num_hidden_layers=2).to(torch.bfloat16))
    result = losa(work, LosaOptions(steps=2, first_rank=2))
    for name, linear in work.linears.items():
        assert linear.weight.dtype == torch.bfloat16
        assert not linear.weight[~result.masks[name]].any()


@pytest.mark.parametrize("allocation", ["owl", "lsa", "dlp", "alphapruning", "atp", "uniform"])
def test_any_allocator_drives_the_loop(allocation: str) -> None:
    options = ALLOCATORS.get(allocation).make_options()
    result = losa(job(allocation=allocation, allocation_options=options), LosaOptions(steps=2, first_rank=2))
    assert result.plan.allocation == allocation
    assert result.plan.achieved == pytest.approx(0.6, abs=2e-3)


def test_switches_turn_the_strategies_off() -> None:
    uniform = losa(job(), LosaOptions(steps=2, first_rank=2, layer_rates=False))
    for step in uniform.report["steps"]:
        assert max(step["rates"]) - min(step["rates"]) < 2e-2
    assert uniform.plan.allocation == "uniform"
    equal = losa(job(), LosaOptions(steps=2, first_rank=2, rank_allocation=False))
    assert [set(step["ranks"]) for step in equal.report["steps"]] == [{2}, {3}]
    once = losa(job(), LosaOptions(steps=5, dynamic=False))
    assert len(once.report["steps"]) == 1
    assert once.report["steps"][0]["mean_rank"] == 8
    assert once.report["steps"][0]["tokens"] == job().training_data().tokens


def test_the_reference_switch_caps_ranks_at_eight() -> None:
    result = losa(job(), LosaOptions(steps=3, first_rank=9, reference_ranks=True))
    assert max(max(step["ranks"]) for step in result.report["steps"]) <= 8


def test_equal_seeds_give_equal_weights_and_calibration_batches_do_not_matter() -> None:
    results = []
    for batch_size in (1, 4):
        work = job(batch_size=batch_size)
        losa(work, THREE)
        results.append(weights(work.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 3, 5, 7])
def test_killed_and_resumed_gives_the_same_bits(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill after any number of saves: phases, and steps in the middle of training."""
    whole = job(pruner="sparsegpt")
    whole.training = dataclasses.replace(whole.training, save_every=1)
    expected = losa(whole, THREE)

    def again(resume: bool) -> RecoveryJob:
        work = job(pruner="sparsegpt")
        work.training = whole.training
        work.state = RunState(tmp_path / "out", {"x": 1}, resume=resume)
        return work

    saves = 0
    original = RunState.save

    def save(self: RunState, *args: object) -> None:
        nonlocal saves
        original(self, *args)  # type: ignore[arg-type]
        saves += 1
        if saves == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "save", save)
        with pytest.raises(Killed):
            losa(again(False), THREE)
    resumed = again(True)
    result = losa(resumed, THREE)
    assert result.plan == expected.plan
    for name, tensor in weights(whole.model).items():
        assert torch.equal(tensor, weights(resumed.model)[name]), name
    for name, mask in expected.masks.items():
        assert torch.equal(mask, result.masks[name])


def test_reconstruction_loss_is_the_formula_and_grows_with_damage() -> None:
    torch.manual_seed(0)
    y, other = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    expected = (((y - other) ** 2).sum((0, 1)) / (y**2).sum((0, 1))).mean().item()
    assert relative_error(y, other) == pytest.approx(expected, rel=1e-6)
    assert relative_error(y, y) == 0
    assert relative_error(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)) == 0


def test_reconstruction_losses_compare_layer_outputs() -> None:
    dense = random_model("llama")
    pruned = copy.deepcopy(dense)
    tokens = torch.randint(0, 250, (3, 12))
    assert reconstruction_losses(dense, pruned, tokens) == [0.0, 0.0]
    pruned.model.layers[1].mlp.down_proj.weight.data.zero_()
    losses = reconstruction_losses(dense, pruned, tokens, batch_size=2)
    assert losses[0] == 0
    outputs: list[torch.Tensor] = []
    handles = [
        m.model.layers[1].register_forward_hook(lambda mod, a, out: outputs.append(out)) for m in (dense, pruned)
    ]
    with torch.no_grad():
        dense(input_ids=tokens)
        pruned(input_ids=tokens)
    for handle in handles:
        handle.remove()
    assert losses[1] == pytest.approx(relative_error(*outputs), rel=1e-4)


def test_training_leaves_base_weights_and_lowers_the_loss() -> None:
    work = job()
    from sparsedeploy.recovery.adapters import Adapter

    before = weights(work.model)
    adapters = {
        name: Adapter(linear, 4, torch.rand_like(linear.weight) > 0.3, dropout=0.0)
        for name, linear in work.linears.items()
    }
    sequence = torch.arange(20)
    report = train_adapters(work.model, adapters, [sequence] * 120, work.training, seed=0)
    assert report.losses[-1] < report.losses[0] - 0.5
    assert report.tokens == 120 * 20
    after = weights(work.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not work.model.training
