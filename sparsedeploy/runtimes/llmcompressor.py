"""The client of llm-compressor, which runs in an environment of its own: prune by recipe, quantise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sparsedeploy import progress
from sparsedeploy.checkpoint.recipe import modifier_for
from sparsedeploy.errors import UserError
from sparsedeploy.options import one_of
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.registry import PRUNERS
from sparsedeploy.runtimes.environments import Environment, require
from sparsedeploy.runtimes.worker import Worker

RUNTIME = "llmcompressor"
# Seconds without a sign of life: between two modules, or in an examination after them.
_TIMEOUT = 3600.0


def check_method(method: str) -> None:
    """Refuse a pruner that ``oneshot`` cannot replay.

    Raises:
        UserError: naming those that it can.
    """
    modifier = modifier_for(method)
    if modifier is None or modifier.unusable:
        reason = modifier.unusable if modifier else "it has none"
        able = [name for name in PRUNERS.names() if (one := modifier_for(name)) and not one.unusable]
        raise UserError(
            f"llm-compressor {pinned_version()} cannot prune by {method} ({reason})",
            f"Use --method {one_of(able)}, or the built-in engine.",
        )


def pinned_version() -> str:
    """The version of llm-compressor that the requirements name."""
    from sparsedeploy.runtimes.specification import load_runtime

    text = load_runtime(RUNTIME).requirements.read_text(encoding="utf-8")
    found = re.search(r"^llmcompressor==(\S+)", text, re.MULTILINE)
    assert found is not None, "export/llmcompressor/requirements.txt pins llmcompressor"
    return found[1]


def environment(python: str | None = None) -> Environment:
    """The environment that llm-compressor runs in: the managed one, or that of the interpreter ``python``.

    Raises:
        UserError: it is not installed, incomplete or has other pins.
    """
    return require(RUNTIME, python)


@contextmanager
def open_worker(where: Environment) -> Iterator[Worker]:
    """Start the worker and make sure that it is the pinned llm-compressor that answers.

    Raises:
        UserError: it does not start, or is another version.
    """
    with where.worker(_TIMEOUT) as worker:
        found, wanted = worker.ready["versions"]["llmcompressor"], pinned_version()
        if found != wanted:
            raise UserError(
                f"{where.python} has llm-compressor {found}, this sparsedeploy works with {wanted}",
                f"Run: sparsedeploy runtime install {RUNTIME}.",
            )
        yield worker


def prune_by_recipe(
    where: Environment,
    model: Path,
    recipe: Path,
    plan: SparsityPlan,
    tokens: torch.Tensor,
    *,
    dtype: str = "auto",
    device: str = "auto",
    pipeline: str = "sequential",
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Prune a dense model with ``llmcompressor.oneshot``.

    Args:
        tokens: calibration sequences, int64 ``[sequences, length]``.
        dtype: to compute in, such as ``float32``; ``auto`` is the model's own.
        device: ``cpu``, or anything else for llm-compressor's own choice.
        pipeline: ``sequential`` is one pass for all modifiers, ``independent`` one for each.

    Returns:
        The weights by module name as llm-compressor left them, and facts: its ``versions``, the ``seconds`` taken and
        the ``runs`` of the first module on each sequence (two for each pass over the text).

    Raises:
        UserError: the environment or llm-compressor fails.
    """
    with open_worker(where) as worker:
        path, output = worker.folder / "tokens.npy", worker.folder / "pruned.safetensors"
        np.save(path, tokens.numpy())
        result = _follow(
            worker,
            "prune",
            "prune (llm-compressor)",
            len(plan.targets),
            model=str(model.resolve()),
            recipe=str(recipe.resolve()),
            tokens=str(path),
            modules=[target.name for target in plan.targets],
            output=str(output),
            dtype=dtype,
            device=device,
            pipeline=pipeline,
        )
        return load_file(output), {"versions": worker.ready["versions"], **result}


def quantize_folder(
    where: Environment,
    model: Path,
    output: Path,
    scheme: str,
    algorithm: str,
    masks: dict[str, torch.Tensor],
    tokens: torch.Tensor | None,
    windows: torch.Tensor | None,
    *,
    probe: torch.Tensor,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Quantise a pruned model into the folder ``output`` and have it read back.

    Args:
        masks: bool ``[rows, columns]`` by module name, True where kept.
        tokens: calibration sequences, int64 ``[sequences, length]``, for GPTQ.
        windows: int64 ``[windows, context]`` to take the perplexity on.
        probe: int64 ``[T]``, tokens for the known answer; the last ones are replaced by greedy ones.
        dtype: of what is not quantised, such as ``bfloat16``; ``auto`` is the model's own.

    Returns:
        What ``export/llmcompressor/quantize.py`` found out, the ``versions``, and the ``answer``: tokens [T] and the
        quantised model's logits [T, V] for them.

    Raises:
        UserError: the environment or llm-compressor fails.
    """
    with open_worker(where) as worker:
        paths: dict[str, str | None] = {}
        for name, array in (("tokens", tokens), ("windows", windows), ("probe", probe)):
            paths[name] = None if array is None else str(worker.folder / f"{name}.npy")
            if array is not None:
                np.save(worker.folder / f"{name}.npy", array.numpy())
        save_file({name: mask.contiguous() for name, mask in masks.items()}, worker.folder / "masks.safetensors")
        result = _follow(
            worker,
            "quantize",
            f"quantise ({scheme})",
            len(masks) if algorithm == "gptq" else None,
            model=str(model.resolve()),
            scheme=scheme,
            algorithm=algorithm,
            masks=str(worker.folder / "masks.safetensors"),
            output=str(output.resolve()),
            dtype=dtype,
            device=device,
            **paths,
        )
        arrays = worker.arrays(result)
        return {**result, "versions": worker.ready["versions"], "answer": (arrays["tokens"], arrays["logits"])}


def _follow(worker: Worker, operation: str, title: str, total: int | None, **arguments: Any) -> dict[str, Any]:
    """Run an operation, its modules moving a progress bar; returns the result."""
    result: dict[str, Any] = {}
    with progress.bar(title, total, "modules") as advance:
        for reply in worker.stream(operation, **arguments):
            if "modules" in reply:
                advance(reply["modules"])
            else:
                result = reply
    return result
