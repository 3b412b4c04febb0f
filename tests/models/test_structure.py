"""Decoder layers and linears are found by structure in every family."""

import pytest
import torch
from torch import nn

from sparsedeploy.errors import UserError
from sparsedeploy.models.structure import check_finite, find_decoder_stack
from tests.small_models import FAMILIES, random_model


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_layers_and_leaves_head_and_embeddings_alone(family: str) -> None:
    model = random_model(family)
    stack = find_decoder_stack(model)
    assert len(stack.layers) == model.config.num_hidden_layers
    linears = stack.all_linears()
    assert len(linears) == 2 * (6 if family == "opt" else 7)
    assert not any("lm_head" in name or "embed" in name for name in linears)
    for name, linear in linears.items():
        assert model.get_submodule(name) is linear


def test_inner_lists_do_not_hide_the_layers() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(8)])

    model = nn.Module()
    model.blocks = nn.ModuleList([Layer()])
    assert find_decoder_stack(model).name == "blocks"


def test_weights_outside_linears_are_refused() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 8)
            self.kernels = nn.Parameter(torch.ones(32, 32))

    with pytest.raises(UserError, match=r"keep 94% of their weights outside linears"):
        find_decoder_stack(nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_named(value: float) -> None:
    weight = torch.ones(3, 3)
    weight[1, 2] = value
    with pytest.raises(UserError, match=r"layers\.0\.q_proj"):
        check_finite("layers.0.q_proj", weight)
