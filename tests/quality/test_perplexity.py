"""Perplexity against a direct computation; a diverged model fails loudly."""

import math
from pathlib import Path

import pytest
import torch

from sparsedeploy.errors import UserError
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.quality.engine_perplexity import window_loss
from sparsedeploy.quality.evaluate import evaluate
from sparsedeploy.quality.options import EvalOptions, TextOptions
from sparsedeploy.quality.perplexity import perplexity, text_windows, windows_of
from tests.small_models import byte_tokenizer, random_model, save_model


def test_equals_the_mean_over_windows_of_the_mean_cross_entropy() -> None:
    model = random_model("llama")
    windows = torch.randint(0, 250, (5, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_probabilities = model(windows).logits.double().log_softmax(-1)
    losses = [-log_probabilities[w, torch.arange(19), windows[w, 1:]].mean().item() for w in range(5)]
    for batch_size in (1, 2):
        result = perplexity(model, windows, batch_size=batch_size)
        assert result.perplexity == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
        assert (result.windows, result.context) == (5, 20)


def test_log_probabilities_of_the_likeliest_tokens_are_taken_as_they_are() -> None:
    """What an engine tells of a large vocabulary does not sum to 1."""
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    target = torch.arange(6) * 7
    whole = torch.nn.functional.cross_entropy(logits.double(), target).item()
    every = logits.log_softmax(-1)
    told = torch.zeros_like(every, dtype=torch.bool).scatter(1, every.topk(20).indices, True)
    told.scatter_(1, target[:, None], True)
    some = every.masked_fill(~told, -math.inf)
    assert window_loss(some.numpy(), target, True) == pytest.approx(whole, rel=1e-6)
    assert window_loss(every.numpy(), target, True) == pytest.approx(whole, rel=1e-6)
    assert window_loss(logits.numpy(), target, False) == pytest.approx(whole, rel=1e-6)
    some[3, target[3]] = -math.inf
    assert window_loss(some.numpy(), target, True) == math.inf


def test_a_random_model_is_as_good_as_guessing(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to score, " * 40)
    result = evaluate(
        save_model(tmp_path / "m"), EvalOptions(TextOptions((str(text),)), context=32), LoadOptions(device="cpu")
    )
    assert 200 < result["perplexity"] < 350  # 259 tokens
    assert result["windows"] == len(text.read_text()) // 32


def test_non_finite_loss_is_an_error() -> None:
    model = random_model("llama")
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="loss of window 0 is not finite"):
        perplexity(model, torch.zeros(2, 8, dtype=torch.int64))


def test_windows_drop_the_rest_and_refuse_less_than_one() -> None:
    tokens = byte_tokenizer()("abcdefghij")["input_ids"]
    assert windows_of(tokens, 4, "here").shape == (2, 4)
    with pytest.raises(UserError, match="10 tokens, fewer than one window of 11"):
        windows_of(tokens, 11, "here")


def test_documents_of_a_text_are_joined_with_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "abc"}\n{"body": "de"}\n')
    windows = text_windows(str(tmp_path / "rows.jsonl"), byte_tokenizer(), 3, field="body", limit=2)
    assert windows.tolist() == torch.tensor(byte_tokenizer()("abc\n\nde")["input_ids"][:6]).reshape(2, 3).tolist()
