"""What the quality benchmarks share: a store of finished cells, and the cells that prune, recover and measure.

It has more than 400 lines, because every cell is made from one setting and kept in one store.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from sparsedeploy.allocation import allocate
from sparsedeploy.calibration.documents import load_documents
from sparsedeploy.calibration.samples import CalibrationSet, sample_tokens
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json, write_text
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.layers import ResidentLayers, StreamedLayers
from sparsedeploy.models.loading import load_model
from sparsedeploy.models.low_rank import attach_low_rank
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.plan import NM, MixedNM, SparsityPlan, parse_pattern
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.quality.options import TaskOptions
from sparsedeploy.quality.perplexity import perplexity, windows_of
from sparsedeploy.quality.tasks import load_tasks, run_tasks
from sparsedeploy.recovery.base import RecoveryJob
from sparsedeploy.recovery.data import load_training_data
from sparsedeploy.recovery.options import DataOptions, Loss
from sparsedeploy.recovery.training import TrainingOptions
from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES
from sparsedeploy.reporting.charts import Chart, svg_file
from sparsedeploy.workflows.search import search_plan

READING = "<!-- What follows is written by hand and kept when the tables are made anew. -->\n"


class Store:
    """A JSON file of finished cells and the page made from it; several processes may fill it together.

    Args:
        header: what all its cells were measured with; a file with another header is refused.
        page: makes the page from the content; what is written by hand below :data:`READING` is kept.
        picture: makes the charts of the .svg beside it.
        beside: what a new file says besides, without deciding anything.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        page: Callable[[dict[str, Any]], str],
        *,
        picture: Callable[[dict[str, Any]], list[Chart]] | None = None,
        beside: Mapping[str, Any] | None = None,
        fresh: bool = False,
    ) -> None:
        self.path, self._page, self._picture = path, page, picture
        self._header = json.loads(json.dumps(dict(header)))
        self._first = {**self._header, **(beside or {}), "cells": {}}
        if fresh:
            path.unlink(missing_ok=True)
        self.content: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return dict(self._first)
        stored: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        if {key: stored.get(key) for key in self._header} != self._header:
            raise UserError(
                f"{self.path} is for another model, text or settings", "Name another folder (-o), or start anew."
            )
        return stored

    def missing(self, key: str) -> bool:
        return key not in self.content["cells"]

    def add(self, key: str, cell: Any) -> None:
        """Store a finished cell, beside those that other processes have stored meanwhile."""
        self.change(lambda content: content["cells"].update({key: cell}))

    def change(self, how: Callable[[dict[str, Any]], None]) -> None:
        """Read the file again, change its content and write file and page."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            self.content = self._read()
            how(self.content)
            write_json(self.path, self.content)
            page = self.path.with_suffix(".md")
            kept = page.read_text(encoding="utf-8").partition(READING)[2] if page.exists() else ""
            write_text(page, self._page(self.content) + (READING + kept if kept else ""))
            if self._picture is not None and (charts := self._picture(self.content)):
                write_text(self.path.with_suffix(".svg"), svg_file(charts))


def read_measured(path: Path, header: Mapping[str, Any]) -> dict[str, Any] | None:
    """Another results file's content; None unless it is of the same model, calibration and test text."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if all(found[key] == header[key] for key in ("model", "calibration", "test")) else None


@dataclass(frozen=True)
class Setting:
    """A model and what it is calibrated and measured on.

    Attributes:
        calibration, test: text files.
        sequences, length: of the calibration, in sequences and tokens.
        test_bytes: how much of the test text is read, in windows of ``length`` tokens.
        selection_windows, selection_length: from the end of the calibration text, for plans that are searched.
    """

    model: Path
    calibration: Path
    test: Path
    sequences: int = 8
    length: int = 512
    test_bytes: int = 60_000
    selection_windows: int = 32
    selection_length: int = 256

    def header(self) -> dict[str, Any]:
        """What every figure depends on; the selection, which decides searched plans, is in their cells."""
        return {
            "model": {"name": self.model.name, "sha256": model_sha256(self.model)},
            "calibration": asdict(self.calibration_set(0).describe()),
            "test": {"data": self.test.name, "bytes": self.test_bytes, "context": self.length},
        }

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    @cached_property
    def text(self) -> str:
        return self.calibration.read_text(encoding="utf-8")

    def calibration_set(self, seed: int) -> CalibrationSet:
        return sample_tokens(
            [self.text],
            self.tokenizer,
            sequences=self.sequences,
            length=self.length,
            seed=seed,
            data=self.calibration.name,
        )

    @cached_property
    def selection(self) -> torch.Tensor:
        return self._windows(self.text[-100_000:], self.selection_length)[: self.selection_windows]

    @cached_property
    def test_windows(self) -> torch.Tensor:
        return self._windows(self.test.read_bytes()[: self.test_bytes].decode(errors="ignore"), self.length)

    def _windows(self, text: str, context: int) -> torch.Tensor:
        return windows_of(self.tokenizer(text, verbose=False)["input_ids"], context, "text")

    def dense_model(self) -> Any:
        return load_model(self.model, dtype=torch.float32)

    def perplexity(self, model: Any) -> float:
        """Infinite where the model has diverged."""
        try:
            return perplexity(model, self.test_windows, batch_size=4).perplexity
        except UserError:  # its only reason
            return math.inf

    def accuracy(self, model: Any, tasks: tuple[str, ...]) -> dict[str, Any]:
        """Accuracy and its standard error on tasks of the harness."""
        options = TaskOptions(tasks)
        scores = run_tasks(model, self.tokenizer, load_tasks(options), options, context=self.length, batch_size=16)[
            "tasks"
        ]
        return {name: {key: score[key] for key in ("acc", "acc_stderr")} for name, score in scores.items()}


def setting_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that make a :class:`Setting`, and where the results go."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0] if description else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    return parser


def target_of(level: str) -> tuple[float, NM | MixedNM | None]:
    """Sparsity and pattern of a level such as ``0.7``, ``2:8`` or ``mixed-2:8``."""
    pattern = None if level.startswith("0.") else parse_pattern(level)
    return (pattern.sparsity if pattern else float(level)), pattern


def prune_cell(
    setting: Setting,
    method: str,
    allocation: str,
    level: str,
    *,
    seed: int = 0,
    levels: Path | None = None,
    search_options: Mapping[str, Any] | None = None,
    tasks: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Plan, prune, measure.

    Args:
        method: a pruner; with ``+ls`` its masks get their least-squares weights.
        level: see :func:`target_of`.
        seed: of the calibration text.
        levels: where level databases of searched plans are kept.
    """
    name, _, ending = method.partition("+")
    reconstruct = ending == "ls"
    options = PRUNERS.get(name).make_options()
    sparsity, pattern = target_of(level)
    tokens = setting.calibration_set(seed).tokens
    model = setting.dense_model()
    began, used = time.perf_counter(), time.process_time()
    chosen = ALLOCATORS.get(allocation)
    searched = isinstance(chosen.traits.get("searches"), bool)
    if searched:
        plan = _searched(setting, model, name, allocation, level, seed, reconstruct, levels, search_options or {})
    else:
        plan = allocate(model, tokens, sparsity, pattern, allocation, chosen.make_options())
    planned, planned_used = time.perf_counter(), time.process_time()
    prune_model(model, tokens, plan, name, options, reconstruct=reconstruct)
    pruned, pruned_used = time.perf_counter(), time.process_time()
    value = setting.perplexity(model)
    cell = {
        "perplexity": value if math.isfinite(value) else None,
        "achieved": plan.achieved,
        "plan_s": round(planned - began, 1),
        "prune_s": round(pruned - planned, 1),
        "plan_cpu_s": round(planned_used - used, 1),
        "prune_cpu_s": round(pruned_used - planned_used, 1),
        "search": plan.details.get("search"),
        "selection": [setting.selection_windows, setting.selection_length] if searched else None,
    }
    return {**cell, "tasks": setting.accuracy(model, tasks)} if tasks else cell


def _searched(
    setting: Setting,
    model: Any,
    method: str,
    allocation: str,
    level: str,
    seed: int,
    reconstruct: bool,
    levels: Path | None,
    values: Mapping[str, Any],
) -> SparsityPlan:
    sparsity, pattern = target_of(level)
    calibration = setting.calibration_set(seed)
    folder = (levels or Path("levels")) / f"{setting.model.name}-{method}{'-ls' if reconstruct else ''}"
    return search_plan(
        ResidentLayers(model),
        calibration.tokens,
        setting.selection,
        sparsity,
        pattern,
        allocation,
        ALLOCATORS.get(allocation).make_options({"database": str(folder), **values}),
        method=method,
        method_options=PRUNERS.get(method).make_options(),
        identity={
            "model": setting.header()["model"],
            "calibration": asdict(calibration.describe()),
            "method": method,
        },
        reconstruct=reconstruct,
    )


@dataclass(frozen=True)
class RecoverySetting:
    """How recovery is trained and calibrated; each text is a file or a named source.

    Attributes:
        sequences, length: of the calibration; ``length`` also of training pieces and test windows.
        train_sequences: pieces of ``length`` tokens, the same number for every method that trains.
        dropout: of the adapters.
        training: values of :class:`TrainingOptions`.
        loss: what training minimises.
        allocation: of the sparsity before a method that starts from a pruned model.
    """

    calibration: str
    train: str
    sequences: int
    length: int
    train_sequences: int
    dropout: float
    training: Mapping[str, Any]
    loss: Loss = "ce"
    allocation: str = "uniform"


@dataclass(frozen=True)
class Recovery:
    """A row of a recovery table.

    Attributes:
        method: None only prunes.
        pruner: None leaves the model dense.
        options: of the recovery.
        sparsity: where the table has one column; None: so that what SparseLo stores, its factors included, is as much
            as what 70 % leaves.
        setting: what differs from the other rows; ``training`` is merged into theirs.
    """

    label: str
    method: str | None
    pruner: str | None
    options: dict[str, Any] = field(default_factory=dict)
    sparsity: float | None = 0.7
    loss: Loss = "ce"
    allocation: str = "uniform"
    setting: dict[str, Any] = field(default_factory=dict)

    def setting_of(self, common: Mapping[str, Any], **texts: str) -> RecoverySetting:
        """The common values with what differs."""
        training = {**common["training"], **self.setting.get("training", {})}
        row = {"loss": self.loss, "allocation": self.allocation, **self.setting, "training": training}
        return RecoverySetting(**{**common, **row, **texts})


ALL_WEIGHTS = {"training": {"learning_rate": 1e-3}}  # where all are trained, and not factors alone
# The rows of every table of recoveries.
RECOVERIES_COMPARED = {
    "sparse-lora": Recovery("Wanda + Sparse LoRA", "sparse-lora", "wanda"),
    "lora": Recovery("Wanda + LoRA, not merged", "lora", "wanda"),
    "losa": Recovery("Wanda + LoSA", "losa", "wanda"),
    "losa-no-layer-rates": Recovery("LoSA without layer rates", "losa", "wanda", {"layer_rates": False}),
    "losa-no-rank-allocation": Recovery("LoSA without rank allocation", "losa", "wanda", {"rank_allocation": False}),
    "losa-no-dynamic": Recovery("LoSA without the schedule", "losa", "wanda", {"dynamic": False}),
    "losa-kl": Recovery("Wanda + LoSA, loss kl", "losa", "wanda", loss="kl"),
    "sparsegpt-sparse-lora": Recovery("SparseGPT + Sparse LoRA", "sparse-lora", "sparsegpt"),
    "alps-sparse-lora": Recovery("ALPS + Sparse LoRA", "sparse-lora", "alps"),
    "alps-sparse-lora-kl": Recovery("ALPS + Sparse LoRA, loss kl", "sparse-lora", "alps", loss="kl"),
    "elsa": Recovery("ELSA from ALPS", "elsa", "alps", setting=ALL_WEIGHTS),
    "elsa-kl": Recovery("ELSA from ALPS, loss kl", "elsa", "alps", setting=ALL_WEIGHTS, loss="kl"),
}


def recovery_cell(
    folder: Path,
    setting: RecoverySetting,
    recovery: str | None,
    values: Mapping[str, Any],
    pruner: str | None,
    level: str,
    seed: int,
    measure: Callable[[Any], float],
) -> dict[str, Any]:
    """Prune, recover and measure in this process, which should do nothing else: its peak memory is read.

    Args:
        recovery: None only prunes. Methods that start from a pruned model prune 2:8 where LoSA mixes it.
        values: options of the recovery.
        pruner: None leaves the model dense.
        level: see :func:`target_of`.
        measure: the perplexity of a model.
    """
    tokenizer = load_tokenizer(folder)
    result: dict[str, Any] = {"level": level, "seed": seed}
    data = calibration = None
    if pruner is not None:
        calibration = sample_tokens(
            load_documents(setting.calibration),
            tokenizer,
            sequences=setting.sequences,
            length=setting.length,
            seed=seed,
            data=Path(setting.calibration).name,
        )
    method = RECOVERIES.get(recovery) if recovery is not None else None
    if method is not None and method.traits["trains"]:
        options = DataOptions(
            setting.train,
            samples=setting.train_sequences,
            max_length=setting.length,
            min_length=setting.length,
            seed=seed,
        )
        data = load_training_data(tokenizer, options)
    before = resident_bytes()
    started, cpu = time.perf_counter(), time.process_time()
    model = load_model(folder, dtype=torch.float32)
    if pruner is not None:
        sparsity, pattern = target_of(level)
        starts_dense = method is not None and method.traits["starts_from"] == "dense"
        if isinstance(pattern, MixedNM) and not starts_dense:
            pattern = NM(round(pattern.keep), pattern.m)
        pruner_options = PRUNERS.get(pruner).make_options()
        job = RecoveryJob(
            model=model,
            dense=lambda: StreamedLayers(folder, device=torch.device("cpu"), dtype=torch.float32),
            dense_model=lambda: load_model(folder, dtype=torch.float32),
            sparsity=sparsity,
            pattern=pattern,
            pruner=pruner,
            pruner_options=pruner_options,
            calibration=calibration,
            batch_size=8,
            data=data,
            training=TrainingOptions(**setting.training),
            loss=setting.loss,
            seed=seed,
        )
        if not starts_dense:
            tokens = calibration.tokens if calibration else None
            rates = ALLOCATORS.get(setting.allocation).make_options()
            job.plan = allocate(model, tokens, sparsity, pattern, setting.allocation, rates, batch_size=8)
            pruned = prune_model(model, tokens, job.plan, pruner, pruner_options, 8)
            job.masks = {name: module.mask for name, module in pruned.items()}
            result["sparsity"] = job.plan.achieved
        if method is not None:
            if any(each.name == "dropout" for each in fields(method.options)):
                values = {**values, "dropout": setting.dropout}
            recovered = method.function(job, method.make_options(values))
            attach_low_rank(model, recovered.low_rank)
            result["sparsity"] = recovered.plan.achieved
            if "effective_density" in recovered.report:
                result["effective_density"] = recovered.report["effective_density"]
            if method.traits["trains"]:
                steps = recovered.report.get("steps", [recovered.report])
                result["tokens"] = sum(step["tokens"] for step in steps)
                result["training_seconds"] = sum(step["seconds"] for step in steps)
                result["ranks"] = steps[-1].get("ranks")
                result["training"] = dict(setting.training)
    result["seconds"], result["cpu_seconds"] = time.perf_counter() - started, time.process_time() - cpu
    result["peak_mib"] = (peak_bytes() - before) / 2**20
    value = measure(model)
    result["perplexity"] = value if math.isfinite(value) else None
    return result


def peak_bytes() -> int:
    """The process's largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """The process's resident size now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
