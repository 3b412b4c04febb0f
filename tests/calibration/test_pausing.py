"""True sequential: one pass that pauses before each linear gives what a pass for every linear would give."""

import pytest
import torch
from torch import nn

from sparsedeploy.calibration.driver import LayerDriver
from sparsedeploy.calibration.pausing import pauses
from sparsedeploy.errors import UserError
from tests.small_models import FAMILIES, VOCABULARY, random_model

TOKENS = torch.randint(0, VOCABULARY - 3, (5, 24), generator=torch.Generator().manual_seed(1))


def halve(linear: nn.Linear) -> None:
    """Some change of a weight that depends on nothing but the weight."""
    linear.weight.data = linear.weight * (linear.weight.abs() > linear.weight.abs().median())


def in_one_pass(family: str, batch_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, list[bool]]:
    """The Hessian that each linear sees, the states that leave the last layer, and which views were the last ones."""
    driver = LayerDriver(random_model(family), TOKENS, batch_size=batch_size)
    seen: dict[str, torch.Tensor] = {}
    complete = []
    for view in driver.walk("hessian", changes_weights=True, true_sequential=True):
        (name,) = view.linears
        seen[name] = view.statistics[name].hessian
        halve(view.linears[name])
        complete.append(view.complete)
        states = view.inputs
    return seen, states, complete


@pytest.mark.parametrize("family", FAMILIES)
def test_each_linear_sees_what_the_changed_ones_before_it_give(family: str) -> None:
    seen, states, complete = in_one_pass(family, 2)
    model = random_model(family)
    driver = LayerDriver(model, TOKENS, batch_size=2)
    assert set(seen) == set(driver.stack.all_linears())
    per_layer = len(seen) // len(driver)
    assert complete == ([False] * (per_layer - 1) + [True]) * len(driver)
    linears = driver.stack.all_linears()
    for name, hessian in seen.items():  # the plain way: a pass of the whole model for every linear
        layer = driver.stack.layer_name(0).count(".") + 1
        index = int(name.split(".")[layer - 1])
        views = LayerDriver(model, TOKENS, batch_size=2).walk("hessian", changes_weights=False)
        view = next(view for view in views if view.index == index)
        assert torch.equal(view.statistics[name].hessian, hessian)
        halve(linears[name])
    *_, last = LayerDriver(model, TOKENS, batch_size=2).states()
    assert torch.equal(states, last)


def test_the_batch_size_does_not_matter() -> None:
    one, many = in_one_pass("llama", 1)[0], in_one_pass("llama", 3)[0]
    assert all(torch.equal(one[name], many[name]) for name in one)


class Routed(nn.Module):
    """Batches with a positive first entry go by the first expert, all by the second, the others then by the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        experts = (self.first, self.second) if x[0] > 0 else (self.second, self.first)
        for expert in experts:
            x = expert(x)
        return x


def test_a_token_that_comes_too_late_is_refused() -> None:
    layer = Routed()
    batches = [lambda: layer(torch.ones(4)), lambda: layer(-torch.ones(4))]
    with pytest.raises(UserError, match="some tokens reach first after others have passed it"):
        list(pauses({"first": layer.first, "second": layer.second}, batches))
    assert not layer.first._forward_pre_hooks


def test_an_error_in_the_layer_arrives() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(pauses({"layer": layer}, [lambda: layer(torch.ones(2, 3))]))
