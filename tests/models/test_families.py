"""Masks and state of every causal LM that transformers builds small, against whole forward passes and its own loading.

The list is generated; what is not tested has its reason in :func:`tests.families.left_out`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sparsedeploy.errors import UserError
from sparsedeploy.models.layers import StreamedLayers
from sparsedeploy.models.linear_views import watchable_experts
from sparsedeploy.models.loading import load_model
from tests.families import calibration_tokens, families, left_out, product_masks, saved_family, small_config
from tests.oracle import differences, wanda_masks

# The rounding of a float32 sum: what two orders of the same sum may decide differently.
TIE = 1e-5
# The kinds that were wrong once, for runs that have no time for all families.
KINDS = ("llama", "bloom", "falcon", "gemma2", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "gpt2", "mixtral")


@pytest.mark.parametrize("family", families())
def test_masks_equal_those_of_whole_forward_passes_or_the_family_is_refused(family: str, tmp_path: Path) -> None:
    _skip_left_out(family)
    folder = saved_family(family, tmp_path)
    masks, refusal = None, None
    try:
        masks = product_masks(folder, batch_size=4)
    except UserError as error:
        refusal = error
    if masks is None:
        assert family not in KINDS
        assert refusal is not None
        assert refusal.fix
        assert "\n" not in str(refusal)
        return
    expected, scores = wanda_masks(_truth(folder), masks, calibration_tokens(), 0.5)
    wrong = differences(masks, expected, scores)
    assert max(wrong.values(), default=0) < TIE, wrong


@pytest.mark.parametrize("family", KINDS)
def test_masks_do_not_depend_on_the_batch_size(family: str, tmp_path: Path) -> None:
    folder = saved_family(family, tmp_path)
    one, three = product_masks(folder, batch_size=1), product_masks(folder, batch_size=3)
    assert one.keys() == three.keys()
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("family", families())
def test_what_is_streamed_is_what_transformers_loads(family: str, tmp_path: Path) -> None:
    _skip_left_out(family)
    if family == "zaya":
        pytest.skip("transformers changes its balancing biases after loading them; pruning refuses the family")
    folder = saved_family(family, tmp_path)
    try:
        source = StreamedLayers(folder, device=torch.device("cpu"), dtype=torch.float32)
    except UserError:
        pytest.skip("refused, as the test of masks shows")
    truth, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
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


def _skip_left_out(family: str) -> None:
    reason = left_out(family)
    if reason is not None:
        pytest.skip(reason)


def _assert_same_state(module: nn.Module, expected: nn.Module) -> None:
    ours = dict([*module.named_parameters(), *module.named_buffers()])
    theirs = dict([*expected.named_parameters(), *expected.named_buffers()])
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def _truth(folder: Path) -> nn.Module:
    model = load_model(folder, dtype=torch.float32)
    watchable_experts(model)
    return model


def test_a_score_cap_keeps_the_fused_kernel_away(tmp_path: Path) -> None:
    folder = saved_family("gemma2", tmp_path)
    assert small_config("gemma2").attn_logit_softcapping
    assert load_model(folder).config._attn_implementation == "eager"
    assert StreamedLayers(folder, device=torch.device("cpu")).model.config._attn_implementation == "eager"
