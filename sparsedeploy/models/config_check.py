"""Sizes in a ``config.json``: checked before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsedeploy.errors import UserError
from sparsedeploy.reading import SOUND_COPY, Fields, kind_of

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SIZES = (
    *("hidden_size", "n_embd", "d_model", "intermediate_size", "ffn_dim", "n_inner", "vocab_size", "head_dim"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "max_position_embeddings", "n_positions"),
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
)
_MOST_LAYERS, _LARGEST = 10_000, 2**31 - 1
_PARTS = ("text_config", "llm_config", "language_config")


def check_sizes(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse sizes of another type, below one, or too large for any model.

    A list (a size for each layer) or null is left to the model's own code.

    Raises:
        UserError: naming the file and the key.
    """
    _check(Fields(raw, str(path), SOUND_COPY))
    for part in _PARTS:
        if raw.get(part) is not None:
            _check(Fields(raw, str(path), SOUND_COPY).fields(part))


def vocabulary_size(raw: Mapping[str, Any]) -> int | None:
    """Rows of the embedding, where the configuration says so."""
    for values in (raw, *(raw[part] for part in _PARTS if isinstance(raw.get(part), dict))):
        if isinstance(values.get("vocab_size"), int):
            return int(values["vocab_size"])
    return None


def positions(config: Any) -> int | None:
    """The positions that a model's language part is for; None where it has no limit."""
    found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None  # XLNet's is -1


def _check(fields: Fields) -> None:
    if (kind := fields.values.get("model_type")) is not None and not isinstance(kind, str):
        raise UserError(f"{fields.where}: 'model_type' is {kind_of(kind)}, not a string", SOUND_COPY)
    for key in (*_LAYERS, *_SIZES):
        value = fields.values.get(key)
        if value is not None and not isinstance(value, list):
            # Of attention in two parts, head_dim is that of the rotary part, which GLM-5 has none of.
            least = 0 if key == "head_dim" and "v_head_dim" in fields.values else 1
            fields.integer(key, minimum=least, maximum=_MOST_LAYERS if key in _LAYERS else _LARGEST)
