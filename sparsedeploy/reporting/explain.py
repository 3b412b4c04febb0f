"""One sentence for each measured row: why it is faster than the dense model, or why it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NARROW = 1024  # hidden features below which the fixed cost of a product counts


def why(row: Mapping[str, Any], hidden: int, limit_share: float = 0.7) -> str:
    """A sentence on a benchmark's row (plain data).

    Args:
        hidden: features of the model's hidden states.
        limit_share: a decode speedup of this share of what memory traffic allows is near it.
    """
    if row["status"] != "measured":
        return f"Not measured: {row['reason']}."
    if row["baseline"]:
        return "What the others are compared with: the same model and engine, no weight pruned."
    decode, prefill = row["decode"]["speedup"], row["prefill"]["speedup"]
    zeros = f"{row['sparsity']:.0%} of its decoder weights are skipped"
    narrow = f"with {hidden} features a layer's product is over almost as soon as the engine has started it"
    if decode["high"] < 1:
        reason = narrow if hidden < NARROW else "reading where the zeros are costs more than the weights left out"
        sentence = f"Slower at decoding: {reason}."
    elif decode["low"] <= 1:
        sentence = "No difference at decoding is shown" + (f": {narrow}." if hidden < NARROW else ".")
    elif decode["median"] >= limit_share * row["decode_limit"]:
        sentence = f"Faster: {zeros}, and decoding is near what memory traffic allows."
    else:
        rest = narrow if hidden < NARROW else "attention, norms and the output head take the same time as before"
        sentence = f"Faster: {zeros}; memory traffic would allow {row['decode_limit']:.1f}x, but {rest}."
    if (prefill["low"] > 1) == (decode["low"] > 1) or decode["low"] <= 1 <= decode["high"]:
        return sentence
    how = "faster too" if prefill["low"] > 1 else "not faster" if prefill["high"] >= 1 else "slower"
    return f"{sentence} Prefill is {how}: it computes many tokens for each weight that it reads."
