"""The type that a model is computed in, and the attention that computes its own function."""

import pytest
import torch

from sparsedeploy.models import computing
from sparsedeploy.models.computing import attention, compute_type, processor_flags
from tests.small_models import config_of


@pytest.mark.parametrize(
    ("flags", "own", "expected"),
    [
        ({"avx2"}, torch.bfloat16, torch.float32),
        ({"avx2", "avx512_bf16"}, torch.bfloat16, torch.bfloat16),
        ({"amx_bf16"}, torch.bfloat16, torch.bfloat16),
        ({"amx_bf16"}, torch.float16, torch.float32),
        ({"avx2"}, torch.float32, torch.float32),
        (set(), torch.bfloat16, torch.bfloat16),  # a system that does not report flags
    ],
)
def test_auto_is_the_own_type_where_the_processor_multiplies_in_it(
    flags: set[str], own: torch.dtype, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing, "processor_flags", lambda: frozenset(flags))
    config = config_of("llama")
    config.dtype = own
    assert compute_type(config, "cpu", None) == expected
    assert compute_type(config, "cuda", None) == own
    assert compute_type(config, "cpu", own) == own


def test_flags_are_those_of_this_processor() -> None:
    assert not processor_flags() or processor_flags() & {"sse2", "asimd", "fp"}


@pytest.mark.parametrize(("family", "expected"), [("llama", None), ("gemma", None), ("gemma2", "eager")])
def test_a_score_cap_asks_for_plain_attention(family: str, expected: str | None) -> None:
    assert attention(config_of(family)) == expected
