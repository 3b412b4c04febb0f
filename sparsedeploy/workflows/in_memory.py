"""Prune a model that is in memory: the same options, methods and masks as the command, without a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy.allocation import allocate, model_layers
from sparsedeploy.calibration.samples import CalibrationSet
from sparsedeploy.calibration.text import draw_sequences
from sparsedeploy.checkpoint.manifest import Manifest
from sparsedeploy.checkpoint.writer import Provenance, write_checkpoint
from sparsedeploy.errors import UserError
from sparsedeploy.folders import check_writable
from sparsedeploy.models.layers import ResidentLayers
from sparsedeploy.models.tokenizer import check_tokens
from sparsedeploy.plan import SparsityPlan
from sparsedeploy.pruning.layers import losses_of, prune_model
from sparsedeploy.registry import PRUNERS
from sparsedeploy.reporting.charts import Chart
from sparsedeploy.reporting.plan_plot import plan_charts
from sparsedeploy.workflows.options import PruneOptions, request_of
from sparsedeploy.workflows.plan import measures_text, resolve_allocation


@dataclass(frozen=True)
class PrunedModel:
    """A model that was pruned in place, and how.

    Attributes:
        masks: bool ``[rows, columns]`` on the CPU by the names of the linears, True where a weight is kept.
        losses: the method's own reconstruction errors, where it has them.
        calibration: the sequences that were measured; None where none were.
    """

    model: nn.Module
    tokenizer: Any
    options: PruneOptions
    plan: SparsityPlan
    masks: Mapping[str, torch.Tensor]
    losses: Mapping[str, float]
    calibration: CalibrationSet | None

    @property
    def sparsity(self) -> float:
        """The pruned part of the weights in the decoder's linears."""
        return self.plan.achieved

    def charts(self) -> list[Chart]:
        """Sparsity by layer and module, as a notebook shows it."""
        return plan_charts({self.options.method: self.plan})

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Manifest:
        """Write the checkpoint that ``prune`` would: a Hugging Face folder with plan and masks.

        Weights that changed since are written as they are now, and zero where the mask prunes them.

        Raises:
            UserError: no tokenizer, an output that exists, or a disk that is full.
        """
        output = Path(folder)
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer", "Give one: prune(model, options, tokenizer).")
        name = str(getattr(self.model.config, "_name_or_path", "") or "a model in memory")
        check_writable(output, overwrite, [name])
        method = PRUNERS.get(self.options.method)
        with tempfile.TemporaryDirectory(dir=_existing(output.parent)) as source:
            self.model.save_pretrained(source)  # type: ignore[operator]
            self.tokenizer.save_pretrained(source)
            provenance = Provenance(
                name,
                self.plan,
                self.options.method,
                asdict(method.make_options(self.options.method_options)),
                self.calibration.describe() if self.calibration else None,
                request_of(self.options, reads_text=self.calibration is not None),
                dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            )
            return write_checkpoint(
                Path(source),
                output,
                provenance,
                model=self.model,
                masks=self.masks,
                losses=self.losses,
                overwrite=overwrite,
            )


def prune(
    model: nn.Module, options: PruneOptions, tokenizer: Any = None, *, tokens: torch.Tensor | None = None
) -> PrunedModel:
    """Prune a causal language model in place, layer by layer.

    Args:
        model: of transformers, on any device; it ends up as it was in mode and gradients, with pruned weights.
        options: as for the command; ``options.calibration`` names the text that is read.
        tokenizer: for that text, and for :meth:`PrunedModel.save`.
        tokens: calibration sequences of your own, int64 ``[sequences, length]``, in place of that text.

    Raises:
        UserError: what cannot be done, in one line. Of an allocation that searches, the command is named, which keeps
            its trials on disk. The model is changed only after everything was checked.
    """
    choice = None if options.plan is not None else resolve_allocation(options)
    if choice is not None and choice.searches:
        raise UserError(
            f"allocation {choice.name} searches, which a model in memory cannot",
            "Save the model and run: sparsedeploy prune FOLDER.",
        )
    if options.quantize is not None:
        raise UserError(
            "--quantize writes scales beside the weights, which a model in memory has no place for",
            f"Save the model and run: sparsedeploy prune FOLDER --quantize {options.quantize}.",
        )
    method = PRUNERS.get(options.method)
    method_options = method.make_options(options.method_options)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        layers = ResidentLayers(model, options.head)
        calibration = None
        if measures_text(choice, options.method, reconstruct=options.reconstruct):
            calibration = _calibration(model, options, tokenizer, tokens)
        elif tokens is not None:
            raise UserError(f"tokens have no effect: {options.method} reads no calibration text", "Leave them out.")
        read = calibration.tokens if calibration else None
        if options.plan is not None:
            options.plan.check_modules([shape for layer in model_layers(layers) for shape in layer])
            plan = options.plan
        else:
            assert choice is not None
            plan = allocate(
                layers,
                read,
                choice.sparsity,
                choice.pattern,
                choice.name,
                choice.options,
                mixed=choice.mixed,
                batch_size=options.calibration.batch_size,
                accumulate=options.calibration.accumulation,
            )
        pruned = prune_model(
            model,
            read,
            plan,
            options.method,
            method_options,
            options.calibration.batch_size,
            accumulate=options.calibration.accumulation,
            reconstruct=options.reconstruct,
        )
    finally:
        model.train(training)
    assert next(model.parameters()).device == device
    masks = {name: one.mask for name, one in pruned.items()}
    return PrunedModel(model, tokenizer, options, plan, masks, losses_of(pruned), calibration)


def _calibration(
    model: nn.Module, options: PruneOptions, tokenizer: Any, tokens: torch.Tensor | None
) -> CalibrationSet:
    """The sequences to measure.

    Raises:
        UserError: neither a tokenizer nor tokens, or tokens of another shape, type or vocabulary.
    """
    config: Any = model.config
    if tokens is None:
        if tokenizer is None:
            raise UserError(
                f"{options.method} needs calibration text", "Give a tokenizer, or tokens=[sequences, length]."
            )
        return draw_sequences(tokenizer, config, options.calibration)
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise UserError(
            f"tokens are {tokens.dtype} {list(tokens.shape)}", "Give int64 tokens of shape [sequences, length]."
        )
    check_tokens(tokens, config.get_text_config(decoder=True).vocab_size, "tokens")
    return CalibrationSet(tokens.cpu(), "tokens", options.calibration.seed)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.is_dir():
        folder = folder.parent
    return folder
