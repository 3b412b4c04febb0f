"""What every recovery does, whatever it starts from: check the options, read the text, run, record and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy.checkpoint.manifest import CalibrationRecord, EngineRecord, Manifest, RecoveryRecord
from sparsedeploy.checkpoint.writer import Provenance, write_checkpoint
from sparsedeploy.conversion import build_options
from sparsedeploy.errors import UserError
from sparsedeploy.models.config_check import positions
from sparsedeploy.models.loading import load_model
from sparsedeploy.models.tokenizer import check_tokens, load_tokenizer
from sparsedeploy.processes import SINGLE_PROCESS, Processes
from sparsedeploy.recovery.base import Recovered, RecoveryJob
from sparsedeploy.recovery.data import TrainingData, load_training_data
from sparsedeploy.recovery.state import RunState
from sparsedeploy.recovery.training import TrainingOptions
from sparsedeploy.registry import RECOVERIES, Method
from sparsedeploy.version import __version__
from sparsedeploy.workflows.options import RecoverOptions, RunOptions

# What may change when a run that diverged is resumed.
_CHANGEABLE = ("learning_rate", "clip")


@dataclass(frozen=True)
class RecoveryRun:
    """A recovery that was asked for, checked: what each of its steps reads.

    Attributes:
        output: the folder to make.
        options: of the method.
    """

    output: Path
    asked: RecoverOptions
    method: Method[Any]
    options: Any
    training: TrainingOptions
    run: RunOptions
    processes: Processes = SINGLE_PROCESS

    @staticmethod
    def of(output: Path, asked: RecoverOptions, run: RunOptions, processes: Processes = SINGLE_PROCESS) -> RecoveryRun:
        """Check the options of the method and of its training.

        Raises:
            UserError: options that do not fit, or a method that trains without text.
        """
        method = RECOVERIES.get(asked.method)
        if asked.data is None and method.traits["trains"]:
            raise UserError(
                f"{method.name} trains and no training text was given",
                "Add --train-data: a .jsonl of rows with text, or with instruction and output; or any text.",
            )
        if asked.loss != "ce" and not method.traits["trains"]:
            raise UserError(f"{method.name} does not train: it has no loss", "Leave --loss out.")
        training = build_options("training", TrainingOptions, asked.training or {})
        return RecoveryRun(output, asked, method, method.make_options(asked.options), training, run, processes)

    def training_data(self, folder: Path, config: Any) -> TrainingData | None:
        """The text to train on as tokens; None where the method does not train."""
        if self.asked.data is None or not self.method.traits["trains"]:
            return None
        longest = min(self.asked.data.max_length, positions(config) or self.asked.data.max_length)
        tokenizer = load_tokenizer(folder, trust_remote_code=self.run.trust_remote_code)
        data = load_training_data(tokenizer, replace(self.asked.data, max_length=longest))
        for sequence in data.sequences:
            check_tokens(sequence, config.get_text_config(decoder=True).vocab_size, data.data)
        return data

    def state(self, request: Mapping[str, Any], data: TrainingData | None) -> RunState:
        """What is saved on the way; a resumed run must ask for the same.

        Args:
            request: what decides the result besides this recovery.
        """
        recovery = {
            "recover": self.asked.method,
            "recover_options": asdict(self.options),
            "loss": self.asked.loss,
            "training": {key: value for key, value in asdict(self.training).items() if key not in _CHANGEABLE},
            "training_data": data.describe() if data else None,
            "seed": self.asked.seed,
            "dtype": str(self.run.torch_dtype),
            "device": self.run.torch_device.type,
            "torch": torch.__version__,
            "sparsedeploy": __version__,
        }
        return RunState(self.output, {**request, **recovery}, resume=self.run.resume, writes=self.processes.main)

    def model_loader(self, folder: Path, like: nn.Module) -> Callable[[], nn.Module]:
        """Load a model in another one's type."""
        trust = self.run.trust_remote_code
        return partial(load_model, folder, dtype=dtype_of(like), device=device_of(like), trust_remote_code=trust)

    def finish(
        self,
        folder: Path,
        job: RecoveryJob,
        losses: Mapping[str, float],
        *,
        source_name: str,
        pruning: tuple[str, dict[str, Any]],
        calibration: CalibrationRecord | None,
        request: dict[str, dict[str, Any]],
        engine: EngineRecord | None = None,
    ) -> Manifest:
        """Run the method and write its checkpoint from the first process; the others get its manifest.

        What was saved for a resume goes; where the method saves its state, an error says so.

        Args:
            folder: of the model that the job began with; ``losses`` its pruning's, for a method without its own.
            pruning: the pruner and its options; ``engine`` the program that pruned, where it was not this one.
        """
        manifest = None
        kept: Callable[[], AbstractContextManager[None]] = job.state.kept if job.state is not None else nullcontext
        with kept():
            recovered: Recovered = self.method.function(job, self.options)
        if self.processes.main:
            record = RecoveryRecord(
                method=self.asked.method,
                options=asdict(self.options),
                training=asdict(self.training) if self.method.traits["trains"] else None,
                data=job.data.describe() if job.data else None,
                seed=self.asked.seed,
                report=recovered.report,
            )
            dtype = str(dtype_of(job.model)).removeprefix("torch.")
            with kept():
                manifest = write_checkpoint(
                    folder,
                    self.output,
                    Provenance(source_name, recovered.plan, *pruning, calibration, request, record, engine, dtype),
                    model=job.model,
                    masks=recovered.masks,
                    losses=recovered.losses or losses,
                    low_rank=recovered.low_rank,
                    overwrite=self.run.overwrite,
                )
            if job.state is not None:
                job.state.remove()
        written = self.processes.broadcast_object(manifest)
        assert written is not None, "the first process writes"
        return written


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type that a model computes in."""
    return next(model.parameters()).dtype


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device
