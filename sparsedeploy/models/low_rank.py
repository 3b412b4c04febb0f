"""Linears with low-rank factors beside their weight, and the adapter folder that stores the factors.

The folder has the format of the peft package's LoRA adapters, so peft loads it too; here it is attached by
:func:`sparsedeploy.models.loading.load_model` whenever a model folder holds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.reading import read_object

FOLDER = "adapter"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LowRank:
    """y = W x + scale * B A x: ``a [rank, columns]``, ``b [rows, rank]``."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float = 1.0

    @property
    def size(self) -> int:
        return self.a.numel() + self.b.numel()


class LowRankLinear(nn.Linear):
    """A linear plus two small ones, ``up(down(x))``; the scale is in ``up``. The weight keeps its name and place."""

    def __init__(self, linear: nn.Linear, factors: LowRank) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.down = _small(factors.a, linear.weight)
        self.up = _small(factors.b * factors.scale, linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias) + self.up(self.down(x))


def attach_low_rank(model: nn.Module, factors: Mapping[str, LowRank]) -> None:
    """Replace the named linears, in place.

    Raises:
        UserError: a name that is no linear of the model, or factors of another shape.
    """
    for name, factor in factors.items():
        parent, _, child = name.rpartition(".")
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise UserError(
                f"the adapter names {name}, which is not a linear of the model", "Use the adapter's own model."
            )
        if factor.a.shape[1] != linear.in_features or factor.b.shape[0] != linear.out_features:
            raise UserError(f"the adapter's factors do not fit {name}", "Use the adapter's own model.")
        setattr(model.get_submodule(parent), child, LowRankLinear(linear, factor))


def save_adapter(folder: Path, factors: Mapping[str, LowRank], base: str) -> None:
    """Write the adapter folder; ranks and scales may differ from module to module.

    Args:
        base: the base model's name or place, as peft is to find it.
    """
    folder.mkdir(parents=True)
    ranks = {name: len(factor.a) for name, factor in factors.items()}
    alphas = {name: factor.scale * len(factor.a) for name, factor in factors.items()}
    first = next(iter(factors))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        "target_modules": list(factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    }
    tensors = {}
    for name, factor in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = factor.a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = factor.b.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / CONFIG, config)


def refuse_unmerged(checkpoint: Path) -> None:
    """Refuse a checkpoint with factors beside its weights, for targets that take plain weights only.

    Raises:
        UserError: it has some.
    """
    if (checkpoint / FOLDER).is_dir():
        raise UserError(
            f"{checkpoint} has an adapter that is not merged into its weights", "Merge it, then use the result."
        )


def load_adapter(folder: Path) -> dict[str, LowRank]:
    """Read the factors of an adapter folder, by module name.

    Raises:
        UserError: a missing or broken file, or an adapter that is not plain LoRA.
    """
    fix = "Write the checkpoint again with sparsedeploy recover."
    try:
        config = read_object(folder / CONFIG, fix=fix)
        tensors = load_file(folder / WEIGHTS)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the adapter in {folder} cannot be read ({error})", fix) from error
    if config.get("peft_type") != "LORA" or config.get("use_rslora") or config.get("use_dora"):
        raise UserError(f"the adapter in {folder} is not plain LoRA", "Merge it into the model with peft first.")
    factors: dict[str, LowRank] = {}
    for key in sorted(tensors):
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        a, b = tensors[key], tensors.get(key.replace(".lora_A.", ".lora_B."))
        if b is None:
            raise UserError(f"the adapter in {folder} lacks a factor of {name}", fix)
        alpha = config.get("alpha_pattern", {}).get(name, config["lora_alpha"])
        factors[name] = LowRank(a, b, alpha / len(a))
    return factors


def _small(weight: torch.Tensor, like: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False)
    return linear
