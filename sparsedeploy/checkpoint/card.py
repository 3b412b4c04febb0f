"""The model card: a README.md in the hub's format, for a pruned checkpoint.

A card of ours ends with a comment that holds a hash of the text above it. So a card that was edited by hand, and the
base model's own, are told apart from ours and never written over.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsedeploy import progress
from sparsedeploy.checkpoint.evaluations import load_evaluations, shown_text
from sparsedeploy.checkpoint.manifest import Manifest
from sparsedeploy.errors import UserError
from sparsedeploy.folders import write_text
from sparsedeploy.models.fingerprint import model_sha256
from sparsedeploy.paths import expand
from sparsedeploy.plan import SparsityPlan, layer_number
from sparsedeploy.progress import printable
from sparsedeploy.reading import read_object, read_text
from sparsedeploy.registry import TARGETS

CARD = "README.md"
# What the base model's own card, or an edited one, is kept as.
BASE_CARD = "README.base.md"
_SIGNATURE = re.compile(r"\n<!-- sparsedeploy card ([0-9a-f]{16}) -->\n\Z")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PLAIN = re.compile(r"[\w.+:/#?&=%~ -]{1,200}")
_LIMIT = 1 << 20  # bytes
_CARRIED = ("license", "license_name", "license_link", "language")
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE")


@dataclass(frozen=True)
class Base:
    """The dense model, as its folder tells.

    Attributes:
        name: a hub id, or the name of a folder.
        carried: what a card of its takes over: licence and languages.
        licence_file: the name of one in the folder.
    """

    name: str
    carried: Mapping[str, Any]
    licence_file: str | None = None

    @property
    def hub_id(self) -> str | None:
        return self.name if _HUB_ID.fullmatch(self.name) else None


def read_base(folder: Path, name: str) -> Base:
    """What the folder of a model (or of one that was made from it) says about the base.

    Args:
        name: as the user called the base; a path counts by its last part, and as the hub id that the folder's own
            configuration or card holds.
    """
    front = front_matter(_read(folder / CARD) or "")
    carried = {key: front[key] for key in _CARRIED if _plain(front.get(key))}
    licence = next((file for file in _LICENCE_FILES if (folder / file).is_file()), None)
    local = expand(name)
    if local.is_dir() or not _HUB_ID.fullmatch(name):
        known = [front.get("base_model") if is_ours(_read(folder / CARD) or "") else None, _origin(folder)]
        name = next((one for one in known if isinstance(one, str) and _HUB_ID.fullmatch(one)), local.name)
    return Base(name, carried, licence)


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the two lines of dashes at a card's start; empty where there is none or it is broken.

    A key that stands there twice says nothing.
    """
    match = re.match(r"---\r?\n(.*?)\n---\s*?\n", text, re.DOTALL)
    if match is None:
        return {}
    try:
        values = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    keys = Counter(re.findall(r"^([\w-]+)[ \t]*:", match[1], re.MULTILINE))
    return {key: value for key, value in values.items() if keys[key] < 2} if isinstance(values, dict) else {}


def checkpoint_card(base: Base, manifest: Manifest, evaluations: Iterable[Mapping[str, Any]] = ()) -> str:
    """The card of a pruned checkpoint.

    Args:
        evaluations: see :func:`load_evaluations`.
    """
    short, plan = base.name.rpartition("/")[2], manifest.plan
    title = f"{short}, {plan.achieved:.0%} sparse"
    evaluations = list(evaluations)
    tags = ["sparse", "pruned", "sparsedeploy", manifest.method, plan.pattern.replace(":", "-")]
    front = front_values(base, tags, f"{short}-{100 * plan.achieved:.0f}-sparse", evaluations)
    facts = {
        "base model": base_link(base),
        "sparsity": f"{plan.achieved:.2%} of {sum(one.size for one in plan.targets):,} weights, asked for "
        f"{plan.sparsity:.0%}; {plan.pattern}",
        "method": _with_options(manifest.method, manifest.options),
        "allocation": f"{_with_options(plan.allocation, plan.options)}; layers from {_layers(plan)}",
        **_rounding(manifest),
        **_recovery(manifest),
        **_calibration(manifest),
        "computed in": manifest.dtype or "unknown",
        "sparsedeploy": manifest.sparsedeploy,
    }
    body = [
        f"# {title}",
        f"{base_link(base)} with {plan.achieved:.1%} of the weights in its decoder layers' linears set to zero by "
        f"sparsedeploy: {manifest.method}, {plan.allocation} allocation, {plan.pattern}. It is an ordinary "
        "Hugging Face folder; `sparsity.json` holds the exact plan and `sparsity.masks` the masks, one bit a weight.",
        table(("", ""), facts.items()),
        results_section(evaluations, "this model"),
        "## Run it",
        "FOLDER is this folder, or its id on the hub.",
        code(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ),
        "Zeros save time only in a runtime that uses them:",
        code(
            "bash",
            *(
                f"sparsedeploy export FOLDER --target {target} -o {target}-artifact"
                for target in TARGETS.names()
                if target != "llmcompressor"
            ),
            'sparsedeploy generate llamacpp-artifact "Once upon a time"',
        ),
        "## Make it again",
        f"Save this as `again.yaml`, then: `sparsedeploy prune {base.name} -o FOLDER --recipe again.yaml`.",
        code("yaml", yaml.safe_dump(_request(manifest), sort_keys=False).rstrip()),
        licence_section(base),
    ]
    return signed(front, body)


def front_values(base: Base, tags: list[str], name: str, evaluations: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The front matter of a card."""
    values: dict[str, Any] = {"base_model": base.hub_id} if base.hub_id else {}
    values |= dict(base.carried)
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": list(dict.fromkeys(tags))}
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": f"{text['data']} ({text['split']})", "type": "text"},
            "metrics": [{"type": "perplexity", "value": round(text["perplexity"], 4)}],
        }
        for one in evaluations
        if one["of"] == "model"
        for text in one["texts"].values()
    ]
    return {**values, "model-index": [{"name": name, "results": results}]} if results else values


def results_section(evaluations: list[Mapping[str, Any]], this: str) -> str:
    """A table of perplexities, the base beside the model where both were measured on the same tokens."""
    rows: dict[tuple[Any, ...], dict[str, float]] = {}
    for one in evaluations:
        for text in one["texts"].values():
            key = (f"{text['data']} ({text['split']})", text["windows"], text["context"], text["tokens_sha256"])
            rows.setdefault(key, {})[one["of"]] = text["perplexity"]
    if not rows:
        return ""
    cells = [
        (
            text,
            f"{windows} of {context} tokens",
            *(f"{found[of]:.3f}" if of in found else "" for of in ("base", "model")),
            f"{found['model'] / found['base'] - 1:+.1%}" if len(found) == 2 else "",
        )
        for (text, windows, context, _), found in rows.items()
    ]
    return "## Perplexity\n\n" + table(("text", "windows", "base model", this, "change"), cells)


def licence_section(base: Base) -> str:
    """What is known about the base's licence, which also holds for what is made of it."""
    known = base.carried.get("license_name") or base.carried.get("license")
    where = f" Its text: `{base.licence_file}`." if base.licence_file else ""
    if known:
        names = known if isinstance(known, str) else ", ".join(known)
        return f"## Licence\n\nThat of the base model: {names}.{where}"
    return (
        f"## Licence\n\nThe base model's, which its folder does not name.{where} Look it up before you pass this on."
        if not where
        else f"## Licence\n\nThat of the base model.{where}"
    )


def signed(front: Mapping[str, Any], body: Iterable[str]) -> str:
    """The text of a card, with our signature."""
    text = f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---\n\n"
    text += "\n\n".join(part.strip("\n") for part in body if part) + "\n"
    return f"{text}\n<!-- sparsedeploy card {_hash(text)} -->\n"


def is_ours(text: str) -> bool:
    """Whether a card is ours and was not edited."""
    match = _SIGNATURE.search(text)
    return match is not None and match[1] == _hash(text[: match.start()])


def kept_names(folder: Path) -> dict[str, str]:
    """Under which name a copy of a folder keeps a card that is not ours; empty where there is none."""
    text = _read(folder / CARD)
    return {} if text is None or is_ours(text) else {CARD: _free(folder)}


def put_card(folder: Path, text: str, *, overwrite: bool = False) -> None:
    """Write a card into a finished folder.

    Args:
        overwrite: a card that is not ours is kept under another name; without it, it is left alone.

    Raises:
        UserError: there is a card that is not ours.
    """
    there = _read(folder / CARD)
    if there is None and os.path.lexists(folder / CARD):
        raise UserError(f"{folder / CARD} is not a file", "Remove it.")
    if there is not None and not is_ours(there):
        if not overwrite:
            raise UserError(
                f"{folder / CARD} was not written by sparsedeploy, or was edited",
                f"Pass --overwrite: it is then kept as {_free(folder)}.",
            )
        kept = _free(folder)
        (folder / CARD).rename(folder / kept)
        progress.note(f"the card that was there is kept as {kept}")
    write_text(folder / CARD, text)


def pruned_card(folder: Path, manifest: Manifest) -> str:
    """The card of a finished checkpoint, with the results that it keeps."""
    evaluations = load_evaluations(folder, model_sha256(folder), manifest.source.sha256)
    return checkpoint_card(read_base(folder, manifest.source.name), manifest, evaluations)


def base_link(base: Base) -> str:
    """The base, as a link where it is on the hub."""
    return f"[{base.name}](https://huggingface.co/{base.name})" if base.hub_id else f"`{base.name}`"


def table(headers: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(headers)} |", "|" + "---|" * len(headers)]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)])


def _cell(text: str) -> str:
    """Text for a table: on one line, without bars and markup of its own."""
    return printable(" ".join(text.split()), keep="").replace("|", "\\|").replace("<", "&lt;")


def code(language: str, *lines: str) -> str:
    """A fenced block."""
    return "\n".join([f"```{language}", *lines, "```"])


def _request(manifest: Manifest) -> dict[str, Any]:
    """The request as a recipe, without what is at none and without the folders of texts."""
    sections = {
        name: {
            key: shown_text(value) if key == "data" and isinstance(value, str) else value
            for key, value in values.items()
            if value is not None
        }
        for name, values in manifest.request.items()
    }
    return {name: values for name, values in sections.items() if values}


def _with_options(name: str, options: Mapping[str, Any]) -> str:
    told = ", ".join(f"{key}={shown_text(str(value))}" for key, value in options.items() if value is not None)
    return f"{name} ({told})" if told else name


def _layers(plan: SparsityPlan) -> str:
    layers: dict[int | None, list[int]] = {}
    for target in plan.targets:
        total = layers.setdefault(layer_number(target.name), [0, 0])
        total[0] += target.zeros
        total[1] += target.size
    rates = [zeros / size for zeros, size in layers.values()]
    return f"{min(rates, default=0):.1%} to {max(rates, default=0):.1%}"


def _calibration(manifest: Manifest) -> dict[str, str]:
    if (text := manifest.calibration) is None:
        return {"calibration text": "none is read"}
    return {
        "calibration text": f"{shown_text(text.data)} ({text.split}), {text.sequences} sequences of {text.length} "
        f"tokens, seed {text.seed}"
    }


def _rounding(manifest: Manifest) -> dict[str, str]:
    if (grid := manifest.quantization) is None:
        return {}
    return {"rounded to": f"int{grid.bits}, {grid.group} columns to a scale"}


def _recovery(manifest: Manifest) -> dict[str, str]:
    if (recovery := manifest.recovery) is None:
        return {}
    trained = f", trained on {shown_text(str(recovery.data.get('data', '')))}" if recovery.data else ""
    return {"recovery": _with_options(recovery.method, recovery.options) + trained}


def _origin(folder: Path) -> str | None:
    """The hub id that a configuration says it was loaded from."""
    path = folder / "config.json"
    try:
        name = read_object(path, fix="").get("_name_or_path") if path.is_file() else None
    except UserError:
        return None
    return name if isinstance(name, str) else None


def _plain(value: Any) -> bool:
    """Whether a value of a foreign card is worth taking over: short text without markup, or a list of it."""
    items = value if isinstance(value, list) else [value]
    return 0 < len(items) <= 200 and all(isinstance(item, str) and _PLAIN.fullmatch(item) for item in items)


def _read(path: Path) -> str | None:
    """A card's text; None where there is none, or one that cannot be read."""
    if not path.is_file():
        return None
    try:
        return read_text(path, limit=_LIMIT, fix="")
    except UserError:
        return ""


def _free(folder: Path) -> str:
    """A name that the folder does not have yet."""
    names = [BASE_CARD, *(f"README.base-{number}.md" for number in range(2, 100))]
    return next(name for name in names if not (folder / name).exists())


def _hash(text: str) -> str:
    return hashlib.sha256(text.rstrip("\n").encode()).hexdigest()[:16]
