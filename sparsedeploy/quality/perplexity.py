"""Perplexity over non-overlapping windows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.errors import UserError
from sparsedeploy.models.computing import model_errors
from sparsedeploy.models.tokenizer import token_ids

# Tokens that show whether a model looks ahead.
_FEW = 16


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean over windows of the mean cross-entropy (nats) of their ``context - 1`` predictions."""

    perplexity: float
    cross_entropy: float
    windows: int
    context: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def windows_of(tokens: list[int], context: int, data: str) -> torch.Tensor:
    """Cut a token stream into floor(len / context) windows, int64 ``[windows, context]``; the rest is dropped.

    Raises:
        UserError: less than one window.
    """
    count = len(tokens) // context
    if count == 0:
        raise UserError(
            f"the text of '{data}' gives {len(tokens)} tokens, fewer than one window of {context}",
            "Give more text, or shorter windows: --context, or --calibration-length of a search.",
        )
    return torch.tensor(tokens[: count * context], dtype=torch.int64).reshape(count, context)


def text_windows(
    data: str, tokenizer: Any, context: int, *, field: str = "text", split: str = "test", limit: int | None = None
) -> torch.Tensor:
    """The first ``limit`` windows of a text, int64 ``[windows, context]``; see :func:`load_documents` for what it is.

    Its documents are joined with blank lines and tokenised once.

    Raises:
        UserError: no such text, or less than one window.
    """
    joined = "\n\n".join(load_documents(data, field=field, split=split))
    return windows_of(token_ids(tokenizer, joined, verbose=False), context, data)[:limit]


@torch.no_grad()
def check_causal(model: nn.Module, tokens: torch.Tensor) -> None:
    """Refuse a model whose prediction of a token depends on later ones: its perplexity would say nothing.

    Args:
        tokens: int64 ``[length]``, of which the first few are used.

    Raises:
        UserError: the logits of earlier tokens change with the last one.
    """
    row = tokens[None, :_FEW].to(next(model.parameters()).device)
    other = row.clone()
    other[0, -1] = row[0, -1] - 1 if row[0, -1] > 0 else 1
    with model_errors(model):
        one, two = (
            model(input_ids=each, use_cache=False).logits[0, : row.shape[1] - 1].float() for each in (row, other)
        )
    if float((one - two).abs().max()) > 1e-2 * float(one.abs().max()):
        raise UserError(
            f"{type(model).__name__} predicts a token from later ones, so it has no perplexity as a language model",
            'Use a causal model; those of the BERT kind are one with "is_decoder": true in their config.json.',
        )


@torch.no_grad()
def perplexity(model: nn.Module, windows: torch.Tensor, *, batch_size: int = 1) -> Perplexity:
    """Perplexity of a causal LM on ``windows [count, context]``, logits and cross-entropy in fp32.

    Raises:
        UserError: a window whose loss is not finite, naming it: a diverged model must not look fine.
    """
    device = next(model.parameters()).device
    losses: list[float] = []
    with progress.bar("perplexity", len(windows), "windows") as advance:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size].to(device)
            with model_errors(model):
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(dim=1)
            losses.extend(loss.double().tolist())
            if not torch.isfinite(loss).all() and next(model.parameters()).dtype == torch.float16:
                raise UserError(
                    f"the loss of window {start} is not finite in float16, which overflows easily",
                    "Compute in a type with a larger range: --dtype bfloat16 or float32.",
                )
            if not torch.isfinite(loss).all():
                raise UserError(
                    f"the loss of window {start} is not finite: the model has diverged",
                    "Prune less, or with another method; check the weights with sparsedeploy inspect.",
                )
            advance(len(batch), f"ppl {math.exp(min(sum(losses) / len(losses), 700)):.2f}")
    mean = sum(losses) / len(losses)
    if mean > 700:
        raise UserError(f"the mean loss {mean:.0f} overflows a perplexity: the model has diverged", "Prune less.")
    return Perplexity(math.exp(mean), mean, len(windows), windows.shape[1])
