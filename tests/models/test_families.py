"""Every model that transformers builds small, against its own whole forward passes and loading.

The list is generated; what is expected of each stands in tests/families.json, as tests/family_table.py measured it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparsedeploy.calibration.arguments import probe
from sparsedeploy.checkpoint.inspection import inspect_checkpoint
from sparsedeploy.errors import UserError
from sparsedeploy.models.layers import ResidentLayers, StreamedLayers
from sparsedeploy.models.loading import auto_class, load_config, load_model
from sparsedeploy.workflows.options import PruneOptions, RunOptions
from sparsedeploy.workflows.prune import prune
from tests.families import calibration_tokens, families, multimodal, product_masks, saved_family
from tests.family_configs import small_config
from tests.family_outcomes import outcomes
from tests.family_table import NOT_MEASURED, PAGE, load_table, page

# The rounding of a float32 sum: what two orders of the same sum may decide differently.
TIE = 1e-5
# The kinds that were wrong once, for runs that have no time for all families.
KINDS = ("llama", "bloom", "falcon", "gemma2", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "gpt2", "mixtral")
# One of each kind of graph, and of each kind of refusal; the table has all.
EXPORTED = (
    *("llama", "gemma3_text", "opt", "falcon", "gpt_neox", "bloom", "gpt2", "mixtral", "mamba", "bert", "deepseek_v3"),
    *("modernbert-decoder", "gemma3n_text", "gemma3"),
)
EVERY = (*families(), *multimodal())


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, Any]]:
    """What tests/family_table.py measured last."""
    return load_table()


@pytest.mark.parametrize("family", EVERY)
def test_masks_and_perplexity_are_as_the_table_says(
    family: str, tmp_path: Path, table: dict[str, dict[str, Any]]
) -> None:
    """A new refusal and a new difference fail alike; what is streamed is what transformers loads."""
    expected = {column: table[family][column] for column in ("masks", "eval")}
    if all(verdict.startswith("not ") for verdict in expected.values()):
        pytest.skip(expected["masks"])
    found = outcomes(family, tmp_path, tuple(expected))
    for column, verdict in expected.items():
        assert verdict == NOT_MEASURED or _without_ties(found[column]) == _without_ties(verdict)
    if _without_ties(found["masks"]).startswith("equal"):
        _assert_streamed_as_loaded(tmp_path / "model")


@pytest.mark.parametrize("family", EXPORTED)
def test_graphs_are_as_the_table_says(family: str, tmp_path: Path, table: dict[str, dict[str, Any]]) -> None:
    found = outcomes(family, tmp_path, ("longrope", "deepsparse"))
    assert found == {column: table[family][column] for column in found}


def test_nothing_in_the_table_is_wrong_and_the_page_shows_it(table: dict[str, dict[str, Any]]) -> None:
    assert set(table) == set(EVERY)
    assert not [row for row in table.values() if "**" in str(row) or NOT_MEASURED in row.values()]
    assert PAGE.read_text() == page(table)


@pytest.mark.parametrize("family", ["bart", "marian", "pegasus", "plbart", "whisper", "t5gemma2", "t5", "musicgen"])
def test_encoder_decoders_are_refused(family: str, tmp_path: Path) -> None:
    """Their decoders alone, which transformers saves as causal LMs, are not."""
    small_config(family).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"is an encoder-decoder \({family}\)"):
        load_config(tmp_path)


def test_a_model_of_two_stacks_is_refused_by_magnitude_too(tmp_path: Path) -> None:
    """It would leave out the other one, without a word."""
    for family in ("xlm", "hrm_text"):
        folder = saved_family(family, tmp_path / family)
        options = PruneOptions(sparsity=0.5, method="magnitude")
        with pytest.raises(UserError, match=r"in two lists \(.* and .*\)"):
            prune(str(folder), tmp_path / "out", options, RunOptions(device="cpu"))
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["zaya", "mllama", "trocr"])
def test_the_remedy_of_what_cannot_be_measured_works(family: str, tmp_path: Path) -> None:
    folder = saved_family(family, tmp_path / "model")
    with pytest.raises(UserError, match="cannot be measured") as caught:
        product_masks(folder, batch_size=1)
    assert "--method magnitude" in str(caught.value.fix)
    prune(str(folder), tmp_path / "out", PruneOptions(sparsity=0.5, method="magnitude"), RunOptions(device="cpu"))
    assert inspect_checkpoint(tmp_path / "out").problems == []


@pytest.mark.parametrize("family", ["hy_v4", "glm_moe_dsa", "reformer"])
def test_what_layers_hand_on_beside_hidden_states(family: str, tmp_path: Path) -> None:
    """Choices of keys that the next layers share, the second stream of a reversible layer: of the batch, as pruned."""
    folder = saved_family(family, tmp_path / "model")
    model = load_model(folder, dtype=torch.float32)
    assert any(probe(ResidentLayers(model), calibration_tokens()[:1]).handed)
    one, four = product_masks(folder, batch_size=1), product_masks(folder, batch_size=4)
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_stacked_experts_are_pruned_where_they_are_stored(tmp_path: Path) -> None:
    """DBRX keeps the rows of all experts in one matrix, the last one transposed."""
    folder = saved_family("dbrx", tmp_path / "model")
    prune(str(folder), tmp_path / "out", PruneOptions(sparsity=0.5, method="magnitude"), RunOptions(device="cpu"))
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    stacked = [name for name in before if ".experts.mlp." in name]
    assert len(stacked) == 15
    for name in stacked:
        dense, pruned = (tensors[name].view(4, -1) for tensors in (before, after))
        kept = pruned != 0
        assert kept.sum(dim=1).tolist() == [dense.shape[1] // 2] * 4, name
        assert torch.equal(pruned, torch.where(kept, dense, 0)), name
        for expert in range(4):
            assert dense[expert][kept[expert]].abs().min() >= dense[expert][~kept[expert]].abs().max(), name


def _without_ties(verdict: str) -> str:
    differ = re.fullmatch(r"\d+ of (\d+) differ, by up to (\S+) of a score", verdict)
    return f"equal ({differ[1]} modules)" if differ and float(differ[2]) < TIE else verdict


@pytest.mark.parametrize("family", KINDS)
def test_masks_do_not_depend_on_the_batch_size(family: str, tmp_path: Path) -> None:
    folder = saved_family(family, tmp_path)
    one, three = product_masks(folder, batch_size=1), product_masks(folder, batch_size=3)
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)


def _assert_streamed_as_loaded(folder: Path) -> None:
    source = StreamedLayers(folder, device=torch.device("cpu"), dtype=torch.float32)
    kind = auto_class(load_config(folder))
    truth, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    stack = source.stack
    for index in range(len(stack.layers)):
        with source.layer(index) as layer:
            _assert_same_state(layer, truth.get_submodule(stack.layer_name(index)))
    base, expected = source.model.base_model, truth.base_model
    inside = tuple(stack.layer_name(index) for index in range(len(stack.layers)))
    for name, tensor in [*source.model.named_parameters(), *source.model.named_buffers()]:
        in_base = any(tensor is one for one in (*base.parameters(), *base.buffers()))
        if in_base and not name.startswith(inside):
            owner, _, last = name.rpartition(".")
            assert torch.equal(tensor, getattr(truth.get_submodule(owner), last)), name
    assert expected is not base
    assert {*source.names.left_over} == {*report["unexpected_keys"]}


def _assert_same_state(module: nn.Module, expected: nn.Module) -> None:
    ours = dict([*module.named_parameters(), *module.named_buffers()])
    theirs = dict([*expected.named_parameters(), *expected.named_buffers()])
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def test_a_score_cap_keeps_the_fused_kernel_away(tmp_path: Path) -> None:
    folder = saved_family("gemma2", tmp_path)
    assert small_config("gemma2").attn_logit_softcapping
    assert load_model(folder).config._attn_implementation == "eager"
    assert StreamedLayers(folder, device=torch.device("cpu")).model.config._attn_implementation == "eager"
