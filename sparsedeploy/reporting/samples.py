"""Generated texts of dense and sparse models side by side, with the tokens that differ marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from markupsafe import Markup

from sparsedeploy.reporting.page import beside, note, prompt, sample, section


def samples_section(report: Mapping[str, Any]) -> Markup:
    """For each prompt the continuation of every model; empty where there are none.

    A model's ``samples`` are ``{"prompt": text, "tokens": [text of each token]}``, in one order for all.
    """
    models = [model for model in report["models"] if model.get("samples")]
    if not models:
        return Markup("")
    dense, *others = models
    parts = []
    for at, first in enumerate(dense["samples"]):
        columns = [sample(dense["name"], [(token, False) for token in first["tokens"]], "The dense model.")]
        for model in others:
            tokens = model["samples"][at]["tokens"]
            differs = differing(first["tokens"], tokens)
            columns.append(sample(model["name"], list(zip(tokens, differs, strict=True)), _told(differs)))
        parts += [prompt(first["prompt"]), beside(*columns)]
    text = "The same prompt, continued greedily in the engine. Marked: tokens that the dense model's text lacks."
    return section("Sample generations", *parts, note(text))


def differing(first: Sequence[str], second: Sequence[str]) -> list[bool]:
    """For each token of the second text whether it stands outside the tokens that both have in common."""
    marked = [True] * len(second)
    for block in SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks():
        marked[block.b : block.b + block.size] = [False] * block.size
    return marked


def _told(differs: Sequence[bool]) -> str:
    count = sum(differs)
    if not count:
        return "The same tokens."
    return f"{count} of {len(differs)} tokens differ, the first after {list(differs).index(True)}."
