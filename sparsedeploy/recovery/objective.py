"""What training minimises: the text's own next tokens, the dense model's predictions, or both.

The dense model predicts every training sequence once, before the training; its most likely tokens at each position are
kept, and the rest as one. On disk that takes ``8 (top + 1)`` bytes a token; in memory the dense model stands beside the
pruned one while it predicts, afterwards the predictions of a few groups of sequences do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.models.predictions import coarse_logs, coarse_predictions, next_token_logits
from sparsedeploy.processes import SINGLE_PROCESS, Processes
from sparsedeploy.recovery.options import Loss
from sparsedeploy.recovery.state import RunState

_GROUP = 16  # sequences whose predictions are stored together
_NAME = "dense-{}"


class Objective(Protocol):
    """Mean loss in nats per token of a collated batch, float32."""

    def __call__(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor], which: Sequence[int]) -> torch.Tensor:
        """Logits ``[sequences, length, vocabulary]``; ``which`` are the sequences' numbers in the training text."""


def cross_entropy(logits: torch.Tensor, batch: Mapping[str, torch.Tensor], which: Sequence[int] = ()) -> torch.Tensor:
    """Of the text's next tokens; padding does not count."""
    return nn.functional.cross_entropy(_predictions(logits, batch), _targets(batch))


@dataclass(frozen=True)
class Distillation:
    """KL(dense || model) with both distributions at a temperature, times its square; a share of it beside the text's.

    Attributes:
        weight: of the divergence; the cross-entropy has the rest.
    """

    teacher: Teacher
    weight: float
    temperature: float

    def __call__(self, logits: torch.Tensor, batch: Mapping[str, torch.Tensor], which: Sequence[int]) -> torch.Tensor:
        predictions = _predictions(logits, batch)
        found = [self.teacher.read(index) for index in which]
        tokens = torch.cat([tokens for tokens, _ in found]).to(predictions.device, torch.int64)
        dense = torch.cat([logs for _, logs in found]).to(predictions.device)
        logs = coarse_logs(predictions / self.temperature, tokens)
        loss = self.weight * self.temperature**2 * (dense.exp() * (dense - logs)).sum(dim=-1).mean()
        if self.weight < 1:
            loss = loss + (1 - self.weight) * nn.functional.cross_entropy(predictions, _targets(batch))
        return loss


class Teacher:
    """The dense model's predictions on the training sequences.

    Args:
        state: keeps them on disk, so that a resumed run predicts what is missing only; None keeps them in memory.
    """

    def __init__(
        self, sequences: Sequence[torch.Tensor], state: RunState | None, *, top: int, temperature: float
    ) -> None:
        self._sequences = sequences
        self._state = state
        self._top, self._temperature = top, temperature
        self._groups: dict[int, dict[str, torch.Tensor]] = {}  # the last one read; all of them without a state

    def predict(self, dense: Callable[[], nn.Module], processes: Processes = SINGLE_PROCESS) -> None:
        """Make what is missing; the dense model is loaded only when something is.

        Of several processes the first one does that, for all that read its state.

        Raises:
            UserError: predictions that are not finite.
        """
        if processes.main:
            self._complete(dense)
        processes.broadcast_object(None)  # the others wait for it

    def _complete(self, dense: Callable[[], nn.Module]) -> None:
        groups = range(-(-len(self._sequences) // _GROUP))
        missing = [group for group in groups if self._state is None or not self._state.holds(_NAME.format(group))]
        if not missing:
            return
        model = dense()
        for group in progress.track(missing, "dense predictions", unit="groups"):
            tensors = self._predicted(model, group)
            if self._state is None:
                self._groups[group] = tensors
            else:
                self._state.save(_NAME.format(group), tensors, {})

    @torch.no_grad()
    def _predicted(self, model: nn.Module, group: int) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        first = group * _GROUP
        for index, sequence in enumerate(self._sequences[first : first + _GROUP], first):
            logits = next_token_logits(model, sequence[None])[0] / self._temperature
            tokens, logs = coarse_predictions(logits, self._top)
            if not bool(torch.isfinite(logs).all()):
                raise UserError(
                    "the dense model's predictions are not finite", "Check its checkpoint, or use --dtype float32."
                )
            tensors[f"{index}.tokens"], tensors[f"{index}.logs"] = tokens.cpu(), logs.cpu()
        return tensors

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A sequence's most likely tokens int32 ``[length - 1, top]``, their and the others' logs ``[.., top + 1]``."""
        group = index // _GROUP
        if group not in self._groups:
            saved = self._state.load(_NAME.format(group)) if self._state is not None else None
            assert saved is not None, "every group has been predicted"
            self._groups = {group: saved[0]}
        tensors = self._groups[group]
        return tensors[f"{index}.tokens"], tensors[f"{index}.logs"]


def make_objective(
    loss: Loss,
    sequences: Sequence[torch.Tensor],
    dense: Callable[[], nn.Module],
    state: RunState | None,
    *,
    weight: float,
    temperature: float,
    top: int,
    processes: Processes = SINGLE_PROCESS,
) -> Objective:
    """The objective of that name; the dense model's predictions are made, or those of an interrupted run completed.

    Args:
        weight: of the divergence, for ``both``.
    """
    if loss == "ce":
        return cross_entropy
    teacher = Teacher(sequences, state, top=top, temperature=temperature)
    teacher.predict(dense, processes)
    return Distillation(teacher, weight if loss == "both" else 1.0, temperature)


def _predictions(logits: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 ``[tokens, vocabulary]`` of all positions that have a next token, sequence by sequence."""
    return logits[:, :-1][batch["attention_mask"][:, 1:] == 1].float()


def _targets(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return batch["input_ids"][:, 1:][batch["attention_mask"][:, 1:] == 1]
