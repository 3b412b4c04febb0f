"""The layer driver against the model's own forward pass, for every family, with several sequences per batch."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsedeploy.calibration import arguments
from sparsedeploy.calibration.driver import LayerDriver
from sparsedeploy.calibration.statistics import InputStatistics
from sparsedeploy.errors import UserError
from tests.families import small_model
from tests.oracle import Weight, sums_of_squares
from tests.small_models import FAMILIES, VOCABULARY, random_model


def tokens(sequences: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCABULARY - 3, (sequences, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_statistics_equal_those_of_full_forward_passes(family: str, batch_size: int) -> None:
    model = random_model(family)
    batch = tokens()
    driver = LayerDriver(model, batch, batch_size=batch_size)
    got = {
        name: statistics.hessian
        for layer in driver.iterate("hessian", changes_weights=False)
        for name, statistics in layer.statistics.items()
    }
    expected: dict[str, torch.Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].double().reshape(-1, args[0].shape[-1])
            expected[name] = expected.get(name, 0) + 2 / len(batch) * x.T @ x

        return hook

    for name, linear in driver.stack.all_linears().items():
        linear.register_forward_pre_hook(record(name))
    with torch.no_grad():
        for row in batch:  # one by one: the model's own batching must not matter either
            model(input_ids=row[None], use_cache=False)
    assert list(got) == list(driver.stack.all_linears())
    for name, hessian in got.items():
        torch.testing.assert_close(hessian.double(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_statistics_are_bit_identical_on_any_batch_size(family: str) -> None:
    model = random_model(family)
    runs = [
        [
            stats.hessian
            for layer in LayerDriver(model, tokens(), batch_size=size).iterate("hessian", changes_weights=False)
            for stats in layer.statistics.values()
        ]
        for size in (1, 3, 5)
    ]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_modules_with_one_input_share_one_statistic() -> None:
    driver = LayerDriver(random_model("llama"), tokens())
    layer = next(iter(driver.iterate("sum_squares", changes_weights=False)))
    by_object: dict[int, set[str]] = {}
    for name, statistics in layer.statistics.items():
        by_object.setdefault(id(statistics), set()).add(name.rpartition(".")[2])
    assert {"q_proj", "k_proj", "v_proj"} in by_object.values()
    assert {"gate_proj", "up_proj"} in by_object.values()
    assert len(by_object) == 4


def test_a_changed_layer_changes_the_next_ones_inputs() -> None:
    seen = []
    for layer in LayerDriver(random_model("llama"), tokens()).iterate("sum_squares", changes_weights=True):
        seen.append(layer.inputs.clone())
        for linear in layer.linears.values():
            linear.weight.data.zero_()
    # With every linear of layer 0 at zero, the residual stream passes through unchanged.
    torch.testing.assert_close(seen[1], seen[0])


def test_the_diagonal_of_the_hessian_is_twice_the_mean_square() -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    full, diagonal = InputStatistics(5, "hessian", x.device), InputStatistics(5, "sum_squares", x.device)
    full.add(x, 3)
    diagonal.add(x, 3)
    torch.testing.assert_close(full.hessian.diagonal(), 2 * diagonal.mean_square)
    torch.testing.assert_close(full.mean_square, diagonal.mean_square)
    torch.testing.assert_close(diagonal.mean_square, x.square().sum(dim=(0, 1)) / 3)


def test_activations_that_overflow_are_refused() -> None:
    model = random_model("llama")
    model.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj overflow or hold NaN"):
        next(iter(LayerDriver(model, tokens()).iterate("sum_squares", changes_weights=False)))


def test_a_model_in_training_mode_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        LayerDriver(random_model("opt").train(), tokens())


def test_a_linear_that_is_called_twice_counts_both_inputs() -> None:
    model = random_model("llama")
    for layer in model.model.layers:
        mlp, once = layer.mlp, layer.mlp.forward
        mlp.forward = lambda x, mlp=mlp, once=once: once(x) + mlp.down_proj(2 * mlp.up_proj(x))
    batch = tokens()
    names = list(LayerDriver(model, batch).stack.all_linears())
    with torch.no_grad(), sums_of_squares([Weight(model, name) for name in names]) as expected:
        for row in batch:
            model(input_ids=row[None], use_cache=False)
    for size in (1, 3):
        driver = LayerDriver(model, batch, batch_size=size)
        for layer in driver.iterate("sum_squares", changes_weights=True):
            for name, statistics in layer.statistics.items():
                torch.testing.assert_close(
                    len(batch) * statistics.mean_square.double(), expected[name], rtol=1e-5, atol=1e-6
                )


def test_a_model_that_changes_what_passes_between_layers_is_refused() -> None:
    class Scaled(nn.Module):
        def __init__(self, layers: nn.ModuleList) -> None:
            super().__init__()
            self.layers = layers
            self.embed = nn.Embedding(VOCABULARY, 8)

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            hidden = self.embed(input_ids)
            for layer in self.layers:
                hidden = 2 * layer(hidden)
            return hidden

    model = Scaled(nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])).eval()
    with pytest.raises(UserError, match=r"changes what layers\.0 returns before layers\.1 takes it"):
        next(iter(LayerDriver(model, tokens()).iterate("sum_squares", changes_weights=False)))


def test_arguments_that_depend_on_the_text_and_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names how many sequences fit, and so many do; what all sequences share needs no room."""
    per_layer = small_model("gemma4_text")  # inputs of 8 numbers for each layer and token
    one, six = 5 * 24 * 8 * 4, tokens(6) % 90
    monkeypatch.setattr(arguments, "free_bytes", lambda device: 2 * 2 * one)
    with pytest.raises(UserError, match="depends on the text") as caught:
        list(LayerDriver(per_layer, six, batch_size=1).hidden_states())
    (fitting,) = re.findall(r"at most --samples (\d+)", str(caught.value.fix))
    assert int(fitting) == 3
    assert len(list(LayerDriver(per_layer, six[:3], batch_size=1).hidden_states())) == 5
    monkeypatch.setattr(arguments, "free_bytes", lambda device: 0)
    assert len(list(LayerDriver(random_model("llama"), tokens(6), batch_size=1).hidden_states())) == 2
