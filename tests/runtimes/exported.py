"""Small models exported for the engine, beside the torch model that they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.targets.registry import export_checkpoint
from tests.small_models import byte_tokenizer
from tests.targets.graphs import config_for_export


@dataclass(frozen=True)
class Exported:
    """An artifact folder and its model, with the plain attention."""

    folder: Path
    model: PreTrainedModel


def export_small(folder: Path, family: str, sparsity: float = 0.0, options: dict[str, Any] | None = None) -> Exported:
    """Export a small random model; the smallest weights of each row of its decoder's linears are zeroed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_for_export(family)).eval().requires_grad_(False)
    for layer in find_decoder_stack(model).layers:
        for linear in layer.modules():
            if isinstance(linear, torch.nn.Linear):
                smallest = linear.weight.abs().argsort(dim=1)[:, : int(sparsity * linear.in_features)]
                linear.weight.scatter_(1, smallest, 0.0)
    model.save_pretrained(folder / "checkpoint")
    byte_tokenizer().save_pretrained(folder / "checkpoint")
    artifact = folder / f"{family}-{int(100 * sparsity)}"
    export_checkpoint(folder / "checkpoint", "deepsparse", artifact, options)
    model.set_attn_implementation("eager")
    return Exported(artifact, model)
