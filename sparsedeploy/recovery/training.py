"""The training loop: an objective over whole texts, AdamW, linear warm-up and decay.

It can be read top to bottom. Every forward pass seeds its own dropout, so a run that was killed and resumed gives the
very weights of one that was not.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.models.structure import find_decoder_stack, plain_linears
from sparsedeploy.options import Options, option
from sparsedeploy.processes import SINGLE_PROCESS, Processes
from sparsedeploy.recovery.adapters import Adapter, attached
from sparsedeploy.recovery.objective import Objective, cross_entropy
from sparsedeploy.recovery.state import RunState

_MEGABATCH = 50  # batches whose sequences are sorted together when grouping by length
STATE = "training"


@dataclass(frozen=True)
class TrainingOptions(Options):
    """How adapters are trained; the defaults are LoSA's, but for the warm-up."""

    learning_rate: float = option(
        2e-4,
        "Peak learning rate: a linear warm-up over `warmup_ratio` of the steps, then a linear decay to zero. The "
        "default is LoSA's for 7B; a model of 135M, trained for 50 steps, did best with 1e-2 for adapters and 1e-3 for "
        "`elsa`.",
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
        "`model` computes in the weights' type; `bfloat16` multiplies in bfloat16 and keeps float32 weights, which is "
        "faster on GPUs and on processors with AMX, not on every other. The adapters and the optimizer are float32 "
        "either way.",
    )
    checkpoint_gradients: bool = option(
        False, "Recompute each layer's activations in the backward pass to save memory."
    )
    group_by_length: bool = option(True, "Batch sequences of similar length, so that little padding is computed.")
    kl_weight: float = option(
        0.5,
        "Share of the divergence from the dense model with `--loss both`; the text's loss has the rest.",
        at_least=0,
        at_most=1,
    )
    kl_temperature: float = option(
        1.0, "Temperature of both distributions in the divergence; the loss is scaled by its square.", above=0
    )
    kl_top: int = option(
        64, "Number of the dense model's most likely tokens that are kept, at 8 bytes each per token.", at_least=1
    )
    save_every: int = option(50, "Optimizer steps between checkpoints for `--resume`.", at_least=1)


@dataclass(frozen=True)
class TrainingReport:
    """What a training run did.

    Attributes:
        losses: of each optimizer step, the objective's mean in nats per token.
        tokens: trained on, padding left out.
        seconds: of the present process only.
    """

    losses: list[float]
    tokens: int
    seconds: float


class Trainee:
    """What a run trains, and what it does around a step; here nothing."""

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves; the same objects throughout."""
        raise NotImplementedError

    def modules(self) -> Sequence[nn.Module]:
        """Besides the model, what is in training mode meanwhile."""
        return ()

    def attached(self) -> AbstractContextManager[None]:
        """Within the block the model computes with what is trained."""
        return nullcontext()

    def stepped(self, optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
        """After optimizer step ``step``, counted from 0."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that :meth:`load` needs."""
        raise NotImplementedError

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put a saved state back."""
        raise NotImplementedError


class AdapterTraining(Trainee):
    """Adapters on the linears that they are named after; the model's own weights stay as they are."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        self.linears = plain_linears(find_decoder_stack(model).all_linears(), "training")
        self.adapters = adapters

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters.values() for parameter in adapter.parameters()]

    def modules(self) -> Sequence[nn.Module]:
        return tuple(self.adapters.values())

    def attached(self) -> AbstractContextManager[None]:
        return attached(self.linears, self.adapters)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{key}": value
            for name, adapter in self.adapters.items()
            for key, value in adapter.state_dict().items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, adapter in self.adapters.items():
            adapter.load_tensors({key: tensors[f"{name}.{key}"] for key in adapter.state_dict()})


def train(
    model: nn.Module,
    trainee: Trainee,
    sequences: Sequence[torch.Tensor],
    options: TrainingOptions,
    *,
    seed: int,
    objective: Objective = cross_entropy,
    first: int = 0,
    description: str = "train",
    state: RunState | None = None,
    tag: str = "",
    processes: Processes = SINGLE_PROCESS,
) -> TrainingReport:
    """Train in place; the model ends in evaluation mode.

    Several processes share the passes of each step and add up their gradients, so the steps are those of one process.

    Args:
        model: a causal LM.
        sequences: int64 ``[length]`` each; the objective knows the first one by the number ``first``.
        state: where to save every ``save_every`` steps and to go on from; ``tag`` names this run in it.

    Raises:
        UserError: a loss or gradient that is not finite, naming the step; what is trained and the saved state are those
            of the last good step. More processes than passes in a step.
    """
    if processes.count > options.accumulation:
        raise UserError(
            f"{processes.count} processes cannot share the {options.accumulation} passes of a step",
            f"Use --train-option accumulation={processes.count}, or fewer processes.",
        )
    device = next(model.parameters()).device
    batches = make_batches([len(s) for s in sequences], options, seed)
    passes = len(batches)
    steps = steps_of(sequences, options)
    parameters = trainee.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    warmup = round(options.warmup_ratio * steps)

    losses: list[float] = []
    tokens = 0
    if state is not None and (saved := state.load(STATE)) is not None and saved[1]["tag"] == tag:
        losses, tokens = _restore(saved, trainee, optimizer)

    def save() -> None:
        if state is not None:
            _save(state, tag, trainee, optimizer, losses, tokens)

    done = len(losses)  # optimizer steps; each but the last took `accumulation` passes
    start = min(done * options.accumulation, passes)
    started, counted = time.perf_counter(), 0
    pending: list[float] = []
    causal: Any = model
    if options.checkpoint_gradients:
        causal.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    modules = (model, *trainee.modules())
    for module in modules:
        module.train()
    try:
        with (
            trainee.attached(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            progress.bar(description, steps, "steps") as advance,
        ):
            advance(done)
            for at in range(start, passes):
                if at % options.accumulation % processes.count == processes.index:
                    torch.manual_seed(seed * 1_000_003 + at)
                    chosen = collate([sequences[i] for i in batches[at]])
                    batch = {key: value.to(device) for key, value in chosen.items()}
                    loss = batch_loss(model, batch, options.precision, objective, [first + i for i in batches[at]])
                    if processes.count == 1:
                        _check(loss, "loss", len(losses) + 1, description, save)
                    (loss / options.accumulation).backward()
                    pending.append(loss.item())
                    counted += int(batch["lengths"].sum())
                if (at + 1) % options.accumulation == 0 or at + 1 == passes:
                    totals = _shared(pending, counted, parameters, processes)
                    _check(totals[0], "loss", len(losses) + 1, description, save)
                    norm = nn.utils.clip_grad_norm_(parameters, options.clip)
                    _check(norm, "gradient", len(losses) + 1, description, save)
                    for group in optimizer.param_groups:
                        group["lr"] = options.learning_rate * linear_schedule(len(losses), steps, warmup)
                    optimizer.step()
                    optimizer.zero_grad()
                    trainee.stepped(optimizer, len(losses), steps)
                    losses.append(totals[0].item() / int(totals[1]))
                    pending.clear()
                    tokens, counted = tokens + int(totals[2]), 0
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


def batch_loss(
    model: nn.Module,
    batch: Mapping[str, torch.Tensor],
    precision: str = "model",
    objective: Objective = cross_entropy,
    which: Sequence[int] = (),
) -> torch.Tensor:
    """The objective's mean (nats per token, float32) of a collated batch of the sequences ``which``."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return objective(logits, batch, which)


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


def steps_of(sequences: Sequence[torch.Tensor], options: TrainingOptions) -> int:
    """The optimizer steps of a run."""
    passes = options.epochs * math.ceil(len(sequences) / options.batch_size)
    return math.ceil(passes / options.accumulation)


def linear_schedule(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate at an optimizer step counted from 0."""
    if step < warmup:
        return (step + 1) / warmup
    return max(steps - step, 0) / max(steps - warmup, 1)


def _shared(
    pending: Sequence[float], counted: int, parameters: Sequence[nn.Parameter], processes: Processes
) -> torch.Tensor:
    """Sum of the losses, passes and tokens of a step over all processes, float64; the gradients are summed in place."""
    device = parameters[0].device
    totals = torch.tensor([math.fsum(pending), len(pending), counted], dtype=torch.float64, device=device)
    processes.all_reduce(totals)
    if processes.count > 1:
        for parameter in parameters:
            if parameter.grad is None:  # this process had no pass
                parameter.grad = torch.zeros_like(parameter)
            processes.all_reduce(parameter.grad)
    return totals


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
    trainee: Trainee,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    tokens: int,
) -> None:
    tensors = trainee.tensors()
    for index, moments in optimizer.state_dict()["state"].items():
        tensors.update({f"optimizer.{index}.{key}": value for key, value in moments.items()})
    state.save(STATE, tensors, {"tag": tag, "losses": losses, "tokens": tokens})


def _restore(
    saved: tuple[dict[str, torch.Tensor], dict[str, Any]], trainee: Trainee, optimizer: torch.optim.Optimizer
) -> tuple[list[float], int]:
    """Put a saved state back; returns the losses and tokens so far."""
    tensors, values = saved
    trainee.load(tensors)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, moment = key.split(".")
            moments.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return list(values["losses"]), int(values["tokens"])
