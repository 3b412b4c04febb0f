"""Models that are no causal LM by themselves: refused with a remedy that works, or computed as they were trained."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import DynamicCache

from sparsedeploy.errors import UserError
from sparsedeploy.models.loading import build_empty, load_config, load_model
from tests.families import character_tokenizer, product_masks, saved_family
from tests.family_outcomes import LOOKING_AHEAD, perplexity
from tests.small_models import config_of


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_classifiers_are_refused(task: str, tmp_path: Path) -> None:
    """Of tied embeddings, a language model could be made of the rest, without a word."""
    kind = getattr(transformers, f"LlamaFor{task}")
    kind(config_of("llama", tie_word_embeddings=True)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"is a classifier \(LlamaFor{task}\), not a language model"):
        load_config(tmp_path)


@pytest.mark.parametrize("kind", ["ShieldGemma2ForImageClassification", "Gemma3ForConditionalGeneration"])
def test_shieldgemma_is_a_classifier_under_both_names(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "shieldgemma2", "architectures": [kind]}))
    with pytest.raises(UserError, match="is a classifier"):
        load_config(tmp_path)


@pytest.mark.parametrize("family", ["vit", "clip"])
def test_what_is_no_language_model_is_refused_by_its_type(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    with pytest.raises(
        UserError, match=f"is a model of type {family}, for which transformers has no causal language model"
    ):
        build_empty(tmp_path, load_config(tmp_path), trust_remote_code=False)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
@pytest.mark.parametrize("family", ["gemma3n", "perception_lm"])
def test_a_package_that_builds_a_part_is_named(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    first = ("timm", "timm") if importlib.util.find_spec("PIL") else ("PIL", "pillow")
    with pytest.raises(UserError, match=f"is built with the package {first[0]}, which is not installed") as caught:
        build_empty(tmp_path, load_config(tmp_path), trust_remote_code=False)
    assert caught.value.fix == f"pip install {first[1]}"


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_of_several_models_the_language_model_is_named(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy is carried out as it is written; the result is pruned like any other model."""
    folder = saved_family(family, tmp_path / "whole")
    torch.save({}, folder / "spk_dict.pt")
    fixes = set()
    for command in (load_model, lambda folder: product_masks(folder, batch_size=1)):
        with pytest.raises(
            UserError, match=r"is several models \(\w+\), of which thinker is the language model"
        ) as caught:
            command(folder)
        fixes.add(caught.value.fix)
    (fix,) = fixes
    script = re.search(r"python -c '(.*)' OLD NEW", str(fix))
    assert script
    monkeypatch.setattr("sys.argv", ["-c", str(folder), str(tmp_path / "part")])
    exec(script[1], {})
    character_tokenizer().save_pretrained(tmp_path / "part")
    assert product_masks(tmp_path / "part", batch_size=1)
    assert perplexity(tmp_path / "part") == "equal"


@pytest.mark.parametrize("family", LOOKING_AHEAD)
def test_a_decoder_of_berts_kind_is_masked_as_its_configuration_says(family: str, tmp_path: Path) -> None:
    """Without is_decoder it is refused with that remedy; with it, it is right, whole and token by token."""
    folder = saved_family(family, tmp_path / "model")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "is_decoder": False}))
    with pytest.raises(UserError, match="predicts a token from later ones") as caught:
        perplexity(folder)
    assert '"is_decoder": true' in str(caught.value.fix)
    path.write_text(json.dumps(config))
    assert perplexity(folder) == "equal"
    model, tokens = load_model(folder), torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, cache = model(input_ids=tokens, use_cache=False).logits, DynamicCache(config=model.config)
        parts = [
            model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:])
        ]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)


def test_block_sparse_attention_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    folder = saved_family("big_bird", tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_size": 4, "num_random_blocks": 1}))
    model = load_model(folder)
    with torch.no_grad():
        model(input_ids=torch.full((1, 28), 5))
        with pytest.raises(UserError, match="looks ahead beyond 28 tokens") as caught:
            model(input_ids=torch.full((1, 29), 5))
    assert "original_full" in str(caught.value.fix)
