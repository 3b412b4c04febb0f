"""A loaded artifact on its runtime: logits, generated text and timings, whatever engine is behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparsedeploy.artifacts.description import Artifact
from sparsedeploy.artifacts.folder import CHECKPOINT, describe_folder
from sparsedeploy.errors import UserError
from sparsedeploy.machine import usable_cores
from sparsedeploy.runtimes.environments import Environment, require
from sparsedeploy.runtimes.options import EngineOptions
from sparsedeploy.runtimes.self_test import is_proven, prove
from sparsedeploy.runtimes.specification import Runtime, load_runtime, runtime_for_target, runtime_names
from sparsedeploy.runtimes.worker import Worker

DEFAULT_CHUNK = 64
# A chunk of the prompt must be a multiple of this for DeepSparse; harmless for others.
_CHUNK_UNIT = 4


@dataclass(frozen=True)
class Timing:
    """One measured run.

    Attributes:
        prefill_seconds: for the whole prompt up to the choice of the first new token, of every sequence.
        decode_seconds: for each token after that (at a larger batch, one token of every sequence).
    """

    prefill_seconds: float
    decode_seconds: list[float]


class LoadedModel(Protocol):
    """What a runtime offers for a loaded artifact. A new runtime implements this, in a worker or in this process."""

    @property
    def facts(self) -> dict[str, Any]:
        """Versions of the runtime, what it found out about the processor and how it loaded the artifact."""

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Logits after each prompt token [P, V] and, with the cache, after each following token [T, V]."""

    def generate(
        self, prompt: Sequence[int], new_tokens: int, temperature: float, seed: int, stop: Sequence[int]
    ) -> Iterator[int]:
        """Tokens as they come, up to ``new_tokens`` or the first of ``stop``; greedy at temperature 0."""

    def measure(self, prompt: Sequence[int], decode_tokens: int, batch: int = 1) -> Timing:
        """Time one prefill of ``batch`` copies of a prompt and the greedy tokens after it."""

    def peak_memory(self) -> int | None:
        """The most bytes of memory that its process ever held; None where the system does not tell."""


class WorkerModel:
    """A :class:`LoadedModel` in a worker process of the runtime's own environment."""

    def __init__(
        self,
        worker: Worker,
        folder: Path,
        *,
        cores: int,
        prompt_length: int,
        new_tokens: int,
        chunk: int,
        batch: int = 1,
        dtype: str | None = None,
    ) -> None:
        self._worker = worker
        options: dict[str, Any] = {
            "cores": cores,
            "prompt_length": prompt_length,
            "new_tokens": new_tokens,
            "chunk": chunk,
        }
        if batch > 1:  # only runtimes with a ``max_batch`` know the argument
            options["batch"] = batch
        if dtype is not None:
            options["dtype"] = dtype
        loaded = worker.call("load", folder=str(folder.resolve()), **options)
        self._model = loaded.pop("model")
        self._facts = {**worker.ready, **loaded, **options}

    @property
    def facts(self) -> dict[str, Any]:
        return self._facts

    def logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        result = self._worker.call(
            "logits", model=self._model, prompt=list(prompt), tokens=list(tokens), folder=str(self._worker.folder)
        )
        arrays = self._worker.arrays(result)
        return arrays["prefill"], arrays["decode"]

    def generate(
        self, prompt: Sequence[int], new_tokens: int, temperature: float = 0.0, seed: int = 0, stop: Sequence[int] = ()
    ) -> Iterator[int]:
        events = self._worker.stream(
            "generate",
            model=self._model,
            prompt=list(prompt),
            new_tokens=new_tokens,
            temperature=temperature,
            seed=seed,
            stop=list(stop),
        )
        for event in events:
            if "token" in event:
                yield event["token"]

    def measure(self, prompt: Sequence[int], decode_tokens: int, batch: int = 1) -> Timing:
        more = {"batch": batch} if batch > 1 else {}
        return Timing(
            **self._worker.call("measure", model=self._model, prompt=list(prompt), decode_tokens=decode_tokens, **more)
        )

    def peak_memory(self) -> int | None:
        return self._worker.peak_memory()


@dataclass(frozen=True)
class Deployment:
    """An artifact and the environment of the runtime that is to run it: looked up once, handed on from there."""

    folder: Path
    artifact: Artifact
    environment: Environment

    @property
    def runtime(self) -> Runtime:
        return self.environment.runtime


def find_deployment(folder: Path, runtime: str | None = None, python: str | None = None) -> Deployment:
    """An exported folder or plain checkpoint on its runtime.

    Args:
        runtime: its name; by default the one that the artifact was exported for.
        python: interpreter of an environment of the user's own that has the runtime.

    Raises:
        UserError: not an artifact, one for another target, or the runtime is not installed.
    """
    artifact = describe_folder(folder)
    return Deployment(Path(folder), artifact, environment_for(artifact, folder, runtime, python))


@contextmanager
def load(
    deployment: Deployment,
    *,
    prompt_length: int,
    new_tokens: int,
    cores: int | None = None,
    chunk: int | None = None,
    batch: int = 1,
    dtype: str | None = None,
    timeout: float = EngineOptions.timeout,
) -> Iterator[LoadedModel]:
    """Load an artifact on its runtime, with a cache for a prompt and new tokens of these lengths.

    The first time on a machine the engine must give the artifact's known answer, see
    :mod:`~sparsedeploy.runtimes.self_test`.

    Args:
        cores: threads to use; by default all cores that this process may use.
        chunk: prompt tokens that are run at once; by default the prompt's length, at most 64.
        batch: sequences that :meth:`LoadedModel.measure` may run at once.
        dtype: to compute in, where the runtime is PyTorch; None leaves it to the runtime.
        timeout: seconds that one request may take.

    Raises:
        UserError: lengths that do not fit the model, the runtime fails, or it computes something else than the export.
    """
    artifact, folder, runtime = deployment.artifact, deployment.folder, deployment.runtime
    check_lengths(artifact, prompt_length, new_tokens)
    cores = check_cores(cores)
    chunk = chunk_for(prompt_length, chunk)
    check_batch(batch, runtime)
    check_dtype(dtype, runtime)
    lengths = {"prompt_length": prompt_length, "new_tokens": new_tokens}
    with deployment.environment.worker(timeout) as worker:
        model = WorkerModel(worker, folder, cores=cores, chunk=chunk, batch=batch, dtype=dtype, **lengths)
        prove(model, artifact, folder, runtime, dtype=dtype, **lengths)
        yield model


def prove_once(
    deployment: Deployment, *, prompt_length: int, new_tokens: int, cores: int, chunk: int, timeout: float
) -> None:
    """Compare the engine with the artifact's known answer before another program loads it; see :func:`load`.

    Raises:
        UserError: the runtime fails, or it computes something else than the export.
    """
    artifact, folder, runtime = deployment.artifact, deployment.folder, deployment.runtime
    with deployment.environment.worker(timeout) as worker:
        facts = {**worker.ready, "cores": cores, "chunk": chunk}
        if not is_proven(facts, artifact, folder, runtime, prompt_length=prompt_length, new_tokens=new_tokens):
            model = WorkerModel(
                worker, folder, cores=cores, prompt_length=prompt_length, new_tokens=new_tokens, chunk=chunk
            )
            prove(model, artifact, folder, runtime, prompt_length=prompt_length, new_tokens=new_tokens)


@contextmanager
def open_model(
    folder: Path, *, runtime: str | None = None, python: str | None = None, **options: Any
) -> Iterator[LoadedModel]:
    """:func:`find_deployment` and :func:`load` in one, for a folder that is loaded once."""
    with load(find_deployment(folder, runtime, python), **options) as model:
        yield model


def environment_for(artifact: Artifact, folder: Path, runtime: str | None, python: str | None) -> Environment:
    """The environment of the runtime that runs this artifact.

    Raises:
        UserError: the named runtime does not run artifacts of this target, or is not installed.
    """
    return require(runtime_for(artifact, folder, runtime).name, python)


def runtime_for(artifact: Artifact, folder: Path, runtime: str | None) -> Runtime:
    """The named runtime, or by default the one that the artifact was exported for.

    Raises:
        UserError: it does not run artifacts of this target.
    """
    if runtime is None:
        return runtime_for_target(artifact.target)
    specification = load_runtime(runtime)
    if not specification.targets:
        raise UserError(f"runtime {runtime} runs no exported models", "Leave --runtime out, or name another.")
    if artifact.target not in specification.targets:
        able = [target for target in specification.targets if target != CHECKPOINT]
        raise UserError(
            f"{folder} was exported for {artifact.target}, runtime {runtime} runs {', '.join(specification.targets)}",
            f"Export the checkpoint with --target {able[0]}.",
        )
    return specification


def check_lengths(artifact: Artifact, prompt_length: int, new_tokens: int) -> None:
    """Refuse lengths that the model cannot take.

    Raises:
        UserError: an empty prompt, no new token, or more tokens than the model's positions.
    """
    if prompt_length < 1:
        raise UserError("the prompt is empty", "Give a prompt of at least one token.")
    if new_tokens < 1:
        raise UserError(f"{new_tokens} new tokens were asked for", "Ask for at least one.")
    limit = artifact.shapes.max_positions
    if limit is not None and prompt_length + new_tokens > limit:
        raise UserError(
            f"{prompt_length} prompt tokens and {new_tokens} new ones are more than the model's {limit} positions",
            "Use a shorter prompt or fewer new tokens.",
        )


def check_batch(batch: int, runtime: Runtime) -> None:
    """Refuse more sequences at once than a runtime takes.

    Raises:
        UserError: see above.
    """
    if not 1 <= batch <= runtime.max_batch:
        most = "one sequence" if runtime.max_batch == 1 else f"at most {runtime.max_batch} sequences"
        raise UserError(f"{runtime.title} runs {most} at once, {batch} were asked for", "Use another batch size.")


def check_dtype(dtype: str | None, runtime: Runtime) -> None:
    """Refuse a type to compute in for a runtime that computes in the type of its artifact.

    Raises:
        UserError: see above.
    """
    if dtype is not None and not runtime.takes_dtype:
        able = [name for name in runtime_names() if load_runtime(name).takes_dtype]
        raise UserError(
            f"{runtime.title} computes in the type that the artifact was exported in, not in {dtype}",
            f"Leave --dtype out, or use --runtime {' or '.join(able)}.",
        )


def check_cores(cores: int | None) -> int:
    """The number of cores to use.

    Raises:
        UserError: none, or more than this process may use.
    """
    available = usable_cores()
    if cores is None:
        return available
    if not 1 <= cores <= available:
        raise UserError(f"{cores} cores were asked for, this process may use {available}", f"Give 1 to {available}.")
    return cores


def chunk_for(prompt_length: int, chunk: int | None) -> int:
    """The chunk to run a prompt in: as given, else the whole prompt rounded up to a multiple of 4, at most 64.

    Raises:
        UserError: a chunk that is neither 1 nor a multiple of 4.
    """
    if chunk is None:
        return min(DEFAULT_CHUNK, -(-prompt_length // _CHUNK_UNIT) * _CHUNK_UNIT)
    if chunk < 1 or (chunk != 1 and chunk % _CHUNK_UNIT):
        raise UserError(f"the prompt chunk is {chunk}", f"It must be 1 or a multiple of {_CHUNK_UNIT}.")
    return chunk
