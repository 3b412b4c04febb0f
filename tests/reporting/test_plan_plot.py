"""Plans as tables, bars and pictures."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from sparsedeploy.errors import UserError
from sparsedeploy.plan import NM, ModuleTarget, SparsityPlan
from sparsedeploy.reporting.plan_plot import bar, plan_table, profile, save_plot


def plan(rates: list[list[int]], pattern: list[NM] | None = None) -> SparsityPlan:
    """Zeros per row of two modules (8 x 16 and 4 x 16) in each layer."""
    targets = []
    for layer, (a, b) in enumerate(rates):
        nm = pattern[layer] if pattern else None
        targets.append(ModuleTarget(f"model.layers.{layer}.attn.q", 8, 16, a, nm))
        targets.append(ModuleTarget(f"model.layers.{layer}.mlp.up", 4, 16, b, nm))
    return SparsityPlan(0.5, "unstructured", "test", tuple(targets))


def test_profile_weighs_by_size_and_notes_spread() -> None:
    one = profile(plan([[8, 8], [12, 0]]))
    assert one.layers == pytest.approx([0.5, 0.5])
    assert one.modules == {"attn.q": [0.5, 0.75], "mlp.up": [0.5, 0.0]}
    assert one.varies_within_layers
    assert not profile(plan([[8, 8], [4, 4]])).varies_within_layers
    assert profile(plan([[12, 12], [8, 8]], [NM(2, 8), NM(4, 8)])).kept == ["2:8", "4:8"]


def test_bars_are_proportional() -> None:
    assert bar(0.5, 10) == "█████     "
    assert bar(0.0, 4) == "    "
    assert bar(1.2, 4) == "████"
    assert bar(0.55, 10) == "█████▌    "


@pytest.mark.parametrize("width", [60, 80, 200])
def test_every_figure_is_shown_at_any_width(width: int) -> None:
    plans = {f"plan-{i}": plan([[8, 8], [4, 4], [12, 12]]) for i in range(4)}
    plans["short"] = plan([[8, 8]])
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_table(plans, width))
    text = console.export_text()
    assert text.count("0.250") == 4
    assert text.count("0.500") == 5
    assert "…" not in text


PLANS = {"flat": plan([[8, 8], [4, 4]]), "<spread>": plan([[12, 0], [8, 8]])}


def test_picture_as_svg(tmp_path: Path) -> None:
    save_plot(PLANS, tmp_path / "plans.svg")
    root = ElementTree.parse(tmp_path / "plans.svg").getroot()
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"flat", "<spread>", "<spread>: sparsity by module", "q", "up"} <= texts
    assert {element.text for element in root.iter("{http://www.w3.org/2000/svg}title")} >= {
        "up, 0: 0.000",
        "q, 1: 0.500",
    }


def test_picture_as_png(tmp_path: Path) -> None:
    save_plot(PLANS, tmp_path / "plans.png")
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither \.svg nor \.png"):
        save_plot(PLANS, tmp_path / "plans.pdf")
    assert not list(tmp_path.iterdir())
