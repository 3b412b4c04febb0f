"""Perplexity in the engine itself: what the exported, perhaps quantised model makes of a text."""

from __future__ import annotations

import math

import numpy as np
import torch

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.quality.perplexity import Perplexity
from sparsedeploy.runtimes.engine import Deployment, load


def engine_perplexity(
    deployment: Deployment, windows: torch.Tensor, *, cores: int | None = None, timeout: float = 600.0
) -> Perplexity:
    """Perplexity of an artifact on ``windows [count, context]`` int64, as its runtime computes it; the same predictions
    as :func:`~sparsedeploy.quality.perplexity.perplexity` takes.

    Args:
        cores: threads to use; by default all that this process may use.
        timeout: seconds that one window may take.

    Raises:
        UserError: the runtime fails, or does not tell the probability of every token.
    """
    losses: list[float] = []
    context = windows.shape[1]
    with (
        load(deployment, prompt_length=context - 1, new_tokens=1, cores=cores, timeout=timeout) as model,
        progress.bar(f"perplexity in {deployment.runtime.title}", len(windows), "windows") as advance,
    ):
        for at, window in enumerate(windows.tolist()):
            rows, _ = model.logits(window[:-1], window[-1:])
            loss = window_loss(rows, windows[at, 1:], deployment.runtime.log_probabilities)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss of window {at} is not finite in {deployment.runtime.title}",
                    "Measure the checkpoint instead: sparsedeploy eval.",
                )
            losses.append(loss)
            advance(1, f"ppl {math.exp(min(sum(losses) / len(losses), 700)):.2f}")
    mean = sum(losses) / len(losses)
    if mean > 700:
        raise UserError(f"the mean loss {mean:.0f} overflows a perplexity: the model has diverged", "Prune less.")
    return Perplexity(math.exp(mean), mean, len(losses), context)


def window_loss(rows: np.ndarray, target: torch.Tensor, log_probabilities: bool) -> float:
    """Mean cross-entropy of the tokens ``target [T]``, infinite where one has no number.

    Args:
        rows: float32 ``[T, vocabulary]``: logits, or log-probabilities, of which some may be missing (minus infinity).
            What is there of them does not sum to 1, so it is taken as it is.
    """
    values = torch.from_numpy(rows).double()
    if log_probabilities:
        return -float(values.gather(1, target[:, None]).mean())
    return float(torch.nn.functional.cross_entropy(values, target))
