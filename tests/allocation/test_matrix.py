"""Every allocation x pruner x pattern, from the registries, on three architectures: it works or is refused clearly."""

import copy
import itertools
from dataclasses import asdict

import pytest
import torch
from torch import nn

from sparsedeploy.allocation import MixedOptions, allocate, model_layers
from sparsedeploy.calibration.samples import CalibrationSet
from sparsedeploy.errors import UserError
from sparsedeploy.masks import broken_groups
from sparsedeploy.plan import MixedNM, SparsityPlan, parse_pattern
from sparsedeploy.pruning.layers import prune_model
from sparsedeploy.registry import ALLOCATORS, PRUNERS
from tests.small_models import VOCABULARY, random_model

FAMILIES = ("llama", "qwen3", "opt")  # grouped-query attention with k and v of other sizes; head norms; biases
# What else an allocation's options make of it.
VARIANTS = {
    "dlp": [{"reduce": "mean"}],
    "alphapruning": [{"metric": "alpha_mid"}, {"lower_bound": "intended"}, {"granularity": "projection"}],
    "lsa": [
        {"granularity": "block"},
        {"granularity": "block", "block_unit": "true"},
        {"granularity": "projection", "group": "16"},
    ],
    "rmi": [{"feature": "output"}],
}
# A search prunes whole models; it has tests of its own.
MEASURING = [name for name in ALLOCATORS.names() if ALLOCATORS.get(name).traits.get("searches") is not True]
ALLOCATIONS = [
    pytest.param(name, values, id="-".join([name, *values.values()]))
    for name in MEASURING
    for values in [{}, *VARIANTS.get(name, [])]
]
PATTERNS = ("unstructured", "2:4", "mixed-2:4", "mixed-2:8")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str) -> nn.Module:
    model = random_model(family, num_hidden_layers=3)
    with torch.no_grad():  # random layers are all alike: make them tell apart
        for index, layer in enumerate(model.get_submodule("model.decoder" if family == "opt" else "model").layers):
            for parameter in layer.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(1 + index)
                    parameter[:, : 2 + index] *= 4
    return model


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    return CalibrationSet(torch.randint(VOCABULARY, (4, 24), generator=generator), "random", 0)


def plan_of(
    model: nn.Module,
    calibration: CalibrationSet | None,
    name: str,
    values: dict[str, str],
    pattern: str = "unstructured",
    batch_size: int = 1,
    mixed: MixedOptions | None = None,
) -> SparsityPlan:
    options = ALLOCATORS.get(name).make_options(values)
    parsed = parse_pattern(pattern)
    sparsity = 0.6 if parsed is None else parsed.sparsity
    tokens = calibration.tokens if calibration else None
    return allocate(model, tokens, sparsity, parsed, name, options, mixed=mixed, batch_size=batch_size)


def is_exact(plan: SparsityPlan, model: nn.Module) -> bool:
    """Within one row-unit; a mixed pattern within one step of N in one unit, and never above its average."""
    missing = sum(target.zeros for target in plan.targets) - plan.sparsity * sum(t.size for t in plan.targets)
    if plan.pattern.startswith("mixed"):
        unit = max(sum(module.size for module in layer) for layer in model_layers(model))
        return -1e-6 <= missing <= unit / int(plan.pattern.rpartition(":")[2])
    return abs(missing) < max(target.rows for target in plan.targets)


@pytest.mark.parametrize(("name", "values"), ALLOCATIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_plans(model: nn.Module, calibration: CalibrationSet, name: str, values: dict[str, str], pattern: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if pattern == "2:4" and name != "uniform":
        with pytest.raises(UserError, match="which the fixed pattern 2:4 cannot hold") as error:
            plan_of(model, calibration, name, values, pattern)
        assert "--pattern mixed-2:4" in str(error.value)
        return
    plan = plan_of(model, calibration, name, values, pattern)
    assert is_exact(plan, model)
    assert plan_of(model, calibration, name, values, pattern) == plan  # deterministic
    assert plan_of(model, calibration, name, values, pattern, batch_size=4).targets == plan.targets
    if name != "uniform" and pattern != "2:4":
        kept = {t.pattern if t.pattern else t.zeros_per_row / t.columns for t in plan.targets}
        assert len(kept) > 1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert SparsityPlan.from_dict(plan.to_dict()).targets == plan.targets


@pytest.mark.parametrize("name", [n for n in MEASURING if ALLOCATORS.get(n).traits["strength"]])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_strength_is_uniform(model: nn.Module, calibration: CalibrationSet, name: str, pattern: str) -> None:
    values = {ALLOCATORS.get(name).traits["strength"]: "0"}
    for more in [{}, *VARIANTS.get(name, [])]:
        plan = plan_of(model, calibration, name, values | more, pattern)
        uniform = plan_of(model, None, "uniform", {}, pattern)
        if pattern == "unstructured":  # which row-units take the rounding depends on the last bits of the rates
            assert all(
                abs(t.zeros_per_row - u.zeros_per_row) <= 1 for t, u in zip(plan.targets, uniform.targets, strict=True)
            )
        else:
            assert plan.targets == uniform.targets


def test_the_marginal_rule_with_any_allocation(model: nn.Module, calibration: CalibrationSet) -> None:
    mixed = MixedOptions(rule="marginal")
    for name in MEASURING:
        plan = plan_of(model, calibration, name, {}, "mixed-2:8", mixed=mixed)
        assert is_exact(plan, model)
        assert plan_of(model, calibration, name, {}, "mixed-2:8", 4, mixed).targets == plan.targets
    with pytest.raises(UserError, match="needs calibration text and none was given"):
        plan_of(model, None, "uniform", {}, "mixed-2:8", mixed=mixed)


@pytest.mark.parametrize(
    ("name", "method", "pattern"),
    [
        case
        for case in itertools.product(MEASURING, PRUNERS.names(), PATTERNS)
        if case[0] == "uniform" or case[2] != "2:4"
    ],
)
def test_pruning_follows_the_plan(
    model: nn.Module, calibration: CalibrationSet, name: str, method: str, pattern: str
) -> None:
    plan = plan_of(model, calibration, name, {}, pattern)
    options = PRUNERS.get(method).make_options()
    pruned, results = copy.deepcopy(model), []
    for batch_size in (1, 4):
        pruned = copy.deepcopy(model)
        results.append(prune_model(pruned, calibration.tokens, plan, method, options, batch_size))
    for target in plan.targets:
        mask = results[1][target.name].mask
        assert int((~mask).sum()) == target.zeros
        assert torch.equal(mask, results[0][target.name].mask)  # no effect of the batch size
        assert not pruned.get_submodule(target.name).weight[~mask].any()
        if isinstance(parse_pattern(pattern), MixedNM) or pattern == "2:4":
            assert target.pattern is not None
            assert broken_groups(mask, target.pattern.n, target.pattern.m) == 0


def test_data_free_allocations_ask_for_no_text(model: nn.Module) -> None:
    for method in map(ALLOCATORS.get, MEASURING):
        if method.traits["needs"] in ("none", "weights"):
            assert is_exact(plan_of(model, None, method.name, {}), model)
        else:
            with pytest.raises(UserError, match="needs calibration text and none was given"):
                plan_of(model, None, method.name, {})


def test_options_are_kept_with_the_plan(model: nn.Module, calibration: CalibrationSet) -> None:
    for method in map(ALLOCATORS.get, MEASURING):
        assert plan_of(model, calibration, method.name, {}).options == asdict(method.make_options())
