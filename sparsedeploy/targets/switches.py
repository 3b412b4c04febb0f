"""Where a model computes something else once a text is longer than a number that its configuration names."""

from __future__ import annotations

import re
from typing import Any

from sparsedeploy.artifacts.known_answer import STEPS, TOKENS
from sparsedeploy.errors import UserError
from sparsedeploy.models.config_check import positions

# A check runs so many tokens at most.
LONGEST_CHECK = 8200
_WINDOW = re.compile(r"window|local_attention|attention_chunk_size|floor_scale|index_topk$|indexer_budget")
_NOT_A_LENGTH = re.compile(r"layers|pattern|num_|use_|block_indices")
# Their rotary frequencies are those of the longest text seen so far: what a cache holds from before is another
# function of its tokens, so no graph with a cache gives what the model gives for the whole text at once.
_ROPE_BY_LENGTH = ("dynamic", "longrope", "su")


def switches(config: Any) -> dict[str, int]:
    """Field of the configuration -> tokens after which an attention window, chunk or scale takes effect.

    Args:
        config: of the decoder, see ``get_text_config``.
    """
    found = {}
    kinds = set(getattr(config, "layer_types", None) or [])
    for name, value in config.to_dict().items():
        if not _WINDOW.search(name) or _NOT_A_LENGTH.search(name) or type(value) is not int or value < 1:
            continue
        if name == "sliding_window" and kinds and not any("sliding" in kind for kind in kinds):
            continue
        if name == "attention_chunk_size" and kinds and not any("chunked" in kind for kind in kinds):
            continue
        found[name] = value
    # Queries that are scaled by their position, as in Llama 4; it stands among the rotary settings.
    for entry in _rope_settings(config):
        original = entry.get("original_max_position_embeddings")
        if entry.get("llama_4_scaling_beta") and isinstance(original, int):
            found["llama_4_scaling_beta"] = original
    return found


def check_positions(name: str, config: Any, asked: int | None) -> int | None:
    """The positions that an export is for: those asked for, else the model's; None where there is no limit.

    Args:
        name: of the model's class, for messages.

    Raises:
        UserError: more than the model has, or rotary frequencies that change with the length within them.
    """
    own = positions(config)
    if asked is not None and (asked < 2 or (own is not None and asked > own)):
        raise UserError(
            f"{asked} positions were asked for, {name} has {own}", "Use another --target-option max_positions=N."
        )
    limit = asked or own
    for kind, switch in _rope_by_length(config):
        if asked is None and (kind == "dynamic" or limit is None or limit > switch):
            raise UserError(
                f"{name} uses '{kind}' rotary scaling, whose frequencies change beyond {switch} tokens",
                f"Export it for the texts before that: --target-option max_positions={switch}.",
            )
        if asked is not None and asked > switch:
            raise UserError(
                f"{name} uses '{kind}' rotary scaling, whose frequencies change beyond {switch} tokens, before the "
                f"{asked} positions asked for",
                f"Use --target-option max_positions={switch}.",
            )
    return limit


def check_length(name: str, config: Any, limit: int | None) -> int:
    """How many tokens a check of the exported model must run to go past every switch that it can reach.

    Args:
        limit: positions that the export is for.

    Raises:
        UserError: a switch so far that a check takes too long.
    """
    reachable = {field: at for field, at in switches(config).items() if limit is None or at < limit}
    length = TOKENS
    for field, at in reachable.items():
        length = max(length, at + 2 * STEPS)
        if length > LONGEST_CHECK:
            raise UserError(
                f"{name} changes its attention beyond {at} tokens ({field}), too far for the check after the export",
                f"Export it for the texts before that: --target-option max_positions={at}.",
            )
    return length if limit is None else min(length, limit)


def _rope_by_length(config: Any) -> list[tuple[str, int]]:
    """The rotary scalings whose frequencies follow the length, and the tokens after which they change."""
    own = positions(config) or 0
    found = []
    for entry in _rope_settings(config):
        kind = entry.get("rope_type") or entry.get("type")
        if kind not in _ROPE_BY_LENGTH:
            continue
        original = entry.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        found.append((kind, own if kind == "dynamic" else int(original or own)))
    return found


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """The rotary settings: one entry for each layer type, or one for all."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [value for value in settings.values() if isinstance(value, dict)] or [settings]
