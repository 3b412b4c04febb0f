"""What ``deploy`` was asked for, checked, and what is known of it, in a file that outlives the process."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sparsedeploy.calibration.documents import content_sha256, is_named, load_documents
from sparsedeploy.calibration.samples import CalibrationSet, default_length
from sparsedeploy.calibration.text import calibration_set
from sparsedeploy.errors import UserError
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.models.loading import load_config, resolve_model
from sparsedeploy.models.tokenizer import load_tokenizer
from sparsedeploy.options import described, one_of
from sparsedeploy.plan import check_sparsity
from sparsedeploy.quality.options import EvalOptions, TextOptions
from sparsedeploy.quality.perplexity import text_windows
from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES
from sparsedeploy.speed.comparison import parse_part
from sparsedeploy.speed.options import SpeedOptions
from sparsedeploy.version import __version__
from sparsedeploy.workflows.aims import Aim
from sparsedeploy.workflows.deploy_plan import choose_aim
from sparsedeploy.workflows.deploy_search import Trial
from sparsedeploy.workflows.options import DeployOptions, PruneOptions, RecoverOptions
from sparsedeploy.workflows.plan import text_read
from sparsedeploy.workflows.state_file import read_state, write_state

STATE = "deploy.json"
_FORMAT = 1
SPLIT = "test"
# The options that decide the search.
_SEARCH = ("within", "rates", "methods", "allocations", "held_out", "windows", "context")


@dataclass(frozen=True)
class Prepared:
    """A checked request.

    Attributes:
        held_out: the text that quality is judged on; ``context`` and ``windows`` its windows.
        within: the growth of perplexity that is allowed, as a part.
        request: what decides the search; the state file must agree with it.
        training: what decides the training; None without a recovery.
        measuring: what decides the benchmark.
    """

    source: str
    folder: Path
    output: Path
    aim: Aim
    options: DeployOptions
    held_out: str
    context: int
    within: float
    request: dict[str, Any]
    training: dict[str, Any] | None
    measuring: dict[str, Any]

    @property
    def read(self) -> list[str | Path]:
        """The model and the texts that the run reads."""
        calibration, recovery = self.options.calibration.data, self.options.recovery
        found: list[str | Path] = [self.folder, self.held_out]
        found += [calibration] if reads_calibration(self.options, self.aim) else []
        return [*found, *(recovery.texts if recovery is not None else ())]

    @property
    def judge(self) -> EvalOptions:
        """How a checkpoint's quality is measured."""
        field, limit = self.options.calibration.field, self.options.windows
        text = TextOptions((f"held-out={self.held_out}",), split=SPLIT, field=field, max_windows=limit)
        return EvalOptions(text, context=self.context)

    @cached_property
    def windows(self) -> torch.Tensor:
        """The windows of the held-out text, int64 ``[windows, context]``."""
        tokenizer, field = load_tokenizer(self.folder), self.options.calibration.field
        return text_windows(
            self.held_out, tokenizer, self.context, field=field, split=SPLIT, limit=self.options.windows
        )

    @cached_property
    def drawn(self) -> CalibrationSet:
        """The calibration sequences of all trials."""
        return calibration_set(self.folder, load_config(self.folder), self.options.calibration)


def prepare(source: str, output: Path, options: DeployOptions) -> Prepared:
    """Check everything that can be checked before the work.

    Raises:
        UserError: see :func:`deploy`.
    """
    within = parse_bound(options.within)
    for rate in options.rates:
        check_sparsity(rate)
    for registry, names in ((PRUNERS, options.methods), (ALLOCATORS, options.allocations)):
        for name in names:
            registry.get(name)
    if not (options.rates and options.methods and options.allocations):
        raise UserError("there is nothing to try", "Give at least one rate, method and allocation.")
    data = options.calibration.data
    held_out = options.held_out or data
    if not is_named(held_out) and (options.held_out is None or _same(held_out, data)):
        raise UserError(
            f"the text {held_out} has no split of its own to judge quality on",
            "Name another text that calibration does not see: --held-out FILE.",
        )
    aim, field = choose_aim(options.target), options.calibration.field
    for text in dict.fromkeys((data, held_out) if reads_calibration(options, aim) else (held_out,)):
        _check_text(text, field, "--data-field")
    if options.recovery is not None:
        _check_recovery(options.recovery, held_out)
    searched = (data, held_out) if reads_calibration(options) else (held_out,)
    folder = resolve_model(source)
    config = load_config(folder)
    context = options.context or min(512, default_length(config))
    request = {
        "model_sha256": model_sha256(folder),
        "sparsedeploy": __version__,
        "options": {name: _plain(getattr(options, name)) for name in _SEARCH},
        "calibration": _plain(options.calibration),
        "contents of the texts": [content_sha256(text) for text in searched],
    }
    training = None
    if options.recovery is not None:
        (text,) = options.recovery.texts
        training = {**_plain(options.recovery), "contents": content_sha256(text)}
    _check_output(output, request, training)
    measuring = {item.name: getattr(options, item.name) for item in described(SpeedOptions) if item.facts.recorded}
    return Prepared(source, folder, output, aim, options, held_out, context, within, request, training, measuring)


def reads_calibration(options: DeployOptions, aim: Aim | None = None) -> bool:
    """Whether a method or an allocation to choose from reads calibration text, or an export for the aim.

    Raises:
        UserError: a name or a rate that cannot be.
    """
    return any("int8" in how for how in (aim.formats if aim else {}).values()) or any(
        text_read(PruneOptions(sparsity=rate, method=method, allocation=allocation))
        for rate in options.rates[:1]
        for method in options.methods
        for allocation in options.allocations
    )


def _check_text(text: str, field: str, flag: str) -> None:
    """Refuse a text that is neither named nor there, or that holds none.

    Raises:
        UserError: such a text.
    """
    if not is_named(text):
        load_documents(text, field=field, flag=flag)


def _check_recovery(recovery: RecoverOptions, held_out: str) -> None:
    """Refuse what does not train a pruned checkpoint into another, and a text that quality is judged on.

    Raises:
        UserError: see :func:`deploy`.
    """
    method = RECOVERIES.get(recovery.method)
    able = [
        one.name
        for one in map(RECOVERIES.get, RECOVERIES.names())
        if one.traits["trains"] and one.traits["starts_from"] == "pruned" and one.traits.get("merged", True)
    ]
    if method.name not in able:
        raise UserError(
            f"deploy trains a pruned model and merges the result into its weights, which {method.name} does not do",
            f"Use --recover {one_of(able)}.",
        )
    if recovery.data is None:
        raise UserError(f"{method.name} trains and no training text was given", "Add --train-data.")
    _check_text(recovery.data.data, recovery.data.field, "--train-field")
    if _same(recovery.data.data, held_out):
        raise UserError(
            f"quality is judged on the training text {held_out}", "Train on another text: --train-data FILE."
        )


def parse_bound(text: str) -> float:
    """``5%`` or ``0.05`` as a part.

    Raises:
        UserError: not a number, or negative.
    """
    return parse_part("bound", text, "Give the growth of perplexity that is allowed, such as 5% or 0.05.")


_NEW_FOLDER = "Name a new folder."


class State:
    """What is known, in a file that is written anew after each step.

    Attributes:
        compared: methods and allocations at the middle rate, see :func:`~.deploy_compare.compare_pairs`.
        formats: of this target: name -> folder, perplexity in the engine, and why there is none. What failed in an
            earlier run is tried again.
        result: of this target; None until everything was measured as it is asked for now.

    A recovery may be added to a finished search: what follows from its answer is then done again.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._path = prepared.output / STATE
        values = read_state(self._path, fix=_NEW_FOLDER) if self._path.exists() else {}
        self._request, self._target, self._measuring = prepared.request, prepared.aim.name, prepared.measuring
        self._training = prepared.training
        self.dense: dict[str, Any] | None = values.get("dense")
        self.compared: list[dict[str, Any]] = values.get("compared", [])
        self.trials: list[dict[str, Any]] = values.get("trials", [])
        added = values.get("training") != prepared.training
        self._targets: dict[str, dict[str, Any]] = {} if added else values.get("targets", {})
        known = self._targets.get(self._target, {})
        formats: dict[str, dict[str, Any]] = known.get("formats", {})
        self.formats = {name: row for name, row in formats.items() if row["reason"] is None}
        self.result: dict[str, Any] | None = known.get("result") if known.get("measuring") == self._measuring else None

    @property
    def results(self) -> dict[Trial, float]:
        """Trial -> its perplexity; infinity where there is none."""
        return {trial_of(one): math.inf if one["perplexity"] is None else one["perplexity"] for one in self.trials}

    def save(self) -> None:
        here = {"measuring": self._measuring, "formats": self.formats, "result": self.result}
        self._targets = {**self._targets, self._target: here}
        values = {"dense": self.dense, "compared": self.compared, "trials": self.trials, "targets": self._targets}
        asked = {"request": self._request, "training": self._training}
        write_state(self._path, {"format": _FORMAT, **asked, **values})


def trial_of(row: Mapping[str, Any]) -> Trial:
    """The trial that a row is the result of."""
    return Trial(row["rate"], row["method"], row["allocation"], row.get("recovery"))


def _check_output(output: Path, request: dict[str, Any], training: dict[str, Any] | None) -> None:
    """Refuse a folder with other content, or with a deployment of another request."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"output {output} is a file", "Name a folder.")
    path = output / STATE
    if not path.exists():
        if any(output.iterdir()):
            raise UserError(f"output {output} holds other files", "Name a new folder.")
        return
    stored = read_state(path, fix=_NEW_FOLDER)
    known: dict[str, Any] = stored["request"]
    if stored.get("training") is not None:
        request, known = {**request, "recovery": training}, {**known, "recovery": stored["training"]}
    if known != request:
        keys = [key for key in request if known.get(key) != request[key]]
        if "options" in keys and isinstance(known.get("options"), dict):
            names = [k for k, value in request["options"].items() if known["options"].get(k) != value]
            keys = [*(names or ["options"]), *(key for key in keys if key != "options")]
        raise UserError(
            f"{output} holds a deployment that was asked for differently ({', '.join(keys)})",
            "Give the same options to resume it, or name a new folder: -o FOLDER.",
        )


def _same(one: str, two: str) -> bool:
    return Path(one).exists() and Path(two).exists() and Path(one).resolve() == Path(two).resolve()


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(item) for key, item in asdict(value).items()}
    return list(value) if isinstance(value, tuple) else value
