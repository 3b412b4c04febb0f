"""What defines a reference model: its shape, its training recipe and its seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from sparsedeploy.errors import UserError

# Raise it whenever the code of the corpus, the tokenizer or the training changes what comes out.
RECIPE_VERSION = 2


@dataclass(frozen=True)
class ReferenceOptions:
    """A Llama-type model and how to train it.

    Attributes:
        name: the preset's name; the cached folder starts with it.
        hidden_size, intermediate_size, layers, heads, key_value_heads: the decoder's shape; grouped-query attention
            when ``key_value_heads < heads``; the head dimension is ``hidden_size / heads``.
        vocab_size: tokens of the byte-level BPE; the output head is not tied to the embeddings.
        context: the largest position that the model is trained for, in tokens.
        batch_tokens: tokens per step.
        steps: optimizer steps.
        learning_rate: peak, after a linear warm-up over ``warmup_steps``; it then falls linearly to zero.
        weight_decay: AdamW's, on the matrices only.
        feature_spread: standard deviation of the logarithm of the decoder layers' initial norm gains. Features of large
            LLMs differ in scale, which is what activation-aware pruning exploits; so small and briefly trained a model
            does not grow such features by itself, so it starts with them. 0 starts all gains at 1.
        seed: of the initial weights and of the order of the data.
    """

    name: str = "default"
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 6
    heads: int = 4
    key_value_heads: int = 2
    vocab_size: int = 2048
    context: int = 512
    batch_tokens: int = 2048
    steps: int = 1600
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    feature_spread: float = 0.6
    seed: int = 0


PRESETS = {
    "default": ReferenceOptions(),
    "tiny": ReferenceOptions(
        name="tiny",
        hidden_size=128,
        intermediate_size=352,
        layers=4,
        heads=4,
        key_value_heads=2,
        vocab_size=1024,
        context=256,
        batch_tokens=1024,
        steps=600,
        learning_rate=4e-3,
        warmup_steps=40,
    ),
}


def preset_options(preset: str, seed: int = 0) -> ReferenceOptions:
    """The options of a preset with that seed.

    Raises:
        UserError: no such preset.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown reference model '{preset}'", f"Known: {', '.join(PRESETS)}.")
    return replace(PRESETS[preset], seed=seed)


def content_key(options: ReferenceOptions, corpus_fingerprint: str) -> str:
    """What the model is made from, as 12 hex digits: options, corpus and recipe version.

    Left out on purpose: the processor, the number of threads and the libraries' versions. They change the last bits of
    the weights, not the recipe, and a cache that forgets a model after every upgrade would retrain it for nothing.
    """
    recipe = {"options": asdict(options), "corpus": corpus_fingerprint, "recipe": RECIPE_VERSION}
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
