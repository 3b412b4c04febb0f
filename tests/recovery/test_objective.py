"""What training minimises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsedeploy.masks import apply_mask
from sparsedeploy.quality.divergence import dense_predictions, divergence
from sparsedeploy.recovery.losa import LosaOptions, losa
from sparsedeploy.recovery.low_rank_training import LoraOptions
from sparsedeploy.recovery.objective import Distillation, Teacher, cross_entropy
from sparsedeploy.recovery.sparse_lora import sparse_lora
from sparsedeploy.recovery.state import RunState
from sparsedeploy.recovery.training import TrainingOptions, batch_loss, collate
from tests.recovery.jobs import job, pruned_job, train_adapters, training_data
from tests.recovery.test_training import adapters_of
from tests.small_models import VOCABULARY, random_model


def teacher(sequences: Sequence[torch.Tensor], dense: nn.Module, **changes: Any) -> Teacher:
    made = Teacher(sequences, changes.pop("state", None), **{"top": 16, "temperature": 1.0, **changes})
    made.predict(lambda: dense)
    return made


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.0, 1.0), (1.5, 0.3)])
def test_the_gradient_is_that_of_the_divergence_of_all_logits(temperature: float, weight: float) -> None:
    """With every token told apart; sequences of three lengths, so that padding is there."""
    dense, model = random_model("llama"), random_model("llama", seed=1)
    sequences = [torch.arange(5, 5 + length) for length in (4, 9, 6)]
    batch = collate(sequences)
    predictions = teacher(sequences, dense, top=VOCABULARY - 1, temperature=temperature)
    with torch.no_grad():
        wanted = dense(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
        values = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    gradients = []
    for logits in (values.clone().requires_grad_(), values.clone().requires_grad_()):
        if not gradients:
            loss = Distillation(predictions, weight, temperature)(logits, batch, [0, 1, 2])
        else:
            pairs = [(wanted[at, : len(s) - 1], logits[at, : len(s) - 1], s[1:]) for at, s in enumerate(sequences)]
            full, own, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            kl = nn.functional.kl_div(
                (own / temperature).log_softmax(-1), (full / temperature).softmax(-1), reduction="batchmean"
            )
            loss = weight * temperature**2 * kl + (1 - weight) * nn.functional.cross_entropy(own, targets)
        loss.backward()
        assert logits.grad is not None
        gradients.append((loss.item(), logits.grad))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-4)
    torch.testing.assert_close(gradients[0][1], gradients[1][1], rtol=1e-3, atol=1e-7)
    assert gradients[0][1][0, 3:].abs().max() == 0, "padding has no gradient"


def test_few_tokens_bound_the_divergence_from_below() -> None:
    dense, model = random_model("llama"), random_model("llama", seed=1)
    sequences = training_data(3).sequences
    batch = collate(sequences)
    losses = [
        batch_loss(model, batch, "model", Distillation(teacher(sequences, dense, top=top), 1.0, 1.0), [0, 1, 2]).item()
        for top in (4, 32, VOCABULARY - 1)
    ]
    assert 0 < losses[0] <= losses[1] <= losses[2]
    own = Distillation(teacher(sequences, dense), 1.0, 1.0)
    assert batch_loss(dense, batch, "model", own, [0, 1, 2]).item() == pytest.approx(0, abs=1e-5)


def test_predictions_are_kept_and_only_the_missing_ones_are_made_again(tmp_path: Path) -> None:
    dense, sequences = random_model("llama"), training_data(40).sequences
    state = RunState(tmp_path / "out", {}, resume=False)
    first = teacher(sequences, dense, state=state)
    tokens, logs = first.read(37)
    state.drop("dense-2")
    calls: list[int] = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    again = RunState(tmp_path / "out", {}, resume=True)
    second = teacher(sequences, dense, state=again)
    assert len(calls) == 40 - 32, "the sequences of the group that was missing"
    assert torch.equal(second.read(37)[0], tokens)
    assert torch.equal(second.read(37)[1], logs)

    def absent() -> nn.Module:
        raise AssertionError("nothing is missing")

    Teacher(sequences, again, top=16, temperature=1.0).predict(absent)


def test_learning_from_the_dense_model_comes_closer_to_it() -> None:
    """Same tokens and steps; the text is random, so its own cross-entropy teaches nothing of the dense model."""
    reached = {}
    for loss in ("ce", "kl"):
        work = pruned_job(count=120, loss=loss)
        windows = torch.stack(
            [torch.randint(0, 250, (24,), generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
        )
        predictions = dense_predictions(work.dense_model(), windows)
        before = divergence(work.model, predictions)
        recovered = sparse_lora(work, LoraOptions(rank=4, dropout=0.0))
        reached[loss] = divergence(work.model, predictions)
        for name, linear in work.linears.items():
            assert torch.equal(apply_mask(linear.weight, recovered.masks[name]), linear.weight)
    assert reached["kl"] < 0.9 * before
    assert reached["kl"] < reached["ce"]


def test_the_sequences_numbers_reach_the_objective() -> None:
    work = job()
    seen: list[int] = []

    def objective(logits: torch.Tensor, batch: Any, which: Sequence[int]) -> torch.Tensor:
        seen.extend(which)
        return cross_entropy(logits, batch)

    options = TrainingOptions(learning_rate=1e-3, batch_size=2)
    sequences = training_data(10).sequences
    train_adapters(work.model, adapters_of(work), sequences[4:], options, seed=0, objective=objective, first=4)
    assert sorted(seen) == list(range(4, 10))


def test_losa_learns_from_the_dense_model() -> None:
    work = job(count=40, loss="kl")
    recovered = losa(work, LosaOptions(steps=2, first_rank=2))
    assert recovered.plan.achieved == pytest.approx(0.6, abs=2e-3)
    assert all(step["tokens"] > 0 for step in recovered.report["steps"])
