"""``prune --quantize``: a dense model in one sweep, a pruned checkpoint on its masks, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsedeploy.checkpoint.manifest import load_manifest
from sparsedeploy.checkpoint.masks import FILE as MASKS
from sparsedeploy.checkpoint.masks import load_masks
from sparsedeploy.checkpoint.scales import FILE as SCALES
from sparsedeploy.checkpoint.scales import load_scales
from sparsedeploy.errors import UserError
from sparsedeploy.formats import quantized
from sparsedeploy.formats.config import PackedConfig
from sparsedeploy.grid import Grid, codes_of
from sparsedeploy.models.loading import load_model
from sparsedeploy.models.structure import find_decoder_stack
from tests.cli.conftest import Outcome

Cli = Callable[..., Outcome]


def common(text: Path) -> tuple[object, ...]:
    return ("--data", text, "-n", "2", "--calibration-length", "32")


def check_codes(folder: Path, grid: Grid) -> None:
    """Every pruned module is codes times scales, on its mask."""
    manifest = load_manifest(folder)
    assert manifest.quantization == grid
    assert SCALES in manifest.files
    plan = manifest.plan
    scales = load_scales(folder / SCALES, {t.name: (t.rows, t.columns) for t in plan.targets}, grid)
    masks = load_masks(folder / MASKS, {t.name: t.columns for t in plan.targets})
    linears = find_decoder_stack(load_model(folder, dtype=torch.float32)).all_linears()
    assert scales.keys() == linears.keys()
    for name, scale in scales.items():
        weight = linears[name].weight.detach()
        packed = quantized.pack(codes_of(weight, scale, grid), scale, grid.bits, grid.group)
        assert torch.equal(quantized.unpack(packed), weight)
        assert not weight[~masks[name]].any()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_dense_model_is_pruned_and_rounded(cli: Cli, model: Path, text: Path, tmp_path: Path, method: str) -> None:
    output = tmp_path / "p"
    outcome = cli("prune", model, "-o", output, "-s", "0.5", "-m", method, "--quantize", "int4", *common(text))
    assert outcome.code == 0, outcome.err
    assert "int4" in outcome.out
    check_codes(output, Grid(4))
    assert load_manifest(output).request["prune"]["quantize"] == "int4"
    assert cli("inspect", output).code == 0


def test_a_search_compares_rounded_levels(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    output, database = tmp_path / "p", tmp_path / "levels"
    search = (
        "-a",
        "auto",
        *(part for o in (f"database={database}", f"text={text}") for part in ("--allocation-option", o)),
    )
    rounding = ("--quantize", "int8", *common(text))
    outcome = cli("prune", model, "-o", output, "-s", "0.5", *search, *rounding)
    assert outcome.code == 0, outcome.err
    check_codes(output, Grid(8))
    assert json.loads((database / "levels.json").read_text())["quantize"] == {"bits": 8, "group": 32}
    other = cli("prune", model, "-o", tmp_path / "q", "-s", "0.5", *search, *common(text))
    assert other.code == 2
    assert "is for another run: quantize differ" in other.err


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_codes_are_exported_as_codes(cli: Cli, model: Path, text: Path, tmp_path: Path, values: str) -> None:
    """The packed folder holds them with their scales, and transformers computes what the checkpoint does."""
    pruned, packed = tmp_path / "p", tmp_path / "packed"
    outcome = cli("prune", model, "-o", pruned, "-s", "0.5", "-m", "magnitude", "--quantize", values, *common(text))
    assert outcome.code == 0, outcome.err
    outcome = cli("export", pruned, "-o", packed, "--target", "vllm")
    assert outcome.code == 0, outcome.err
    config = PackedConfig.from_dict(json.loads((packed / "config.json").read_text())["quantization_config"])
    assert {entry.bits for entry in config.modules.values()} == {int(values.removeprefix("int"))}
    tokens = torch.arange(5, 25)[None]
    logits = [load_model(folder, dtype=torch.float32)(tokens).logits for folder in (pruned, packed)]
    # The kernels round activations to 8 bits.
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


def test_codes_are_exact_where_the_stored_type_holds_more(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    """Computed in bfloat16, stored in float32: a code times its scale, and packed as such."""
    pruned, rounding = tmp_path / "p", ("--quantize", "int8", "--dtype", "bfloat16")
    outcome = cli("prune", model, "-o", pruned, "-s", "0.5", "-m", "wanda", *rounding, *common(text))
    assert outcome.code == 0, outcome.err
    check_codes(pruned, Grid(8))
    outcome = cli("export", pruned, "-o", tmp_path / "packed", "--target", "vllm")
    assert outcome.code == 0, outcome.err


def test_masks_of_other_weights_are_refused(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    for name, method in (("p", "sparsegpt"), ("other", "wanda")):
        assert cli("prune", model, "-o", tmp_path / name, "-s", "0.6", "-m", method, *common(text)).code == 0
    (tmp_path / "p" / MASKS).write_bytes((tmp_path / "other" / MASKS).read_bytes())
    outcome = cli("prune", tmp_path / "p", "-o", tmp_path / "q", "--quantize", "int8", *common(text))
    assert outcome.code == 2
    assert "is not that of its weight. Prune the model again" in outcome.err
    assert outcome.changed == []


def test_a_pruned_checkpoint_keeps_its_masks(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "p", tmp_path / "q"
    assert cli("prune", model, "-o", first, "-s", "0.6", "-m", "sparsegpt", *common(text)).code == 0
    outcome = cli("prune", first, "-o", second, "--quantize", "int8", "--quantize-group", "64")
    assert outcome.code == 0, outcome.err
    check_codes(second, Grid(8, 64))
    before, after = load_manifest(first), load_manifest(second)
    assert (first / MASKS).read_bytes() == (second / MASKS).read_bytes()
    assert after.source == before.source
    assert (after.method, after.plan, after.calibration) == (before.method, before.plan, before.calibration)
    again = cli("prune", second, "-o", tmp_path / "r", "--quantize", "int4")
    assert again.code == 2
    assert "is quantised already" in again.err
    assert again.changed == []


def test_recovery_takes_the_weights_off_the_grid(cli: Cli, model: Path, text: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "q", tmp_path / "r"
    assert cli("prune", model, "-o", first, "-s", "0.5", "--quantize", "int8", *common(text)).code == 0
    training = ("--train-data", text, "--train-samples", "4", "--train-length", "32")
    outcome = cli("recover", first, "-o", second, "-m", "sparse-lora", *training)
    assert outcome.code == 0, outcome.err
    assert "leave their int8 grid" in outcome.err
    assert load_manifest(second).quantization is None
    assert load_manifest(second).request["prune"]["quantize"] is None
    assert "| rounded to | int8, 32 columns to a scale |" in (first / "README.md").read_text()
    assert "int8" not in (second / "README.md").read_text(), "nor does what makes it again"
    assert not (second / SCALES).exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("-s", "0.5", "--quantize", "int3"), "int8 or int4"),
        (("-s", "0.5", "--quantize-group", "64"), "--quantize-group has no effect without --quantize"),
        (("-s", "0.5", "--quantize", "int8", "--quantize-group", "48"), "32, 64 or 128"),
        (("-s", "0.5", "--quantize", "int8", "--engine", "llmcompressor"), "--engine llmcompressor has no --quantize"),
        (("-s", "0.5", "--quantize", "int8", "--recover", "sparse-lora"), "Leave --quantize out"),
        (("--quantize", "int8"), "no sparsity given"),
        (
            ("-s", "0.5", "-m", "sparsegpt", "--method-option", "block=16", "--quantize", "int8"),
            "multiple of 32",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    cli: Cli, model: Path, text: Path, tmp_path: Path, flags: tuple[str, ...], says: str
) -> None:
    training = ("--train-data", text) if "--recover" in flags else ()
    outcome = cli("prune", model, "-o", tmp_path / "p", *flags, *common(text), *training)
    assert outcome.code == 2, outcome.out
    assert says in outcome.err
    assert outcome.changed == []


def test_flags_that_choose_weights_do_not_count_for_a_pruned_checkpoint(
    cli: Cli, model: Path, text: Path, tmp_path: Path
) -> None:
    assert cli("prune", model, "-o", tmp_path / "p", "-s", "0.5", *common(text)).code == 0
    outcome = cli("prune", tmp_path / "p", "-o", tmp_path / "q", "--quantize", "int8", "-m", "sparsegpt")
    assert outcome.code == 2
    assert "--method has no effect: the checkpoint's plan decides it" in outcome.err


@pytest.mark.parametrize("damage", ["missing", "module", "shape", "zero", "nan", "cut"])
def test_damaged_scales_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / SCALES
    scales = {"q": torch.ones(4, 2, dtype=torch.float16)}
    if damage == "shape":
        scales["q"] = scales["q"][:, :1].contiguous()
    if damage in ("zero", "nan"):
        scales["q"][1, 1] = 0 if damage == "zero" else float("nan")
    if damage != "missing":
        save_file({"other": scales["q"]} if damage == "module" else scales, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="scale"):
        load_scales(path, {"q": (4, 64)}, Grid(8))


def test_good_scales_are_read(tmp_path: Path) -> None:
    save_file({"q": torch.ones(4, 2, dtype=torch.float16)}, tmp_path / SCALES)
    assert load_scales(tmp_path / SCALES, {"q": (4, 64)}, Grid(8)).keys() == load_file(tmp_path / SCALES).keys()
