"""Nested values that a model passes between its layers: tensors in tuples, lists, dictionaries and dataclasses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch


def disturbed(result: Any) -> Any:
    """Other values everywhere; no layer computes with them."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bool:
            return ~tensor
        return tensor * 1.25 + 0.5 if tensor.is_floating_point() else tensor + 1

    return mapped(result, change, {})


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor], memo: dict[int, Any]) -> Any:
    """A copy of nested containers with their tensors changed; what occurs twice stays one object."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if id(value) in memo:
        return memo[id(value)][0]
    result = value
    if isinstance(value, dict):
        result = memo.setdefault(id(value), (value.copy(), value))[0]
        for key, item in value.items():
            result[key] = mapped(item, change, memo)
    elif isinstance(value, list):
        result = memo.setdefault(id(value), ([], value))[0]
        result.extend(mapped(item, change, memo) for item in value)
    elif isinstance(value, tuple):
        parts = [mapped(item, change, memo) for item in value]
        result = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: mapped(getattr(value, f.name), change, memo) for f in dataclasses.fields(value) if f.init}
        result = dataclasses.replace(value, **fields)
    return result


def leaves_of(argument: Any) -> list[Any]:
    """All leaves of an argument that have a value to compare."""
    leaves: list[Any] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        leaves.append(tensor)
        return tensor

    mapped(argument, note, {})
    return [*leaves, argument] if isinstance(argument, bool | int | float | str) else leaves


def equal(one: Any, other: Any) -> bool:
    """Whether two leaves, or lists of them, have the same values."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one is other:
            return True
        same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return same and torch.equal(one.nan_to_num(), other.nan_to_num())  # NaN is found where it arrives
    return bool(one == other)
