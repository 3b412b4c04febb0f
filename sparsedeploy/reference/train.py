"""Train the reference model from scratch: next-token prediction on the corpus, AdamW, one pass over a few minutes.

Deterministic: the same options, corpus, machine and number of threads give bit-identical weights.
"""

from __future__ import annotations

import itertools
import os
import pickle
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparsedeploy import progress
from sparsedeploy.folders import sync, write_json
from sparsedeploy.machine import this_machine
from sparsedeploy.reference.corpus import Document, fingerprint, texts_of
from sparsedeploy.reference.options import RECIPE_VERSION, ReferenceOptions, content_key
from sparsedeploy.reference.tokenizer import save_tokenizer, train_tokenizer

_GRADIENT_NORM = 1.0
_BETAS = (0.9, 0.98)
# Norm gains are few and start far from where they end, so they may move faster than the matrices.
_GAIN_LEARNING_RATE = 5.0
# Larger than the matrices' 0.02: otherwise the residual stream is all layer output, and early training is slower.
_EMBEDDING_STD = 0.5
_VALIDATION_TOKENS = 32_768
_REPORTED_STEPS = 50
_SAVE_SECONDS = 15.0


def train_reference(
    options: ReferenceOptions, documents: Sequence[Document], folder: Path, state: Path | None = None
) -> None:
    """Train tokenizer and model and write a Hugging Face folder plus ``reference.json`` into ``folder``.

    The caller's random state is left as it was.

    Args:
        state: a file that training saves itself to while it runs, and resumes from bit for bit; removed at the end.
    """
    tokenizer = train_tokenizer(texts_of(documents, "train"), options.vocab_size)
    train_stream = token_stream(tokenizer, texts_of(documents, "train"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = build_model(options, tokenizer)
        losses, seconds = _optimize(model, train_stream, options, state)
    windows = validation_windows(tokenizer, documents, options.context)
    validation_loss = mean_loss(model, windows)
    recent = losses[-_REPORTED_STEPS:]

    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    corpus_fingerprint = fingerprint(documents)
    report: dict[str, Any] = {
        "content_key": content_key(options, corpus_fingerprint),
        "recipe_version": RECIPE_VERSION,
        "options": asdict(options),
        "corpus": {
            "fingerprint": corpus_fingerprint,
            "documents": len(documents),
            "train_tokens": len(train_stream),
        },
        "result": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trained_tokens": options.steps * options.batch_tokens,
            "train_loss": sum(recent) / len(recent),
            "validation_loss": validation_loss,
            "validation_perplexity": float(torch.tensor(validation_loss).exp()),
            "validation_windows": list(windows.shape),
        },
        "training": {
            "seconds": round(seconds, 1),
            "tokens_per_second": round(options.steps * options.batch_tokens / seconds),
            "precision": str(_training_dtype()).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    write_json(folder / "reference.json", report)
    if state is not None:
        state.unlink(missing_ok=True)


def build_model(options: ReferenceOptions, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised model, from torch's current random state."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads,
        max_position_embeddings=options.context,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # Plain matrix products beat the fused attention kernel on a CPU at the short windows that most steps use. The saved
    # folder does not keep the choice.
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=_EMBEDDING_STD)
        for layer in model.model.layers:
            # The residual stream adds up two outputs per layer; this keeps its variance from growing with depth.
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.mul_((2 * options.layers) ** -0.5)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                spread = options.feature_spread
                norm.weight.copy_(torch.exp(spread * torch.randn(len(norm.weight)) - spread**2))  # mean square 1
    return model


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """All texts as one 1-D int64 tensor, each as ``<s> tokens </s>``."""
    ids: list[int] = []
    for encoded in tokenizer(list(texts))["input_ids"]:
        ids += encoded
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def _optimize(
    model: LlamaForCausalLM, stream: torch.Tensor, options: ReferenceOptions, state: Path | None
) -> tuple[list[float], float]:
    """Train in place; returns each step's loss (nats per token) and the seconds that the steps took."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0, "lr": options.learning_rate * _GAIN_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=_BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, options))
    losses, seconds = _restore(state, model, optimizer, schedule)
    windows = itertools.islice(batches(stream, options), len(losses), None)
    dtype = _training_dtype()
    saved = started = time.perf_counter()
    model.train()
    with progress.bar("Training the reference model", options.steps, "steps", done=len(losses)) as advance:
        for batch in windows:
            loss = _loss(model, batch, dtype)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            now = time.perf_counter()
            speed = len(losses) * options.batch_tokens / (seconds + now - started)
            advance(1, f"loss {losses[-1]:.2f}, {speed:,.0f} tokens/s")
            if state is not None and now - saved > _SAVE_SECONDS:
                _save(state, model, optimizer, schedule, losses, seconds + now - started)
                saved = now
    model.eval()
    return losses, seconds + time.perf_counter() - started


def _save(
    state: Path, model: LlamaForCausalLM, optimizer: Any, schedule: Any, losses: list[float], spent: float
) -> None:
    """Replace the saved training in one step: a kill leaves the one before or this one, whole."""
    temporary = state.with_name(f"{state.name}.tmp")
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save({**parts, "losses": losses, "seconds": spent}, temporary)
    sync(temporary)
    os.replace(temporary, state)


def _restore(state: Path | None, model: LlamaForCausalLM, optimizer: Any, schedule: Any) -> tuple[list[float], float]:
    """Losses so far and the seconds they took; nothing where no training was saved, or what was saved is damaged."""
    if state is None or not state.is_file():
        return [], 0.0
    try:
        saved = torch.load(state, weights_only=True)
        parts = [saved[name] for name in ("model", "optimizer", "schedule")]
        losses, seconds = list(saved["losses"]), float(saved["seconds"])
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError):
        progress.note(f"{state} is damaged: training starts over.")
        return [], 0.0
    for owner, part in zip((model, optimizer, schedule), parts, strict=True):
        owner.load_state_dict(part)
    progress.note(f"Training resumes at step {len(losses)}.")
    return losses, seconds


def _learning_rate_factor(step: int, options: ReferenceOptions) -> float:
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    return (options.steps - step) / (options.steps - options.warmup_steps)


def _window_length(step: int, options: ReferenceOptions) -> int:
    """Tokens per window at a step: short ones first, because attention dominates the cost of long ones on a CPU.

    A quarter of the context for 60 % of the steps, half of it up to 85 %, then all of it.
    """
    done = step / options.steps
    divisor = 4 if done < 0.6 else 2 if done < 0.85 else 1
    return options.context // divisor


def batches(stream: torch.Tensor, options: ReferenceOptions) -> Iterator[torch.Tensor]:
    """One batch per step, of ``batch_tokens`` tokens: ``(batch, length + 1)`` windows.

    Every pass over the stream, and every change of length, cuts it anew and visits the windows in random order.
    """
    generator = torch.Generator().manual_seed(options.seed)
    length, starts = 0, torch.empty(0, dtype=torch.int64)
    for step in range(options.steps):
        wanted = _window_length(step, options)
        batch_size = options.batch_tokens // wanted
        if wanted != length or len(starts) < batch_size:
            length = wanted
            first = int(torch.randint(length, (1,), generator=generator))
            starts = torch.arange(first, len(stream) - length, length)
            starts = starts[torch.randperm(len(starts), generator=generator)]
        chosen, starts = starts[:batch_size], starts[batch_size:]
        yield stream[chosen[:, None] + torch.arange(length + 1)]


def _loss(model: LlamaForCausalLM, windows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Mean next-token cross-entropy (nats) over ``(batch, length)`` windows."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def _training_dtype() -> torch.dtype:
    """bfloat16 autocast where the processor multiplies it twice as fast as float32: with AMX, and AMD's with AVX-512.

    Intel's with AVX-512 alone take half as long again for it.
    """
    machine = this_machine()
    fast = "amx_bf16" in machine.flags or ("avx512_bf16" in machine.flags and "AMD" in machine.processor)
    return torch.bfloat16 if fast else torch.float32


def validation_windows(tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], context: int) -> torch.Tensor:
    """Non-overlapping ``(n, context + 1)`` windows, evenly spread over the held-out documents."""
    stream = token_stream(tokenizer, texts_of(documents, "validation"))
    available = (len(stream) - 1) // context
    wanted = min(available, max(1, _VALIDATION_TOKENS // context))
    starts = torch.arange(wanted) * available // wanted * context
    return stream[starts[:, None] + torch.arange(context + 1)]


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, windows: torch.Tensor, batch_size: int = 8) -> float:
    """Mean next-token cross-entropy (nats per token, float32) over ``(n, length)`` windows."""
    total = 0.0
    for batch in windows.split(batch_size):
        total += float(_loss(model, batch, torch.float32)) * len(batch)
    return total / len(windows)
