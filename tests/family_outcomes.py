"""What each command makes of a family: equal to transformers' own whole forward pass, refused in one line, or wrong.

The prompt has 90 tokens, and the windows of :mod:`tests.families` lie inside them; a second model has a rotary scaling
that switches at 64 tokens, where the family takes one.
"""

from __future__ import annotations

import inspect
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsedeploy.artifacts.known_answer import RULED_OUT
from sparsedeploy.errors import UserError
from sparsedeploy.models.linear_views import watchable_experts
from sparsedeploy.models.loading import auto_class, load_config, load_model
from sparsedeploy.models.options import LoadOptions
from sparsedeploy.quality.evaluate import evaluate
from sparsedeploy.quality.options import EvalOptions, TextOptions
from sparsedeploy.targets.registry import export_checkpoint
from tests.families import (
    calibration_tokens,
    character_tokenizer,
    left_out,
    product_masks,
    saved_family,
    small_model,
    text_of,
)
from tests.family_configs import VOCABULARY, small_config
from tests.oracle import differences, wanda_masks
from tests.targets.graphs import GraphRunner, open_graph

PROMPT, SWITCH = 90, 64
# Beside the tokens of the prompt, so many are decoded one by one.
STEPS = 8
# float32 sums in another order, as a part of the largest logit or of the perplexity.
ROUNDING = 1e-4
# What is_decoder asks for and the code of transformers 5 leaves out: the mask of later tokens.
LOOKING_AHEAD = ("big_bird", "megatron-bert", "rembert", "roformer")
COLUMNS = ("masks", "eval", "longrope", "deepsparse", "onnxruntime")


def outcomes(family: str, scratch: Path, columns: tuple[str, ...] = COLUMNS) -> dict[str, str]:
    """One line for each column.

    Args:
        scratch: an empty folder.
    """
    if (reason := left_out(family)) is not None:
        return dict.fromkeys(columns, f"not tested: {reason}")
    folder = scratch / "model"
    try:
        saved_family(family, folder)
    except Exception as error:  # whatever transformers says of a configuration
        return dict.fromkeys(columns, f"not built: {_line(error)}")
    each = {
        "masks": lambda: masks(folder),
        "eval": lambda: perplexity(folder),
        "longrope": lambda: longrope(family, scratch),
        "deepsparse": lambda: deepsparse(folder, scratch / "deepsparse"),
        "onnxruntime": lambda: onnxruntime(folder, scratch / "onnxruntime"),
    }
    return {column: verdict(each[column], scratch) for column in columns}


def verdict(of: Callable[[], str], scratch: Path) -> str:
    """What a check says, or how it was refused; a refusal leaves nothing behind."""
    before = sorted(scratch.rglob("*"))
    try:
        return of()
    except UserError as error:
        text = str(error.message).replace(str(scratch), "").replace("/model", "MODEL", 1)
        wrong = []
        if not error.fix or "\n" in str(error):
            wrong.append("**no single line with a fix** ")
        if sorted(scratch.rglob("*")) != before:
            wrong.append("**something is left behind** ")
        return f"{''.join(wrong)}refused: {text}"
    except Exception as error:
        return f"**crashed**: {type(error).__name__}: {_line(error)}"


def masks(folder: Path) -> str:
    """Masks of ``prune --method wanda`` against those of whole forward passes."""
    found = product_masks(folder, batch_size=4)
    truth = load_model(folder, dtype=torch.float32)
    watchable_experts(truth)
    wrong = differences(found, *wanda_masks(truth, found, calibration_tokens(), 0.5))
    if not wrong:
        return f"equal ({len(found)} modules)"
    return f"{len(wrong)} of {len(found)} differ, by up to {max(wrong.values()):.0e} of a score"


def perplexity(folder: Path) -> str:
    """Perplexity of ``eval`` on three windows, one and two at once, against the definition."""
    tokens = torch.randint(3, VOCABULARY - 3, (3, PROMPT), generator=torch.Generator().manual_seed(2))
    text = folder.parent / "text.txt"
    text.write_text(text_of(tokens))
    try:
        asked = [EvalOptions(TextOptions((str(text),)), context=PROMPT, batch_size=size) for size in (1, 2)]
        found = [evaluate(folder, options, LoadOptions(device="cpu", dtype="float32")) for options in asked]
    finally:
        text.unlink()
    truth = whole_model(folder)
    expected = math.exp(np.mean([_cross_entropy(truth, row) for row in tokens]))
    wrong = max(abs(one["perplexity"] / expected - 1) for one in found)
    return "equal" if wrong < ROUNDING else f"**off by {wrong:.1e}**"


def longrope(family: str, scratch: Path) -> str:
    """Rotary frequencies that switch at 64 tokens: ``eval`` across them is equal, both graphs are refused."""
    config = _switching(family)
    if config is None:
        return "-"
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        folder = Path(place) / "model"
        try:
            small_model(family, config=config).save_pretrained(folder)
            character_tokenizer().save_pretrained(folder)
            truth, tokens, before = whole_model(folder), _prompt(), SWITCH - 1
            moved = np.abs(_logits(truth, tokens[:, :before]) - _logits(truth, tokens)[:before]).max()
        except Exception:  # transformers itself has no such scaling for this family
            return "-"
        if moved < ROUNDING:
            return "-"  # its code does not look at the length
        return ", ".join(
            [perplexity(folder), *(_not_exported(folder, target) for target in ("deepsparse", "onnxruntime"))]
        ).rstrip(", ")


def _switching(family: str) -> Any:
    """The family's configuration with another rotary scaling; None where it has none or several."""
    config = small_config(family)
    text = config.get_text_config(decoder=True)
    if not isinstance(getattr(text, "rope_parameters", None), dict) or config.is_encoder_decoder:
        return None
    buffers = list(small_model(family).named_buffers())
    lengths = {len(tensor) for name, tensor in buffers if name.endswith("rotary_emb.inv_freq") and tensor.dim() == 1}
    if len(lengths) != 1:
        return None
    (length,) = lengths
    text.rope_parameters = {
        **{key: value for key, value in text.rope_parameters.items() if not isinstance(value, dict)},
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0 + 0.1 * at for at in range(length)],
        "long_factor": [4.0 + at for at in range(length)],
    }
    return config


def _not_exported(folder: Path, target: str) -> str:
    """Empty where the export is refused, naming the length up to which it is possible if that is the reason."""
    try:
        export_checkpoint(folder, target, folder.parent / target)
    except UserError as error:
        remedy = f"max_positions={SWITCH}"
        return "" if remedy in str(error.fix) or "longrope" not in str(error) else f"**{target}: no remedy**"
    return f"**{target} exported**"


def deepsparse(folder: Path, output: Path) -> str:
    """The graph that DeepSparse is given, run here in two parts and then token by token."""
    export_checkpoint(folder, "deepsparse", output)
    tokens = _prompt()
    truth = whole_model(folder)
    tokens = _continued(truth, tokens)
    runner = GraphRunner(open_graph(output / "model.onnx"), batch=1)
    parts = [tokens[:, :50], tokens[:, 50:PROMPT], *tokens[:, PROMPT:].split(1, dim=1)]
    found = torch.cat([runner.step(part) for part in parts], dim=1)[0].numpy()
    return _compared(found, _logits(truth, tokens), tokens[0])


def onnxruntime(folder: Path, output: Path) -> str:
    """Optimum's graph in ONNX Runtime, in their own environment: the prompt, then token by token."""
    from sparsedeploy.runtimes.environments import require

    export_checkpoint(folder, "onnxruntime", output)
    truth = whole_model(folder)
    tokens = _continued(truth, _prompt())
    ids = tokens[0].tolist()
    with require("onnxruntime").worker() as worker:
        sizes = {"prompt_length": PROMPT, "new_tokens": STEPS, "chunk": PROMPT}
        model = worker.call("load", folder=str(output), cores=1, **sizes)["model"]
        request = {"prompt": ids[:PROMPT], "tokens": ids[PROMPT:], "folder": str(worker.folder)}
        arrays = worker.arrays(worker.call("logits", model=model, **request))
    return _compared(np.concatenate([arrays["prefill"], arrays["decode"]]), _logits(truth, tokens), tokens[0])


def whole_model(folder: Path) -> nn.Module:
    """transformers' own loading, with plain attention and one expert after the other."""
    kind = auto_class(load_config(folder))
    model: nn.Module = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model.requires_grad_(False)


def _prompt() -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 3, (1, PROMPT), generator=torch.Generator().manual_seed(3))


def _continued(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The prompt and what the model says after it, by whole passes without a cache."""
    for _ in range(STEPS):
        following = torch.from_numpy(_logits(model, tokens))[-1:].argmax(dim=-1)
        tokens = torch.cat([tokens, following[None]], dim=1)
    return tokens


def _compared(found: np.ndarray, expected: np.ndarray, tokens: torch.Tensor) -> str:
    possible = expected > RULED_OUT
    wrong = float(np.abs(found - expected)[possible].max() / np.abs(expected)[possible].max())
    if (found[~possible] > RULED_OUT).any():
        return "**a token that is ruled out**"
    if not wrong < ROUNDING:
        return f"**off by {wrong:.1e}**"
    said = found[PROMPT - 1 : -1].argmax(axis=-1)
    return "equal" if np.array_equal(said, tokens[PROMPT:].numpy()) else "**other tokens**"


@torch.no_grad()
def _logits(model: nn.Module, tokens: torch.Tensor) -> np.ndarray:
    masked = "attention_mask" in inspect.signature(model.forward).parameters
    # Without it, Moshi's plain attention looks ahead.
    more = {"attention_mask": torch.ones_like(tokens)} if masked else {}
    if model.config.model_type in LOOKING_AHEAD:
        more = {"attention_mask": torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)[None, None]}
    logits: np.ndarray = model(input_ids=tokens, use_cache=False, **more).logits[0].numpy()
    return logits


def _cross_entropy(model: nn.Module, row: torch.Tensor) -> float:
    logits = _logits(model, row[None]).astype(np.float64)[:-1]
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(row) - 1), row[1:].numpy()]
    return float((np.log(np.exp(shifted).sum(axis=1)) - chosen).mean())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
