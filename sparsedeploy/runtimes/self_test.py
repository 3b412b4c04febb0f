"""An engine proves itself on the machine that it runs on: the answer kept with an artifact is compared before use.

What an engine computes depends on the processor: kernels are chosen by its instruction set, and some are wrong without
a word. So the first load of an artifact by a version of an engine on a machine runs the artifact's known answer, a
prompt and a few tokens after it that together pass a block of the cache, as far as the load has room. The verdict is
kept in the cache folder, and later loads of the same kind only read it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparsedeploy import progress
from sparsedeploy.artifacts.description import ARTIFACT_FILE, Artifact
from sparsedeploy.artifacts.folder import CHECKPOINT
from sparsedeploy.artifacts.integrity import recall, remember
from sparsedeploy.artifacts.known_answer import STEPS, distance, load_known_answer, tolerance
from sparsedeploy.errors import UserError
from sparsedeploy.machine import this_machine
from sparsedeploy.models.fingerprint import file_sha256
from sparsedeploy.reading import contained
from sparsedeploy.runtimes.specification import Runtime


class GivesLogits(Protocol):
    """The part of a loaded model that is needed here."""

    @property
    def facts(self) -> dict[str, Any]: ...

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Verdict:
    """What a comparison gave.

    Attributes:
        tokens: how many of the known answer's tokens there was room for; 0 where the artifact has no answer.
        difference: as a part of the logits' size; ``tolerance`` is what rounding may make.
    """

    passed: bool
    tokens: int
    difference: float
    tolerance: float


def prove(
    model: GivesLogits,
    artifact: Artifact,
    folder: Path,
    runtime: Runtime,
    *,
    prompt_length: int,
    new_tokens: int,
    dtype: str | None = None,
) -> None:
    """Compare a loaded model with the known answer of its artifact, or read the verdict of an earlier load.

    Artifacts of earlier versions have no answer: that is said once. Nor have plain checkpoints.

    Args:
        prompt_length: that the model was loaded for; ``new_tokens`` likewise.
        dtype: that the user has asked to compute in, if any; rounding follows it.

    Raises:
        UserError: the engine computes something else.
    """
    if artifact.target == CHECKPOINT:
        return
    key = _key(model.facts, folder, runtime)
    if artifact.self_test is None:
        if _recall(key) is None:
            progress.note(f"{folder} holds no known answer, so {runtime.title} is not checked on it: export it again")
            _keep(key, Verdict(True, 0, 0.0, 0.0))
        return
    prompt, steps = _lengths(artifact.self_test.tokens, runtime, prompt_length, new_tokens)
    verdict = _recall(key)
    if verdict is None or verdict.tokens < prompt + steps or not verdict.passed:
        progress.note(f"check {runtime.title} on this machine with {folder.name}")
        verdict = _compare(model, artifact, folder, prompt, steps, tolerance(dtype) if dtype else 0.0)
        _keep(key, verdict)
    if not verdict.passed:
        raise UserError(
            f"{runtime.title} computes {folder} wrongly on this machine: logits differ from the exported model's by "
            f"{verdict.difference:.2g} of their size, rounding makes at most {verdict.tolerance:.2g}",
            "Export the checkpoint again, or for another runtime: sparsedeploy export --target.",
        )


def is_proven(
    facts: dict[str, Any], artifact: Artifact, folder: Path, runtime: Runtime, *, prompt_length: int, new_tokens: int
) -> bool:
    """Whether an earlier load with the same facts has passed, so that nothing need be loaded for a comparison.

    Args:
        facts: of the runtime's worker, with the ``cores`` and ``chunk`` of the load.
    """
    verdict = _recall(_key(facts, folder, runtime))
    if artifact.self_test is None or verdict is None:
        return False
    return verdict.passed and verdict.tokens >= sum(
        _lengths(artifact.self_test.tokens, runtime, prompt_length, new_tokens)
    )


def _lengths(known: int, runtime: Runtime, prompt_length: int, new_tokens: int) -> tuple[int, int]:
    """Tokens of the known answer to run as a prompt and one by one, as far as a load has room for them."""
    if runtime.fixed_shapes:
        prompt = max(1, min(known - min(new_tokens, STEPS), prompt_length))
        return prompt, min(new_tokens, known - prompt)
    total = min(known, prompt_length + new_tokens)
    prompt = max(1, total - STEPS)
    return prompt, total - prompt


def _compare(model: GivesLogits, artifact: Artifact, folder: Path, prompt: int, steps: int, at_least: float) -> Verdict:
    test = artifact.self_test
    assert test is not None
    contained(folder, test.file, str(folder / ARTIFACT_FILE))
    answer = load_known_answer(folder, test)
    ids = answer.tokens.tolist()
    found = np.concatenate(model.logits(ids[:prompt], ids[prompt : prompt + steps]))
    difference, allowed = distance(answer, found, max(test.tolerance, at_least), steps)
    # Infinity is no JSON.
    shown = difference if np.isfinite(difference) else 1e9
    return Verdict(bool(difference <= allowed), prompt + steps, shown, allowed)


def _key(facts: dict[str, Any], folder: Path, runtime: Runtime) -> str:
    """One for each artifact, engine version, processor and way of loading."""
    machine = this_machine()
    described = {
        "artifact": file_sha256(folder / ARTIFACT_FILE),
        "runtime": runtime.name,
        "versions": facts.get("versions"),
        "hardware": facts.get("hardware"),
        "processor": [machine.machine, machine.processor, machine.flags],
        "cores": facts.get("cores"),
        "dtype": facts.get("dtype"),
        "chunk": facts.get("chunk") if runtime.fixed_shapes else None,
    }
    return json.dumps(described, sort_keys=True, default=str)


def _recall(key: str) -> Verdict | None:
    try:
        return Verdict(**(recall("verdicts", key) or {}))
    except TypeError:
        return None


def _keep(key: str, verdict: Verdict) -> None:
    remember("verdicts", key, asdict(verdict))
