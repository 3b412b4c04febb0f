"""What ``inspect`` answers: losses, sizes in each format, broken patterns, differences between folders, pictures."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsedeploy.calibration.options import CalibrationOptions
from sparsedeploy.checkpoint import masks as mask_file
from sparsedeploy.checkpoint.comparison import compare_folders
from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.checkpoint.masks import load_masks
from sparsedeploy.checkpoint.sizes import format_sizes, measure
from sparsedeploy.formats import bitmask, nm, quantized
from sparsedeploy.formats.packed import size
from sparsedeploy.plan import NM
from sparsedeploy.reporting.mask_picture import mask_charts
from sparsedeploy.workflows.options import PruneOptions
from sparsedeploy.workflows.prune import prune
from tests.cli.conftest import cli  # noqa: F401 - a fixture
from tests.small_models import save_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspect")
    save_model(place / "dense")
    text = place / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    calibration = CalibrationOptions(data=str(text), sequences=4, length=32)
    prune(str(place / "dense"), place / "gpt", PruneOptions(0.6, "sparsegpt", calibration=calibration))
    prune(str(place / "dense"), place / "magnitude", PruneOptions(0.6, "magnitude"))
    prune(str(place / "dense"), place / "nm", PruneOptions(pattern="2:4", method="magnitude"))
    return place


def test_sizes_are_those_of_packed_tensors() -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 128)
    weight[torch.rand(24, 128) < 0.7] = 0
    two_of_four = torch.randn(24, 128)
    two_of_four.view(24, 32, 4)[..., 2:] = 0
    for dense, pattern in ((weight, None), (two_of_four, NM(2, 4))):
        sizes = {one.name: one.bytes for one in format_sizes([measure(dense != 0)])}
        assert sizes["bitmask, 16-bit values"] == size(bitmask.pack(dense.bfloat16()))
        assert sizes["dense float32"] == dense.numel() * 4
        for bits in (8, 4):
            codes = dense.sign().to(torch.int8)
            packed = quantized.pack(codes, torch.ones(24, 1, dtype=torch.float16), bits, 128)
            assert sizes[f"bitmask, int{bits}"] == size(packed)
        if pattern is not None:
            assert sizes["2:4"] == size(nm.pack(dense.bfloat16(), pattern))
            assert sizes["smallest for each matrix"] == sizes["2:4"]
        else:
            assert sizes["N:4"] is None
            assert sizes["smallest for each matrix"] == sizes["bitmask, 16-bit values"]
        assert sizes["GGUF Q8_0"] == 24 * 4 * 34
    assert {one.name: one.bytes for one in format_sizes([measure(torch.ones(8, 48) > 0)])}["GGUF Q4_0"] is None


def test_layers_that_lost_most(folders: Path) -> None:
    result = inspect_checkpoint(folders / "gpt")
    assert sum(result.losses.values()) == pytest.approx(sum(module.loss or 0 for module in result.modules))
    assert list(result.losses.values()) == sorted(result.losses.values(), reverse=True)
    assert result.losses.keys() == {0, 1}
    assert inspect_checkpoint(folders / "magnitude").losses == {}


def test_a_broken_group_is_counted(folders: Path, tmp_path: Path, cli) -> None:  # noqa: F811
    copy = tmp_path / "nm"
    shutil.copytree(folders / "nm", copy)
    assert "every group of all 14 N:M modules is whole" in cli("inspect", copy).out
    path = copy / mask_file.FILE
    masks = load_file(path)
    name = "model.layers.1.mlp.up_proj"
    masks[name][3, 1] = 0xFF  # two groups of row 3 keep everything
    save_file(masks, path, metadata=mask_file.BIT_ORDER)
    finding = next(module for module in inspect_checkpoint(copy).modules if module.name == name)
    assert (finding.broken, finding.follows) == (2, False)
    outcome = cli("inspect", copy)
    assert outcome.code == 2
    assert f"the N:M pattern is broken in 1 of 14 modules, most in {name}: 2 groups" in outcome.out


def test_difference_from_the_dense_model(folders: Path) -> None:
    found = compare_folders(folders / "magnitude", folders / "dense")
    assert (found.config, found.only, found.shapes, found.overlap) == ({}, ([], []), {}, None)
    assert len(found.changed) == 14
    assert not found.equal
    before, after = (load_file(folders / name / "model.safetensors") for name in ("dense", "magnitude"))
    largest = max((before[name] - after[name]).abs().max().item() for name in before)
    assert found.largest is not None
    assert found.largest.largest == pytest.approx(largest)
    for change in found.changed:
        moved = before[change.name] - after[change.name]
        assert change.changed == int(moved.count_nonzero()) == change.zeros[0] - change.zeros[1]
        assert change.lost == pytest.approx((moved.norm() / before[change.name].norm()).item(), rel=1e-4)
    assert [layer.sparsity[0] for layer in found.layers] == pytest.approx([0.6, 0.6], abs=0.02)
    assert compare_folders(folders / "dense", folders / "dense").equal


def test_overlap_of_masks(folders: Path) -> None:
    found = compare_folders(folders / "gpt", folders / "magnitude")
    columns = {module.name: module.columns for module in inspect_checkpoint(folders / "gpt").modules}
    masks = [load_masks(folders / name / mask_file.FILE, columns) for name in ("gpt", "magnitude")]
    assert found.overlap is not None
    for one in found.overlap:
        pruned = [~mask[one.name] for mask in masks]
        assert one.both == int((pruned[0] & pruned[1]).sum())
        assert one.jaccard == pytest.approx(one.both / int((pruned[0] | pruned[1]).sum()))


def test_config_shapes_and_missing_tensors(folders: Path, tmp_path: Path, cli) -> None:  # noqa: F811
    other = save_model(tmp_path / "other", intermediate_size=96, rope_theta=5e4)
    tensors = load_file(other / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    found = compare_folders(folders / "dense", other)
    assert found.config["intermediate_size"] == (88, 96)
    assert found.only == (["model.layers.1.mlp.up_proj.weight"], [])
    assert found.shapes["model.layers.0.mlp.up_proj.weight"] == ([88, 32], [96, 32])
    outcome = cli("inspect", folders / "dense", "--against", other)
    assert outcome.code == 0
    assert "only in" in outcome.out
    assert "intermediate_size" in outcome.out
    values = json.loads(cli("inspect", folders / "gpt", "--against", folders / "nm", "--json").out)
    assert values["overlap"][0]["jaccard"] <= 1
    assert values["equal"] is False


def test_numbers_that_are_not_finite_are_text(folders: Path, tmp_path: Path, cli) -> None:  # noqa: F811
    other = save_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    odd = {**config, "x": float("nan"), "y": {"z": [float("inf")]}}
    (other / "config.json").write_text(json.dumps(odd))
    outcome = cli("inspect", folders / "dense", "--against", other, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["config"]["x"] == [None, "nan"]
    assert compare_folders(other, other).equal


def test_pictures_of_masks(folders: Path, tmp_path: Path, cli) -> None:  # noqa: F811
    for name in ("m.svg", "m.png"):
        assert cli("inspect", folders / "nm", "--mask", tmp_path / name, "--module", "0.mlp.up_proj").code == 0
    root = ElementTree.parse(tmp_path / "m.svg").getroot()
    text = "".join(root.itertext())
    assert "model.layers.0.mlp.up_proj: 88 x 32, 50.0% kept" in text
    assert "groups of 4, of which 2 stay" in text
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    mask = torch.zeros(512, 1024, dtype=torch.bool)
    mask[:, ::2] = True
    assert sum(len(part) for chart in mask_charts("x", mask, None) for part in chart.parts) < 200_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpt", "--module", "up_proj"), "--module has no effect without --mask"),
        (("gpt", "--mask", "m.svg", "--module", "up_proj"), "not one module alone ends in 'up_proj'. Give more"),
        (("gpt", "--mask", "m.svg", "--module", "nothing"), "no module ends in 'nothing'. Give more"),
        (("gpt", "--mask", "m.jpg"), "is neither .svg nor .png"),
        (("gpt", "nm", "--mask", "m.svg"), "--mask draws a matrix of one pruned folder"),
        (("gpt", "nm", "--against", "dense"), "--against compares one model folder with another"),
        (("gpt", "--against", "text.txt"), "--against compares one model folder with another"),
        (("gpt", "--against", "dense", "--plot", "p.svg"), "--plot has no effect: --against compares"),
    ],
)
def test_refusals(folders: Path, tmp_path: Path, cli, arguments, message, monkeypatch) -> None:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    outcome = cli("inspect", *((folders / item) if (folders / item).exists() else item for item in arguments))
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.changed == []
