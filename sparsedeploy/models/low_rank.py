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

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_json
from sparsedeploy.models.tensor_files import read_header
from sparsedeploy.reading import Fields, read_object

FOLDER = "adapter"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")
# What a configuration of peft adds to plain LoRA.
_MORE = (
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "layers_to_transform",
    "trainable_token_indices",
)


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
        UserError: a missing or broken file, factors that do not belong together, or an adapter that is more than plain
            LoRA, of which a part would be left out.
    """
    fix = "Write the checkpoint again with sparsedeploy recover."
    config = Fields(read_object(folder / CONFIG, fix=fix), str(folder / CONFIG), fix)
    more = [name for name in _MORE if config.values.get(name)]
    if config.values.get("bias", "none") != "none":
        more.append("bias")
    read_header(folder / WEIGHTS)  # refuses what is damaged, or no file
    tensors = load_file(folder / WEIGHTS)
    more += [progress.printable(key, keep="") for key in tensors if not key.endswith(_FACTORS)]
    if config.values.get("peft_type") != "LORA" or more:
        what = f" ({more[0]})" if more else ""
        raise UserError(f"the adapter in {folder} is not plain LoRA{what}", "Merge it into the model with peft first.")
    if not tensors:
        raise UserError(f"the adapter in {folder} holds no factors", fix)
    alpha = config.number("lora_alpha")
    alphas = config.fields("alpha_pattern") if "alpha_pattern" in config else Fields({}, config.where, fix)
    factors: dict[str, LowRank] = {}
    for name in sorted({key.removeprefix(_PREFIX).rsplit(".", 2)[0] for key in tensors}):
        pair = [tensors.get(f"{_PREFIX}{name}{end}", tensors.get(f"{name}{end}")) for end in _FACTORS]
        a, b = pair
        if a is None or b is None:
            raise UserError(f"the adapter in {folder} lacks a factor of {name}", fix)
        fitting = a.dim() == b.dim() == 2 and len(a) == b.shape[1] and len(a) > 0
        if not fitting or not (a.is_floating_point() and b.is_floating_point()):
            raise UserError(f"the adapter's factors of {name} do not belong together", fix)
        factors[name] = LowRank(a, b, alphas.number(name, alpha) / len(a))
    return factors


def _small(weight: torch.Tensor, like: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(like.device, like.dtype), requires_grad=False)
    return linear
