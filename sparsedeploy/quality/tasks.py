"""Scores on tasks (zero-shot accuracy and the like) through EleutherAI's lm-evaluation-harness.

The harness brings prompts, data sets and metrics, so that figures compare with published ones; the model is ours, so
that low-rank parts, packed weights and the device are as everywhere else. Its heavy imports stay inside functions.
"""

from __future__ import annotations

import difflib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.quality.options import TaskOptions

# The seven zero-shot tasks that the pruning papers report (Wanda, OWL, DLP, AlphaPruning); their figure is ``acc``.
PAPER_TASKS = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
GROUPS: Mapping[str, tuple[str, ...]] = {"papers": PAPER_TASKS}
# Tasks that need no download: their data lies beside them.
SAMPLE_TASKS = Path(__file__).parent / "sample_tasks"
_NOISY = ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "httpx", "evaluate", "absl")
_BOOTSTRAPS = 1000  # only for metrics without a formula for their error; accuracy has one


def load_tasks(options: TaskOptions) -> dict[str, Any]:
    """The harness's tasks by name, with their documents; done before the model is loaded, so that errors come early.

    Raises:
        UserError: the harness is not installed, an unknown task, or a data set that is neither here nor reachable.
    """
    _check_harness()
    from lm_eval.tasks import TaskManager

    names = list(dict.fromkeys(task for name in options.names for task in GROUPS.get(name, (name,))))
    folders = [SAMPLE_TASKS, *options.folders]
    with _quiet():
        # The harness's own index takes ten seconds to read: only when a name is not found without it.
        manager = TaskManager(include_path=list(folders), include_defaults=False)
        if not set(names) <= set(manager.all_tasks):
            progress.note("read the harness's list of tasks")
            manager = TaskManager(include_path=list(folders))
        for name in names:
            if name not in manager.task_index:
                raise _unknown(name, list(manager.all_tasks))
        loaded: dict[str, Any] = {}
        for name in progress.track(names, "load tasks"):
            loaded |= _load(manager, name, folders)
    for task in loaded.values():
        if options.fewshot is not None:
            task.set_config(key="num_fewshot", value=options.fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seed)
    return loaded


def run_tasks(
    model: nn.Module, tokenizer: Any, tasks: Mapping[str, Any], options: TaskOptions, *, context: int, batch_size: int
) -> dict[str, Any]:
    """Score a causal LM on tasks of :func:`load_tasks`.

    Args:
        context: the longest input in tokens; longer prompts lose their beginning, and are counted.
        batch_size: requests per forward pass.

    Returns:
        ``tasks``: name -> metrics as the harness names them, each with its standard error:
        ``{"boolq": {"acc": 0.66, "acc_stderr": 0.008}}``; an error that the harness cannot tell is None.
        ``task_means``: the plain mean over tasks of every metric that all of them have.
        ``harness``: version, seed, limit, context, batch size, and by task the number of documents, of examples before
        each question, of prompts that were cut, and the version of the task.

    Raises:
        UserError: scores that are not finite, an answer longer than the context, or what the harness refuses.
    """
    from lm_eval.evaluator import evaluate

    random.seed(options.seed)
    torch.manual_seed(options.seed)
    with _quiet():
        scorer = _scorer(model, tokenizer, context, batch_size)
        try:
            found = evaluate(
                lm=scorer,
                task_dict={"tasks": dict(tasks)},
                limit=options.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
            )
        except (AssertionError, ValueError) as error:
            reason = " ".join(str(error).split())[:240] or type(error).__name__
            raise UserError(
                f"lm-evaluation-harness refused this run ({reason})", "Choose other tasks, or see --debug."
            ) from error
    scores = {name: _metrics(found["results"][name]) for name in tasks}
    means = {}
    for key in next(iter(scores.values())):
        values = [score[key] for score in scores.values() if score.get(key) is not None]
        if len(values) == len(scores) and "_stderr" not in key:
            means[key] = math.fsum(values) / len(values)
    return {
        "tasks": scores,
        "task_means": means,
        "harness": {
            "lm_eval": version("lm_eval"),
            "seed": options.seed,
            "limit": options.limit,
            "context": context,
            "batch_size": batch_size,
            "documents": {name: found["n-samples"][name]["effective"] for name in tasks},
            "fewshot": {name: found["n-shot"][name] for name in tasks},
            "cut_prompts": scorer.cut,
            "task_versions": {name: found["versions"][name] for name in tasks},
        },
    }


def _check_harness() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UserError(
            "tasks need lm-evaluation-harness, which is not installed", "Install it: pip install 'sparsedeploy[eval]'."
        ) from error


def _unknown(name: str, known: list[str]) -> UserError:
    close = difflib.get_close_matches(name, [*GROUPS, *known], n=4, cutoff=0.5)
    fix = f"Closest: {', '.join(close)}." if close else f"Known, among others: papers, {', '.join(PAPER_TASKS)}."
    return UserError(f"unknown task '{name}'", f"{fix} For your own tasks, give --task-path FOLDER.")


def _load(manager: Any, name: str, folders: list[Path]) -> dict[str, Any]:
    """The tasks that a name stands for, by name; data files beside a task file of one's own are found there."""
    entry = manager.task_index[name]
    source = (entry.cfg or {}).get("dataset_path", name)
    changes = {}
    if entry.yaml_path is not None and any(entry.yaml_path.is_relative_to(folder) for folder in folders):
        changes = _beside(name, entry.cfg or {}, entry.yaml_path.parent)
    # An unnamed group is the harness's way to change a registered task.
    spec = {"group": "_", "task": [{"task": name, **changes}]} if changes else name
    try:
        tasks = manager.load([spec])["tasks"]
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the data of task '{name}' ({source}) could not be loaded ({type(error).__name__}: {reason})",
            "Without a network: run this command once where there is one and copy its Hugging Face cache (HF_HOME), "
            "or give tasks of your own with --task-path.",
        ) from error
    if not tasks:
        raise UserError(f"task '{name}' is empty", "Name another.")
    return dict(tasks)


def _beside(name: str, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The task's ``dataset_kwargs`` with paths relative to its file made absolute; empty where it has none."""
    kwargs = config.get("dataset_kwargs") or {}
    files = kwargs.get("data_files")
    if not files:
        return {}

    def absolute(path: str) -> str:
        if "://" in path:
            return path
        found = folder / path
        if not found.is_file():
            raise UserError(f"task '{name}' names {path}, which is not in {folder}", "Put the file beside the task.")
        return str(found.resolve())

    def resolve(value: Any) -> Any:
        return absolute(value) if isinstance(value, str) else [absolute(item) for item in value]

    changed = {key: resolve(value) for key, value in files.items()} if isinstance(files, Mapping) else resolve(files)
    return {"dataset_kwargs": {**kwargs, "data_files": changed}}


def _scorer(model: nn.Module, tokenizer: Any, context: int, batch_size: int) -> Any:
    """The harness's model around ours: with our progress bar, counting cut prompts, refusing scores that are no number.

    Raises:
        UserError: the tokenizer has no token to start an empty prompt with.
    """
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither a BOS nor an EOS token", "Set its bos_token or eos_token.")

    class Scorer(HFLM):
        def __init__(self) -> None:
            super().__init__(
                pretrained=model, tokenizer=tokenizer, backend="causal", max_length=context, batch_size=batch_size
            )
            self.cut = 0
            self._advance: Callable[..., None] = lambda steps=1: None

        @contextmanager
        def _shown(self, description: str, total: int) -> Iterator[None]:
            done = 0
            with progress.bar(description, total, "requests") as advance:

                def step(steps: int) -> None:
                    nonlocal done
                    done += steps
                    advance(steps)

                self._advance = step
                yield
                advance(total - done)  # requests that share a forward pass

        def _model_call(self, inps: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            logits = super()._model_call(inps, *rest, **more)
            self._advance(len(inps))
            return logits

        def _model_generate(self, context: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            tokens = super()._model_generate(context, *rest, **more)
            self._advance(len(context))
            return tokens

        def _loglikelihood_tokens(self, requests: list[Any], *rest: Any, **more: Any) -> list[tuple[float, bool]]:
            longest = max((len(answer) for _, _, answer in requests), default=0)
            if longest > self.max_length:
                raise UserError(
                    f"an answer of {longest} tokens is longer than the context of {self.max_length}",
                    "Raise --context, or choose another task.",
                )
            self.cut += sum(len(prompt) + len(answer) > self.max_length + 1 for _, prompt, answer in requests)
            with self._shown("score", len(requests)):
                scores = super()._loglikelihood_tokens(requests, *rest, **more)
            if not all(math.isfinite(score) for score, _ in scores):
                raise UserError(
                    "a score is not finite: the model has diverged",
                    "Prune less, or with another method; check the weights with sparsedeploy inspect.",
                )
            return scores

        def generate_until(self, requests: list[Any], *rest: Any, **more: Any) -> list[str]:
            with self._shown("generate", len(requests)):
                return super().generate_until(requests, *rest, **more)

    return Scorer()


def _metrics(row: Mapping[str, Any]) -> dict[str, Any]:
    """``{"acc,none": 0.5, "acc_stderr,none": 0.1}`` without the filter's name where that is ``none``."""
    metrics: dict[str, Any] = {}
    for key, value in row.items():
        metric, comma, filtered = key.partition(",")
        if not comma:
            continue
        label = metric if filtered == "none" else f"{metric},{filtered}"
        metrics[label] = float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    return metrics


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the harness logs and prints away from our output."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with progress.alone():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
