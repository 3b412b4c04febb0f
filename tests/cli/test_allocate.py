"""``allocate`` writes a plan, ``prune --plan`` follows it, ``inspect`` compares plans."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsedeploy.plan import SparsityPlan
from sparsedeploy.registry import ALLOCATORS, PRUNERS, RECOVERIES, TARGETS
from tests.cli.conftest import Outcome, defaults
from tests.small_models import save_model

Cli = Callable[..., Outcome]


def allocate(cli: Cli, model: Path, text: Path, *more: object, output: str = "plan.json") -> Outcome:
    reads = {"owl", "dlp", "lsa", "rmi", "search=true", "rule=marginal"} & {str(word) for word in more}
    data = defaults(more, data=text, samples=4, calibration_length=32) if reads else ()
    return cli("allocate", model, "-o", model.parent / output, *data, "--device", "cpu", *more)


def test_a_plan_is_written_shown_and_followed(cli: Cli, model: Path, text: Path) -> None:
    outcome = allocate(cli, model, text, "-a", "lsa", "--allocation-option", "granularity=projection", "-s", 0.6)
    assert outcome.code == 0, outcome.err
    assert "0.60000" in outcome.out
    assert "█" in outcome.out
    plan = SparsityPlan.load(model.parent / "plan.json")
    assert (plan.allocation, plan.options["granularity"]) == ("lsa", "projection")
    pruned = model.parent / "out"
    outcome = cli("prune", model, "-o", pruned, "--plan", model.parent / "plan.json", "-m", "magnitude")
    assert outcome.code == 0, outcome.err
    manifest = json.loads((pruned / "sparsity.json").read_text())
    assert manifest["plan"]["modules"] == plan.to_dict()["modules"]
    for name, entry in manifest["modules"].items():
        assert entry["zeros"] == plan.by_name[name].zeros


def test_the_plan_is_what_prune_would_follow(cli: Cli, model: Path, text: Path) -> None:
    shared = ("-a", "dlp", "-p", "mixed-2:8", "--pattern-option", "strength=3", "-n", 4, "--calibration-length", 32)
    outcome = allocate(cli, model, text, *shared, "--json")
    assert json.loads(outcome.out)["pattern"] == "mixed-2:8"
    pruned = model.parent / "out"
    outcome = cli("prune", model, "-o", pruned, "--data", text, *shared, "-m", "magnitude")
    assert outcome.code == 0, outcome.err
    manifest = json.loads((pruned / "sparsity.json").read_text())
    plan = json.loads((model.parent / "plan.json").read_text())
    assert manifest["plan"] == plan
    assert plan["details"]["mixed"]["strength"] == 3
    assert cli("inspect", pruned).code == 0


def test_beta_search_prunes_copies_and_keeps_its_table(cli: Cli, model: Path, text: Path) -> None:
    options = ("search=true", "trials=3", "patience=0", "windows=2")
    more = [item for option in options for item in ("--allocation-option", option)]
    outcome = allocate(cli, model, text, "-a", "atp", *more, "-s", 0.6, "-m", "magnitude")
    assert outcome.code == 0, outcome.err
    plan = SparsityPlan.load(model.parent / "plan.json")
    trials = plan.details["search"]["trials"]
    assert [trial["beta"] for trial in trials] == pytest.approx([0, 0.8 / 3, 1.6 / 3, 0.8])
    best = min(trials, key=lambda trial: trial["perplexity"])
    assert plan.options["beta"] == plan.details["beta"] == best["beta"]
    assert plan.details["search"]["selection"] == "validation"
    assert "beta  perplexity" in outcome.err
    assert "prune (magnitude)" not in outcome.err  # the trials' own bars would break the table up
    pruned = model.parent / "out"
    outcome = cli(
        "prune", model, "-o", pruned, "--data", text, "-n", 4, "-a", "atp", *more, "-s", 0.6, "-m", "magnitude"
    )
    assert outcome.code == 0, outcome.err


def test_plans_and_checkpoints_side_by_side(cli: Cli, model: Path, text: Path) -> None:
    assert cli("allocate", model, "-o", model.parent / "atp.json", "-a", "atp", "-s", 0.6).code == 0
    allocate(cli, model, text, "-p", "mixed-2:4", "-a", "owl", output="owl.json")
    pruned = model.parent / "out"
    cli("prune", model, "-o", pruned, "-s", 0.5, "-m", "magnitude")
    subjects = (model.parent / "atp.json", model.parent / "owl.json", pruned)
    image = model.parent / "plots" / "plans.png"
    outcome = cli("inspect", *subjects, "--plot", image)
    assert outcome.code == 0, outcome.err
    assert all(word in outcome.out for word in ("atp", "owl", "out", "mixed-2:4", "layer"))
    assert image.read_bytes().startswith(b"\x89PNG")
    outcome = cli("inspect", subjects[0], "--json")
    assert json.loads(outcome.out)["atp"]["allocation"] == "atp"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-s", "0.995", "-a", "atp"], "cannot be met with rates between 0 and 0.99"),
        (
            ["-s", "0.6", "-a", "atp", "--allocation-option", "beta=0.9"],
            "beta 0.9 pushes the sparsity of some of the 2 layers around 0.6 outside",
        ),
        (
            ["-s", "0.6", "-a", "atp", "--allocation-option", "beta=nan"],
            "option beta is 'nan'. It takes a finite number",
        ),
        (
            ["-s", "0.6", "-a", "owl", "--allocation-option", "strength=-1"],
            "option strength is '-1'. It takes a finite number of at least 0",
        ),
        (["-s", "0.6", "-a", "dlp", "--allocation-option", "reduce=max"], "option reduce is 'max'. It takes median or"),
        (["-s", "0.6", "-a", "lsa", "--allocation-option", "granularity=row"], "granularity is 'row'"),
        (["-p", "mixed-9:8"], "pattern mixed-9:8 keeps 9 of 8 on average"),
        (["-p", "mixed-2:8", "--pattern-option", "n_min=3"], "an average of 2 kept cannot be met with N from 3 to 8"),
        (["-p", "mixed-2:8", "--pattern-option", "n_max=1"], "cannot be met with N from 1 to 1"),
        (["-p", "mixed-2:8", "--pattern-option", "nmax=1"], "a mixed pattern has no option 'nmax'"),
        (["-p", "mixed-2:8", "-s", "0.5"], "pattern mixed-2:8 keeps 2 of 8: 0.75 sparsity, not 0.5"),
        (["-p", "mixed-2:6"], "not divisible by the 6 of"),
        (["-p", "mixed-2:6", "--pattern-option", "rule=marginal"], "32 inputs are not divisible by 6"),
        (["-p", "2:4", "--pattern-option", "n_min=1"], "pattern 2:4 has no options"),
        (["-s", "0.6", "-a", "rmi", "-n", "1"], "RMI compares calibration sequences and there is only one"),
        (["-s", "0.6", "-a", "owl", "--data", "nowhere"], "no text at 'nowhere'"),
    ],
)
def test_bad_input(cli: Cli, model: Path, text: Path, options: list[str], message: str) -> None:
    outcome = allocate(cli, model, text, *options)
    assert outcome.code == 2, outcome.err
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert errors[0].count(". ") >= 1, "the line names no fix"
    assert not list(model.parent.glob("*plan.json*"))


def test_existing_output_is_kept(cli: Cli, model: Path, text: Path) -> None:
    (model.parent / "plan.json").write_text("mine")
    assert "exists" in allocate(cli, model, text, "-a", "owl", "-s", 0.5).err
    assert (model.parent / "plan.json").read_text() == "mine"
    assert allocate(cli, model, text, "-a", "owl", "-s", 0.5, "--overwrite").code == 0
    assert "is a folder" in cli("allocate", model, "-o", model, "-s", 0.5).err


def test_a_plan_with_other_modules(cli: Cli, model: Path, text: Path) -> None:
    allocate(cli, model, text, "-a", "owl", "-s", 0.5)
    path, out = model.parent / "plan.json", model.parent / "out"
    plan = json.loads(path.read_text())
    other = save_model(model.parent / "other", seed=1)
    outcome = cli("prune", other, "-o", out, "--plan", path, "-m", "magnitude")
    assert (outcome.code, out.exists()) == (2, False)
    assert "the plan was made for another model (its hash differs)" in outcome.err
    plan["modules"].append({**plan["modules"][0], "name": "model.layers.9.mlp.up_proj"})
    path.write_text(json.dumps(plan))
    outcome = cli("prune", model, "-o", out, "--plan", path, "-m", "magnitude")
    assert (outcome.code, out.exists()) == (2, False)
    assert "the plan names 1 modules that the model lacks, such as model.layers.9.mlp.up_proj" in outcome.err


def test_inspect_refuses_what_is_no_plan(cli: Cli, model: Path, text: Path) -> None:
    allocate(cli, model, text, "-a", "owl", "-s", 0.5)
    plan = model.parent / "plan.json"
    assert "plot plan.jpg is neither .svg nor .png" in cli("inspect", plan, "--plot", "plan.jpg").err
    assert "no plan at nowhere.json" in cli("inspect", plan, "nowhere.json").err
    assert "is not valid JSON" in cli("inspect", plan, text).err


@pytest.mark.parametrize("command", ["allocate", "prune", "recover", "export"])
def test_help_names_every_method(cli: Cli, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    words = " ".join(cli(command, "--help").out.replace("│", " ").split())
    registries = {"allocate": [ALLOCATORS, PRUNERS], "prune": [ALLOCATORS, PRUNERS, RECOVERIES]}
    for registry in registries.get(command, [RECOVERIES if command == "recover" else TARGETS]):
        *first, last = registry.names()
        assert f"{', '.join(first)} or {last}" in words
