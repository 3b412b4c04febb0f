"""The spread of right computations: rounding as engines do it, and the exact answer of a model of 16-bit weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sparsedeploy.artifacts.known_answer import KnownAnswer, distance, tolerance
from sparsedeploy.targets.check import answer_again, reference_logits
from sparsedeploy.targets.spread import GROUP, in_float32, rounded, spread_of, to_groups, to_type
from tests.small_models import FAMILIES, random_model


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("width", [GROUP, 3 * GROUP, 88])
def test_groups_have_255_levels(width: int) -> None:
    x = torch.randn(5, width, generator=generator())
    x[0, :GROUP] = 0
    x[1, 3] = 1000
    found = to_groups(x, generator())
    assert found.shape == x.shape
    assert torch.equal(found[0, :GROUP], x[0, :GROUP])
    for start in range(0, width, GROUP):
        part, scale = x[:, start : start + GROUP], x[:, start : start + GROUP].abs().amax(1, keepdim=True) / 127
        assert ((found[:, start : start + GROUP] - part).abs() <= 0.501 * scale).all()
    # The numbers beside a large one lose nearly all that they say; those of other groups do not.
    assert (found[1, :GROUP] - x[1, :GROUP]).abs().max() > 0.5


def test_types_of_16_bits() -> None:
    x = torch.randn(5, 40, generator=generator())
    for dtype in (torch.float16, torch.bfloat16):
        found = to_type(dtype)(x, generator())
        assert torch.equal(found.to(dtype).float(), found)
        assert 0 < (found / x - 1).abs().max() <= 1.01 * torch.finfo(dtype).eps


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_16_bit_weights_in_float32(family: str) -> None:
    """Its logits are those of the converted model, and nothing of it is changed afterwards."""
    model = random_model(family).to(torch.bfloat16).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with in_float32(model):
        reference = reference_logits(model)
    assert np.abs(answer_again(copy.deepcopy(model).float(), reference) - reference.answer[1]).max() < 1e-5
    assert {name: tensor.dtype for name, tensor in before.items()} == {
        n: t.dtype for n, t in model.state_dict().items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert np.abs(answer_again(model, reference) - reference.answer[1]).max() > 1e-5


@pytest.mark.parametrize("rounding", ["bfloat16", "float16", "groups"])
def test_right_computations_stay_within_and_wrong_ones_do_not(rounding: str) -> None:
    """Other roundings of the same kind, and none, against one column of one weight with the wrong sign."""
    model = random_model("llama", num_hidden_layers=3, hidden_size=64).requires_grad_(False)
    for parameter in model.parameters():  # as far from zero as a trained model's
        parameter.mul_(8 if parameter.dim() > 1 else 1)
    linears: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    way = to_groups if rounding == "groups" else to_type(getattr(torch, rounding))
    reference = reference_logits(model)
    spread = spread_of(model, reference, rounded(dict.fromkeys(linears, way)))
    tokens, logits = reference.answer
    answer = KnownAnswer(tokens, np.arange(logits.shape[1]), logits, spread)

    def passes(rows: int) -> bool:
        difference, allowed = distance(answer, answer_again(model, reference)[:rows], tolerance("float32"))
        return difference <= allowed

    assert passes(len(tokens))
    others = torch.Generator().manual_seed(99)
    handles = [each.register_forward_pre_hook(lambda _, given: (way(given[0], others), *given[1:])) for each in linears]
    assert all(passes(rows) for rows in (1, 2, 10, len(tokens)) for _ in range(3))
    model.get_parameter("model.layers.1.mlp.gate_proj.weight")[:, 5] *= -1
    assert not passes(len(tokens))
    for handle in handles:
        handle.remove()
    assert not passes(len(tokens))


def test_a_difference_that_is_told_in_part() -> None:
    """An engine may tell only the likeliest logits: their differences count as much as all would."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((8, 3000)).astype(np.float32)
    answer = KnownAnswer(np.arange(8), np.arange(3000), logits, np.full(8, 0.02))
    for size, right in ((0.02, True), (0.06, False)):
        found = logits + size * random.standard_normal(logits.shape).astype(np.float32)
        partly = np.where(found >= np.sort(found, axis=1)[:, -200:-199], found, -np.inf)
        for each in (found, partly):
            difference, allowed = distance(answer, each, tolerance("float32"))
            assert (difference <= allowed) == right
