"""The training loop and its text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsedeploy.calibration.documents import instruction_text
from sparsedeploy.errors import UserError
from sparsedeploy.recovery.adapters import Adapter
from sparsedeploy.recovery.data import load_training_data, step_slices
from sparsedeploy.recovery.options import DataOptions
from sparsedeploy.recovery.state import RunState
from sparsedeploy.recovery.training import (
    STATE,
    TrainingOptions,
    batch_loss,
    collate,
    linear_schedule,
    make_batches,
)
from tests.recovery.jobs import job, train_adapters, training_data
from tests.small_models import byte_tokenizer, random_model

EOS = 257


def adapters_of(work: Any, seed: int = 0) -> dict[str, Adapter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Adapter(linear, 2, torch.ones_like(linear.weight, dtype=torch.bool), generator=generator)
        for name, linear in work.linears.items()
    }


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_rows_of_text_and_of_instructions(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl",
        [{"text": "plain text row"}, {"instruction": "Add.", "input": "1 and 2", "output": "3"}],
    )
    tokenizer = byte_tokenizer()
    data = load_training_data(tokenizer, DataOptions(str(path), max_length=200))
    texts = {tokenizer.decode(sequence[:-1]) for sequence in data.sequences}
    assert texts == {"plain text row", instruction_text("Add.", "1 and 2", "3")}
    assert all(sequence[-1] == EOS for sequence in data.sequences), "the end of the text is trained on"


def test_instruction_without_input_has_no_empty_section() -> None:
    assert "Input" not in instruction_text("Do.", " ", "Done.")


def test_rows_are_cut_and_plain_text_is_cut_into_pieces(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a" * 50}])
    plain = tmp_path / "plain.txt"
    plain.write_text("b" * 50)
    options = DataOptions(str(rows), max_length=20)
    assert [len(s) for s in load_training_data(byte_tokenizer(), options).sequences] == [20]
    pieces = load_training_data(byte_tokenizer(), dataclasses.replace(options, data=str(plain))).sequences
    assert sorted(len(s) for s in pieces) == [11, 20, 20]


def test_the_subset_is_seeded(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"row number {at}"} for at in range(50)])

    def drawn(seed: int) -> list[list[int]]:
        data = load_training_data(byte_tokenizer(), DataOptions(str(path), samples=10, max_length=64, seed=seed))
        return [s.tolist() for s in data.sequences]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len(drawn(1)) == 10


def test_slices_are_the_published_shares() -> None:
    assert [len(r) for r in step_slices(10_000, 5)] == [1000, 1000, 1000, 1000, 6000]
    assert sorted(i for r in step_slices(103, 5) for i in r) == list(range(103)), "each sequence once"
    reference = step_slices(10_000, 5, reference=True)
    assert [(r.start, r.stop) for r in reference][:2] == [(1000, 2000), (2000, 3000)]
    assert (reference[-1].start, reference[-1].stop) == (4000, 10_000)
    assert step_slices(7, 1) == [range(7)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "ab"}', "shorter than 8 tokens"),
        ("", "holds no text"),
        ("{broken", "is not valid JSON"),
        ('{"prompt": "x"}', "neither 'text' nor 'instruction'"),
        ('["text"]', "line 1 is a list"),
    ],
)
def test_bad_rows_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_training_data(byte_tokenizer(), DataOptions(str(path)))


def test_too_few_sequences_for_the_steps() -> None:
    with pytest.raises(UserError, match="too few"):
        step_slices(9, 5)


def test_batches_hold_every_sequence_once_and_group_lengths() -> None:
    lengths = [int(x) for x in torch.randint(5, 100, (203,), generator=torch.Generator().manual_seed(0))]
    options = TrainingOptions(batch_size=4, epochs=2)
    batches = make_batches(lengths, options, seed=0)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == sorted(list(range(203)) * 2)
    assert batches == make_batches(lengths, options, seed=0)
    assert batches != make_batches(lengths, options, seed=1)

    def padding(chosen: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in chosen)

    ungrouped = make_batches(lengths, dataclasses.replace(options, group_by_length=False), seed=0)
    assert padding(batches) < padding(ungrouped) / 4


def test_padding_by_length_trains_on_the_end_of_text() -> None:
    """The pad token is 0 here, and even where a real token equals it, it is trained on."""
    model = random_model("llama")
    short, long = torch.tensor([5, 0, 7, EOS]), torch.arange(9)
    batch = collate([short, long])
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 9]
    with torch.no_grad():
        loss = batch_loss(model, batch)
        parts = [batch_loss(model, collate([s])) * (len(s) - 1) for s in (short, long)]
    assert loss.item() == pytest.approx((sum(parts) / (3 + 8)).item(), rel=1e-5)  # type: ignore[union-attr]


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    factors = [linear_schedule(step, 10, 3) for step in range(11)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[3] == 1
    assert factors[10] == 0
    assert factors[3:] == sorted(factors[3:], reverse=True)


def test_accumulation_equals_a_larger_batch() -> None:
    """Sequences of one length: two batches of 2 accumulated step like one of 4."""
    results = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        work = job()
        adapters = adapters_of(work)
        for adapter in adapters.values():
            adapter.dropout.p = 0.0
        options = TrainingOptions(
            learning_rate=1e-2, batch_size=batch_size, accumulation=accumulation, group_by_length=False
        )
        sequences = [torch.randint(0, 250, (12,), generator=torch.Generator().manual_seed(i)) for i in range(8)]
        report = train_adapters(work.model, adapters, sequences, options, seed=0)
        assert len(report.losses) == 2
        results.append(torch.cat([adapter.delta().flatten() for adapter in adapters.values()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_nothing() -> None:
    deltas = []
    for checkpoint in (False, True):
        work = job()
        adapters = adapters_of(work)
        options = TrainingOptions(learning_rate=1e-2, accumulation=1, checkpoint_gradients=checkpoint)
        train_adapters(work.model, adapters, training_data(12).sequences, options, seed=0)
        deltas.append(torch.cat([adapter.delta().flatten() for adapter in adapters.values()]))
    torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-4, atol=1e-6)
    assert deltas[0].abs().max() > 0


def test_bfloat16_products_keep_float32_adapters() -> None:
    work = job()
    adapters = adapters_of(work)
    options = TrainingOptions(learning_rate=1e-2, accumulation=1, precision="bfloat16")
    report = train_adapters(work.model, adapters, training_data(12).sequences, options, seed=0)
    assert all(adapter.a.dtype == torch.float32 for adapter in adapters.values())
    assert all(torch.isfinite(torch.tensor(loss)) for loss in report.losses)


@pytest.mark.parametrize("break_at", [1, 3])
def test_a_loss_that_turns_nan_stops_with_the_step_and_keeps_the_last_good_state(
    break_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of two passes; the NaN comes in the second pass of the step, after a good first one."""
    from sparsedeploy.recovery import training as module

    options = TrainingOptions(learning_rate=1e-2, batch_size=4, accumulation=2)
    sequences = training_data(40).sequences
    original = module.batch_loss
    calls = 0

    def poisoned(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(*args)
        return loss * float("nan") if calls == 2 * break_at else loss

    work = job()
    adapters = adapters_of(work)
    state = RunState(tmp_path / "out", {}, resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "batch_loss", poisoned)
        with pytest.raises(UserError, match=rf"loss is nan at step {break_at}; the state after step {break_at - 1}"):
            train_adapters(work.model, adapters, sequences, options, seed=0, state=state, tag="t")
    saved = state.load(STATE)
    assert saved is not None
    assert len(saved[1]["losses"]) == break_at - 1
    assert all(torch.isfinite(parameter).all() for adapter in adapters.values() for parameter in adapter.parameters())

    resumed_work = job()
    resumed = adapters_of(resumed_work)
    train_adapters(
        resumed_work.model,
        resumed,
        sequences,
        options,
        seed=0,
        state=RunState(tmp_path / "out", {}, resume=True),
        tag="t",
    )
    whole_work = job()
    whole = adapters_of(whole_work)
    train_adapters(whole_work.model, whole, sequences, options, seed=0)
    for name in whole:
        assert torch.equal(whole[name].delta(), resumed[name].delta())


def test_a_changed_request_cannot_be_resumed_and_loses_nothing(tmp_path: Path) -> None:
    state = RunState(tmp_path / "out", {"rank": 8}, resume=False)
    state.save("x", {"a": torch.ones(2)}, {"n": 1})
    with pytest.raises(UserError, match=r"rank changed .* \(rank was 8, is 4\)"):
        RunState(tmp_path / "out", {"rank": 4}, resume=True)
    loaded = RunState(tmp_path / "out", {"rank": 8}, resume=True).load("x")
    assert loaded is not None
    assert torch.equal(loaded[0]["a"], torch.ones(2))
    assert RunState(tmp_path / "out", {"rank": 4}, resume=False).load("x") is None


@pytest.mark.parametrize("values", [{"learning_rate": 0}, {"batch_size": 0}, {"warmup_ratio": 2}, {"save_every": 0}])
def test_training_options_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="It takes"):
        TrainingOptions(**values)
