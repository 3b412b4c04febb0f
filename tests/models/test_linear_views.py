"""Fused experts and Conv1D: pruned slice by slice like linears, from the files and in memory, and written back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsedeploy.allocation import ALLOCATORS, allocate
from sparsedeploy.calibration.samples import CalibrationSet
from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.models.linear_views import prunable_linears
from sparsedeploy.models.loading import load_model
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.workflows import plan as planning
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "granitemoe": EXPERTS,
    "deepseek_v3": {**EXPERTS, **LATENT, **GROUPS, "num_key_value_heads": 4},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt_oss": EXPERTS,
    "llama4_text": {**EXPERTS, "intermediate_size_mlp": 40},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
}


def family(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SMALL, **FAMILIES[name]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:  # some families leave their experts at zero
            nn.init.normal_(parameter, std=0.05)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_of_a_layer_is_prunable(name: str) -> None:
    model = family(name)
    layers = find_decoder_stack(model).layers
    matrices = sum(p.numel() for n, p in layers.named_parameters() if p.dim() >= 2 and "bias" not in n)
    routers = sum(
        module.weight.numel()
        for module in layers.modules()
        if "Router" in type(module).__name__ and not isinstance(module, nn.Linear) and hasattr(module, "weight")
    )
    found = find_decoder_stack(model).all_linears().values()
    assert sum(linear.weight.numel() for linear in found) == matrices - routers


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_equal_those_of_whole_forward_passes(name: str) -> None:
    """The oracle runs the whole model for each layer and rewrites nothing of the product but the names."""
    model = family(name)
    plan = allocate(model, None, 0.5, None, "uniform", ALLOCATORS.get("uniform").make_options())
    expected = oracle(family(name), tokens(), {target.name: target.zeros_per_row for target in plan.targets})
    found = prune_model(model, tokens(), plan, "wanda", None, 3)
    assert found.keys() == expected.keys()
    for module, mask in expected.items():
        assert torch.equal(found[module].mask, mask), module
        assert not find_decoder_stack(model).all_linears()[module].weight[~mask].any()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_streamed_as_in_memory_and_written_back(
    name: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(name).save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(planning, "calibration_set", lambda *args, **more: CalibrationSet(tokens(), "given", 0))
    prune(
        str(tmp_path / "dense"), tmp_path / "out", PruneOptions(sparsity=0.5, method=method), RunOptions(device="cpu")
    )
    assert inspect_checkpoint(tmp_path / "out").problems == []
    model = load_model(tmp_path / "dense")
    plan = allocate(model, None, 0.5, None, "uniform", ALLOCATORS.get("uniform").make_options())
    from sparsedeploy.pruning import PRUNERS

    prune_model(model, tokens(), plan, method, PRUNERS.get(method).make_options(), 2)
    streamed = load_model(tmp_path / "out")
    for (path, one), (_, other) in zip(model.named_parameters(), streamed.named_parameters(), strict=True):
        assert torch.equal(one, other), path


@torch.no_grad()
def oracle(model: PreTrainedModel, rows: torch.Tensor, zeros: dict[str, int]) -> dict[str, torch.Tensor]:
    """|W| * sqrt(sum x^2) from whole passes, layer after layer with the pruned weights in place."""
    masks = {}
    model.set_experts_implementation("eager") if hasattr(model, "set_experts_implementation") else None
    stack = find_decoder_stack(model)
    for index, layer in enumerate(stack.layers):
        linears = prunable_linears(stack.layer_name(index), layer)
        squares = {name: torch.zeros(linear.in_features) for name, linear in linears.items()}
        for row in rows:
            with recorded(layer, linears, squares):
                model(input_ids=row[None], use_cache=False)
        for name, linear in linears.items():
            total = squares[name] if squares[name].any() else torch.ones_like(squares[name])
            order = (linear.weight.abs() * total.sqrt()).argsort(dim=1, stable=True)
            mask = torch.ones(linear.weight.shape, dtype=torch.bool)
            mask.scatter_(1, order[:, : zeros[name]], False)
            linear.weight.mul_(mask)
            masks[name] = mask
    return masks


class recorded:
    """Sum up what enters each product of a layer, found by the values of its weight."""

    def __init__(self, layer: nn.Module, linears: dict[str, Any], squares: dict[str, torch.Tensor]) -> None:
        self.inside = False
        self.layer, self.linears, self.squares = layer, linears, squares

    def __enter__(self) -> None:
        self.originals = {"linear": F.linear, "matmul": torch.Tensor.__matmul__, "bmm": torch.bmm, "addmm": torch.addmm}
        self.handles = [
            self.layer.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            self.layer.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        ]

        def product(call: Any, at: int, turned: bool) -> Any:
            def wrapper(*args: Any, **more: Any) -> Any:
                if self.inside:
                    self.add(args[at], args[at + 1], turned)
                return call(*args, **more)

            return wrapper

        F.linear = product(self.originals["linear"], 0, False)
        torch.Tensor.__matmul__ = product(self.originals["matmul"], 0, True)  # type: ignore[method-assign]
        torch.bmm = product(self.originals["bmm"], 0, True)
        torch.addmm = product(self.originals["addmm"], 1, True)

    def __exit__(self, *args: object) -> None:
        F.linear, torch.bmm = self.originals["linear"], self.originals["bmm"]
        torch.Tensor.__matmul__ = self.originals["matmul"]  # type: ignore[method-assign]
        torch.addmm = self.originals["addmm"]
        for handle in self.handles:
            handle.remove()

    def add(self, inputs: torch.Tensor, weight: torch.Tensor, turned: bool) -> None:
        pairs = [(inputs, weight)] if weight.dim() == 2 else list(zip(inputs, weight, strict=False))
        for x, stored in pairs:
            w = stored.T if turned else stored
            for name, linear in self.linears.items():
                if linear.weight.shape == w.shape and torch.equal(linear.weight, w):
                    self.squares[name] += x.reshape(-1, x.shape[-1]).square().sum(dim=0)
