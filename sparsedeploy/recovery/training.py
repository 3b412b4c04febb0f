"""The training loop: next-token cross-entropy over whole texts, adapters only, AdamW, linear warm-up and decay.

It can be read top to bottom. Every forward pass seeds its own dropout, so a run that was killed and resumed gives the
very weights of one that was not.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.models.structure import find_decoder_stack, plain_linears
from sparsedeploy.options import Options, option
from sparsedeploy.recovery.adapters import Adapter, attached
from sparsedeploy.recovery.state import RunState

_MEGABATCH = 50  # batches whose sequences are sorted together when grouping by length
_IGNORED = -100
STATE = "training"


@dataclass(frozen=True)
class TrainingOptions(Options):
    """How adapters are trained; the defaults are LoSA's, but for the warm-up."""

    learning_rate: float = option(
        2e-4,
        "Peak learning rate: a linear warm-up over `warmup_ratio` of the steps, then a linear decay to zero.",
        above=0,
    )
    warmup_ratio: float = option(0.03, "Fraction of the steps that warm up.", at_least=0, at_most=1)
    weight_decay: float = option(0.001, "Weight decay of AdamW.", at_least=0)
    clip: float = option(0.3, "Maximum gradient norm.", above=0)
    batch_size: int = option(
        4, "Sequences per forward pass; `accumulation` passes make one optimizer step.", at_least=1
    )
    accumulation: int = option(2, "Forward passes per optimizer step.", at_least=1)
    epochs: int = option(1, "Passes over the training text.", at_least=1)
    precision: Literal["model", "bfloat16"] = option(
        "model",
        "`model` computes in the weights' type; `bfloat16` multiplies in bfloat16 and keeps float32 weights. The "
        "adapters and the optimizer are float32 either way.",
    )
    checkpoint_gradients: bool = option(
        False, "Recompute each layer's activations in the backward pass to save memory."
    )
    group_by_length: bool = option(True, "Batch sequences of similar length, so that little padding is computed.")
    save_every: int = option(50, "Optimizer steps between checkpoints for `--resume`.", at_least=1)


@dataclass(frozen=True)
class TrainingReport:
    """What a training run did.

    Attributes:
        losses: of each optimizer step, mean cross-entropy in nats per token.
        tokens: trained on, padding left out.
        seconds: of the present process only.
    """

    losses: list[float]
    tokens: int
    seconds: float


def train_adapters(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    sequences: Sequence[torch.Tensor],
    options: TrainingOptions,
    *,
    seed: int,
    description: str = "train",
    state: RunState | None = None,
    tag: str = "",
) -> TrainingReport:
    """Train the adapters in place; the model's own weights stay as they are, and it ends in evaluation mode.

    Args:
        model: a causal LM whose linears the adapters are named after.
        sequences: int64 ``[length]`` each.
        state: where to save every ``save_every`` steps and to go on from; ``tag`` names this run in it.

    Raises:
        UserError: a loss or gradient that is not finite, naming the step; the adapters and the saved state are those
            of the last good step.
    """
    device = next(model.parameters()).device
    batches = make_batches([len(s) for s in sequences], options, seed)
    passes = len(batches)
    steps = math.ceil(passes / options.accumulation)
    parameters = [p for name in adapters for p in adapters[name].parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    warmup = round(options.warmup_ratio * steps)

    losses: list[float] = []
    tokens = 0
    if state is not None and (saved := state.load(STATE)) is not None and saved[1]["tag"] == tag:
        losses, tokens = _restore(saved, adapters, optimizer)

    def save() -> None:
        if state is not None:
            _save(state, tag, adapters, optimizer, losses, tokens)

    done = len(losses)  # optimizer steps; each but the last took `accumulation` passes
    first = min(done * options.accumulation, passes)
    started, counted = time.perf_counter(), 0
    pending: list[float] = []
    causal: Any = model
    if options.checkpoint_gradients:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    modules = (model, *adapters.values())
    for module in modules:
        module.train()
    try:
        with (
            attached(plain_linears(find_decoder_stack(model).all_linears(), "training"), adapters),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            progress.bar(description, steps, "steps") as advance,
        ):
            advance(done)
            for at in range(first, passes):
                torch.manual_seed(seed * 1_000_003 + at)
                batch = {key: value.to(device) for key, value in collate([sequences[i] for i in batches[at]]).items()}
                loss = batch_loss(model, batch, options.precision)
                _check(loss, "loss", len(losses) + 1, description, save)
                (loss / options.accumulation).backward()
                pending.append(loss.item())
                counted += int(batch["lengths"].sum())
                if (at + 1) % options.accumulation == 0 or at + 1 == passes:
                    norm = nn.utils.clip_grad_norm_(parameters, options.clip)
                    _check(norm, "gradient", len(losses) + 1, description, save)
                    for group in optimizer.param_groups:
                        group["lr"] = options.learning_rate * linear_schedule(len(losses), steps, warmup)
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(sum(pending) / len(pending))
                    pending.clear()
                    tokens, counted = tokens + counted, 0
                    speed = tokens / (time.perf_counter() - started)
                    advance(1, f"loss {_recent(losses):.3f}, {speed:.0f} tokens/s")
                    if len(losses) % options.save_every == 0 and len(losses) < steps:
                        save()
    finally:
        for module in modules:
            module.eval()
        if options.checkpoint_gradients:
            causal.gradient_checkpointing_disable()
        for parameter in parameters:
            parameter.grad = None
    return TrainingReport(losses, tokens, time.perf_counter() - started)


def batch_loss(model: nn.Module, batch: Mapping[str, torch.Tensor], precision: str = "model") -> torch.Tensor:
    """Mean cross-entropy (nats per token, float32) of a collated batch."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    labels = ids.masked_fill(mask == 0, _IGNORED)[:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)


def collate(sequences: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Pad on the right; what is padding is told by length, so a pad token equal to the end of text is no trap."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        "lengths": lengths,
    }


def make_batches(lengths: Sequence[int], options: TrainingOptions, seed: int) -> list[list[int]]:
    """The indices of every batch of every epoch, in order; decided by lengths, options and seed alone."""
    batches: list[list[int]] = []
    for epoch in range(options.epochs):
        rng = random.Random(f"{seed}:{epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        if options.group_by_length:
            size = _MEGABATCH * options.batch_size
            parts = [order[start : start + size] for start in range(0, len(order), size)]
            order = [index for part in parts for index in sorted(part, key=lambda i: -lengths[i])]
        cut = [order[start : start + options.batch_size] for start in range(0, len(order), options.batch_size)]
        if options.group_by_length:
            rng.shuffle(cut)
        batches.extend(cut)
    return batches


def linear_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate at an optimizer step counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return max(steps - step, 0) / max(steps - warmup, 1)


def _check(value: torch.Tensor, what: str, step: int, description: str, save: Any) -> None:
    if torch.isfinite(value):
        return
    save()
    raise UserError(
        f"{description}: the {what} is {value.item()} at step {step}; the state after step {step - 1} is kept",
        "Lower the learning rate (--train-option learning_rate=...), then run again with --resume.",
    )


def _recent(losses: Sequence[float]) -> float:
    last = losses[-20:]
    return sum(last) / len(last)


def _save(
    state: RunState,
    tag: str,
    adapters: Mapping[str, Adapter],
    optimizer: Any,
    losses: list[float],
    tokens: int,
) -> None:
    tensors = {f"{name}.{key}": value for name in adapters for key, value in adapters[name].state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{key}": value for key, value in moments.items()})
    state.save(STATE, tensors, {"tag": tag, "losses": losses, "tokens": tokens})


def _restore(
    saved: tuple[dict[str, torch.Tensor], dict[str, Any]],
    adapters: Mapping[str, Adapter],
    optimizer: Any,
) -> tuple[list[float], int]:
    """Put a saved state back; returns the losses and tokens so far."""
    tensors, values = saved
    for name, adapter in adapters.items():
        adapter.load_tensors({key: tensors[f"{name}.{key}"] for key in adapter.state_dict()})
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, moment = key.split(".")
            moments.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return list(values["losses"]), int(values["tokens"])
