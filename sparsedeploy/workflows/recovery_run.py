"""What every recovery does, whatever it starts from: check the options, read the text, run, record and write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy.checkpoint.manifest import CalibrationRecord, Manifest, RecoveryRecord
from sparsedeploy.checkpoint.writer import Provenance, write_checkpoint
from sparsedeploy.errors import UserError
from sparsedeploy.models.config_check import positions
from sparsedeploy.models.loading import load_model, resolve_device
from sparsedeploy.models.tokenizer import check_tokens, load_tokenizer
from sparsedeploy.options import build_options
from sparsedeploy.processes import SINGLE_PROCESS, Processes
from sparsedeploy.recovery.base import Recovered, RecoveryJob
from sparsedeploy.recovery.data import TrainingData, load_training_data
from sparsedeploy.recovery.training import TrainingOptions
from sparsedeploy.registry import Method
from sparsedeploy.version import __version__
from sparsedeploy.workflows.options import RecoverOptions, RunOptions

# What may change when a run that diverged is resumed.
_CHANGEABLE = ("learning_rate", "clip")


def checked_options(method: Method[Any], recover: RecoverOptions) -> tuple[Any, TrainingOptions]:
    """The options of the method and of its training.

    Raises:
        UserError: options that do not fit, or a method that trains without text.
    """
    if recover.data is None and method.traits["trains"]:
        raise UserError(
            f"{method.name} trains and no training text was given",
            "Add --train-data: a .jsonl of rows with text, or with instruction and output; or any text.",
        )
    if recover.loss != "ce" and not method.traits["trains"]:
        raise UserError(f"{method.name} does not train: it has no loss", "Leave --loss out.")
    return method.make_options(recover.options), build_options("training", TrainingOptions, recover.training or {})


def training_data(
    folder: Path, config: Any, recover: RecoverOptions, method: Method[Any], run: RunOptions
) -> TrainingData | None:
    """The text to train on as tokens; None where the method does not train."""
    if recover.data is None or not method.traits["trains"]:
        return None
    longest = min(recover.data.max_length, positions(config) or recover.data.max_length)
    tokenizer = load_tokenizer(folder, trust_remote_code=run.trust_remote_code)
    data = load_training_data(tokenizer, replace(recover.data, max_length=longest))
    for sequence in data.sequences:
        check_tokens(sequence, config.get_text_config(decoder=True).vocab_size, data.data)
    return data


def request_of_recovery(
    recover: RecoverOptions, options: Any, training: TrainingOptions, data: TrainingData | None, run: RunOptions
) -> dict[str, Any]:
    """What decides the result: a resumed run must ask for the same."""
    return {
        "recover": recover.method,
        "recover_options": asdict(options),
        "loss": recover.loss,
        "training": {key: value for key, value in asdict(training).items() if key not in _CHANGEABLE},
        "training_data": data.describe() if data else None,
        "seed": recover.seed,
        "dtype": str(run.torch_dtype),
        "device": resolve_device(run.device).type,
        "torch": torch.__version__,
        "sparsedeploy": __version__,
    }


def loaded_model(folder: Path, run: RunOptions) -> nn.Module:
    """A whole model, as the run asks for it."""
    device = resolve_device(run.device)
    return load_model(folder, dtype=run.torch_dtype, device=device, trust_remote_code=run.trust_remote_code)


def model_loader(folder: Path, like: nn.Module, run: RunOptions) -> Callable[[], nn.Module]:
    """Load a model in another one's type."""
    return partial(
        load_model, folder, dtype=dtype_of(like), device=device_of(like), trust_remote_code=run.trust_remote_code
    )


def run_method(job: RecoveryJob, method: Method[Any], options: Any) -> Recovered:
    """Run the method; where it saves its state, an error says so."""
    with _kept(job):
        recovered: Recovered = method.function(job, options)
        return recovered


def _kept(job: RecoveryJob) -> AbstractContextManager[None]:
    return job.state.kept() if job.state is not None else nullcontext()


def recovery_record(
    recover: RecoverOptions,
    options: Any,
    training: TrainingOptions,
    data: TrainingData | None,
    method: Method[Any],
    recovered: Recovered,
) -> RecoveryRecord:
    """The manifest's section."""
    return RecoveryRecord(
        method=recover.method,
        options=asdict(options),
        training=asdict(training) if method.traits["trains"] else None,
        data=data.describe() if data else None,
        seed=recover.seed,
        report=recovered.report,
    )


def write_recovered(
    folder: Path,
    output: Path,
    job: RecoveryJob,
    recovered: Recovered,
    losses: Mapping[str, float],
    *,
    source_name: str,
    pruning: tuple[str, dict[str, Any]],
    calibration: CalibrationRecord | None,
    request: dict[str, dict[str, Any]],
    recovery: RecoveryRecord,
    run: RunOptions,
    processes: Processes = SINGLE_PROCESS,
) -> Manifest:
    """Write the checkpoint from the first process; the others get its manifest. What was saved for a resume goes."""
    manifest = None
    if processes.main:
        with _kept(job):
            manifest = write_checkpoint(
                folder,
                output,
                Provenance(
                    source_name,
                    recovered.plan,
                    *pruning,
                    calibration,
                    request,
                    recovery,
                    dtype=str(dtype_of(job.model)).removeprefix("torch."),
                ),
                model=job.model,
                masks=recovered.masks,
                losses=recovered.losses or losses,
                low_rank=recovered.low_rank,
                overwrite=run.overwrite,
            )
        if job.state is not None:
            job.state.remove()
    written = processes.broadcast_object(manifest)
    assert written is not None, "the first process writes"
    return written


def dtype_of(model: nn.Module) -> torch.dtype:
    """The type that a model computes in."""
    return next(model.parameters()).dtype


def device_of(model: nn.Module) -> torch.device:
    """Where a model is."""
    return next(model.parameters()).device
