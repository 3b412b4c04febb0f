"""What a model passes to its decoder layers, taken from its own forward pass with the layers' work left out.

A layer can be run on its own if what enters it is known: the hidden states, which are the layer's before it, and its
arguments (position embeddings, masks, per-layer inputs), which must not depend on what earlier layers compute. Both are
checked on the model, not assumed: :func:`probe` runs it twice with other results of the layers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache

from sparsedeploy.calibration.activations import free_bytes
from sparsedeploy.calibration.nested import disturbed, equal, leaves_of, mapped
from sparsedeploy.errors import UserError
from sparsedeploy.models.computing import model_errors
from sparsedeploy.models.layers import LayerSource

# The share of the free memory that arguments may take.
_SHARE = 0.5
_UNMEASURED = "Use --method magnitude, which measures nothing, or another model."
_FIX = "Use a decoder whose layers follow each other directly, such as Llama, Qwen, Mistral, OPT or Gemma."


class StopForward(Exception):
    """Raised by our own hooks to leave a forward pass early; private, so no real error is swallowed."""


@dataclasses.dataclass(frozen=True)
class LayerArguments:
    """What the model passes to a layer besides the hidden states, which come first or by their name."""

    positional: tuple[Any, ...]
    named: dict[str, Any]
    by_name: bool = False

    def call(self, layer: Callable[..., Any], hidden: torch.Tensor) -> Any:
        """Run a layer as the model does, on these hidden states."""
        if self.by_name:
            return layer(*self.positional, hidden_states=hidden, **self.named)
        return layer(hidden, *self.positional, **self.named)

    def with_named(self, values: Mapping[str, Any]) -> LayerArguments:
        """The same with other values of named arguments."""
        return dataclasses.replace(self, named={**self.named, **values}) if values else self


@dataclasses.dataclass(frozen=True)
class Probe:
    """How the layers of a model are called.

    Attributes:
        results: what a layer of each class returned for one sequence: a tensor, or a tuple or list that begins with it.
        dtype: of the hidden states between the layers; ``entering`` of those that enter the first one.
        batched: whether the first axis of the hidden states counts sequences.
        handed: of each layer, the named arguments that are further parts of what the layer before it returned (such as
            the keys that attention was restricted to, which the next layers share), and their places there.
    """

    results: dict[type, Any]
    dtype: torch.dtype
    entering: torch.dtype
    batched: bool
    handed: tuple[dict[str, int], ...]


def hidden_of(result: Any) -> torch.Tensor:
    """The hidden states in what a layer returns."""
    hidden = result if isinstance(result, torch.Tensor) else result[0]
    assert isinstance(hidden, torch.Tensor)
    return hidden


def base_model(model: nn.Module) -> nn.Module:
    """The model without its head, whose logits no pass needs."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def probe(source: LayerSource, tokens: torch.Tensor) -> Probe:
    """Learn how the model calls its layers, from passes over ``tokens [1, length]``.

    In the first one the first layer of each class does its work; then the layers return their inputs; then other
    values.

    Raises:
        UserError: a model that does not run its layers once each, in order, each on what the one before it returned and
            on arguments that are parts of that or independent of it.
    """
    results: dict[type, Any] = {}

    def learn(at: int, hidden: torch.Tensor, arguments: LayerArguments) -> Any:
        layer = source.stack.layers[at]
        if type(layer) not in results:
            with source.layer(at):
                results[type(layer)] = arguments.call(partial(type(layer).forward, layer), hidden)
        return _like(results[type(layer)], hidden.clone())

    def skip(at: int, hidden: torch.Tensor, arguments: LayerArguments) -> Any:
        return _like(results[type(source.stack.layers[at])], hidden.clone())

    def disturb(at: int, hidden: torch.Tensor, arguments: LayerArguments) -> Any:
        return _like(disturbed(results[type(source.stack.layers[at])]), hidden * 1.25 + 0.5)

    with model_errors(source.model):
        hidden, _ = _pass(source, tokens, learn)
    for kind, result in results.items():
        inner = result[0] if isinstance(result, tuple | list) and len(result) else result
        if not isinstance(inner, torch.Tensor) or inner.shape != hidden.shape:
            raise UserError(f"a {kind.__name__} does not return its hidden states first", _FIX)
    again, plain = _pass(source, tokens, skip, whole=True)
    if not torch.equal(hidden.nan_to_num(), again.nan_to_num()):
        raise UserError(
            f"{type(source.model).__name__} does not give its layers the same inputs for the same text, so they cannot "
            "be measured",
            _UNMEASURED,
        )
    handed = _handed(source, plain, results)
    _, others = _pass(source, tokens, disturb)
    for at, (one, other) in enumerate(zip(plain, others, strict=True)):
        pair = [each.with_named(dict.fromkeys(handed[at])) for each in (one, other)]
        if (argument := _differs(type(source.stack.layers[at]), *pair)) is not None:
            raise UserError(
                f"{source.stack.layer_name(at)} takes more than hidden states from the layers before it ({argument}), "
                "so its inputs cannot be measured",
                _UNMEASURED,
            )
    dtype = hidden.dtype
    for result in results.values():
        dtype = torch.promote_types(dtype, hidden_of(result).dtype)
    return Probe(results, dtype, hidden.dtype, hidden.shape[0] == len(tokens), handed)


def _handed(
    source: LayerSource, captured: list[LayerArguments], results: Mapping[type, Any]
) -> tuple[dict[str, int], ...]:
    """See :class:`Probe`; what is handed on is known by being the same object."""
    found: list[dict[str, int]] = [{}]
    for layer, arguments in zip(source.stack.layers, captured[1:], strict=False):
        result = results[type(layer)]
        parts = list(result) if isinstance(result, tuple | list) else []
        places = {id(part): at for at, part in enumerate(parts) if at and isinstance(part, torch.Tensor)}
        found.append({name: places[id(value)] for name, value in arguments.named.items() if id(value) in places})
    return tuple(found)


class Arguments:
    """The arguments of every layer for every batch of calibration tokens.

    Tensors that all batches share are kept once; what is mutable (a dictionary through which layers hand on keys and
    values) is each batch's own.
    """

    def __init__(self, source: LayerSource, known: Probe) -> None:
        self._source = source
        self._probe = known
        self._batches: list[list[LayerArguments]] = []
        self._first: list[torch.Tensor] = []

    def __getitem__(self, batch: int) -> list[LayerArguments]:
        return self._batches[batch]

    @torch.no_grad()
    def capture(self, tokens: torch.Tensor, remaining: int) -> torch.Tensor:
        """Take the arguments of one more batch ``[sequences, length]``; returns the hidden states that enter layer 0.

        Args:
            remaining: batches that follow, for which memory must be left.

        Raises:
            UserError: arguments that depend on the tokens and do not fit in memory.
        """

        def skip(at: int, hidden: torch.Tensor, arguments: LayerArguments) -> Any:
            return _like(self._probe.results[type(self._source.stack.layers[at])], hidden)

        hidden, captured = _pass(self._source, tokens, skip)
        own: dict[int, int] = {}
        kept = self._shared(captured, own)
        batch = sum(own.values())
        free = free_bytes(self._source.device)
        fitting = len(self._batches) + int(_SHARE * free / max(batch, 1))
        if self._batches and batch and len(self._batches) + remaining > fitting:
            raise UserError(
                f"what this model passes to its layers depends on the text and takes {batch * remaining / 1e9:.1f} GB "
                f"more, of {free / 1e9:.1f} GB that are free",
                f"Use at most --samples {fitting * len(tokens)}, or a shorter --calibration-length.",
            )
        self._batches.append(kept)
        return hidden

    def _shared(self, captured: list[LayerArguments], own: dict[int, int]) -> list[LayerArguments]:
        """The arguments with tensors of the first batch in place of equal ones; ``own`` counts the bytes of others."""
        first, at = not self._batches, 0
        done: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal at
            position, at = at, at + 1
            if first:
                self._first.append(tensor)
                return tensor
            before = self._first[position] if position < len(self._first) else None
            if before is not None and equal(before, tensor):
                return before
            own[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        memo: dict[int, Any] = {}

        def once(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = keep(tensor)
            return done[id(tensor)]

        return [
            LayerArguments(mapped(layer.positional, once, memo), mapped(layer.named, once, memo), layer.by_name)
            for layer in captured
        ]


def check_handed(parts: Iterable[torch.Tensor], sequences: int, batch: int, device: torch.device) -> None:
    """Refuse early what layers hand on to the next ones and memory does not hold for all sequences, twice.

    Args:
        parts: of one batch of ``batch`` sequences.

    Raises:
        UserError: too much.
    """
    each = sum(part.nbytes for part in parts) / batch
    free = free_bytes(device)
    if 2 * each * sequences > free:
        raise UserError(
            f"what the layers of this model hand on beside hidden states takes {2 * each * sequences / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free",
            f"Use at most --samples {max(1, int(free / (2 * each)))}, or a shorter --calibration-length.",
        )


def enter_head(source: LayerSource, tokens: torch.Tensor, hidden: torch.Tensor, known: Probe) -> torch.Tensor:
    """What the model passes to its output head when its last layer returns ``hidden``: behind the final norm.

    Args:
        tokens: the batch, int64 ``[sequences, length]``.

    Returns:
        ``[sequences, length, columns]``.

    Raises:
        UserError: a model that does not call its head once on all tokens.
    """
    stack = source.stack
    assert stack.head is not None
    name, head = stack.head
    found: list[torch.Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise StopForward

    def forward_of(at: int) -> Callable[..., Any]:
        last = at + 1 == len(stack.layers)

        def forward(*args: Any, **kwargs: Any) -> Any:
            taken, _ = _split(args, kwargs, stack.layer_name(at))
            return _like(known.results[type(stack.layers[at])], hidden if last else taken)

        return forward

    handle = head.register_forward_pre_hook(look)
    try:
        with _replaced(stack.layers, forward_of), suppress(StopForward):
            source.model(input_ids=tokens.to(source.device), use_cache=False)
    finally:
        handle.remove()
    if len(found) != 1 or found[0].shape[:-1] != tokens.shape:
        raise UserError(
            f"{type(source.model).__name__} does not call {name} on all tokens, so its inputs cannot be measured",
            "Leave out --lm-head.",
        )
    return found[0]


def _pass(
    source: LayerSource,
    tokens: torch.Tensor,
    work: Callable[[int, torch.Tensor, LayerArguments], Any],
    *,
    whole: bool = False,
) -> tuple[torch.Tensor, list[LayerArguments]]:
    """Run the model with ``work`` in place of its layers' own.

    Args:
        whole: go on behind the last layer, to see whether the model comes back to one.

    Returns:
        The hidden states that enter the first layer, and the arguments of all layers.
    """
    stack = source.stack
    entering: list[torch.Tensor] = []
    captured: list[LayerArguments] = []
    returned: torch.Tensor | None = None

    def forward_of(at: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal returned
            if at > len(captured):
                raise UserError(
                    f"the model passes over {stack.layer_name(len(captured))} where it reads text alone, so its inputs "
                    "cannot be measured",
                    _UNMEASURED,
                )
            if at < len(captured):
                raise UserError(
                    f"the model runs {stack.layer_name(at)} more than once on a text, so its layers cannot be pruned "
                    "one after the other",
                    _UNMEASURED,
                )
            hidden, arguments = _split(args, kwargs, stack.layer_name(at))
            if returned is not None and not (returned is hidden or equal(returned, hidden)):
                raise UserError(
                    f"the model changes what {stack.layer_name(at - 1)} returns before {stack.layer_name(at)} takes it",
                    _FIX,
                )
            if not entering:
                entering.append(hidden)
            captured.append(arguments)
            result = work(at, hidden, arguments)
            if at + 1 == len(stack.layers) and not whole:
                raise StopForward
            returned = hidden_of(result)
            return result

        return forward

    with _replaced(stack.layers, forward_of), suppress(StopForward):
        base_model(source.model)(input_ids=tokens.to(source.device), use_cache=False)
    if len(captured) == len(stack.layers):
        return entering[0], captured
    raise UserError(f"the model's forward pass ends after {len(captured)} of {len(stack.layers)} layers", _FIX)


@contextmanager
def _replaced(layers: nn.ModuleList, forward_of: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    try:
        for at, layer in enumerate(layers):
            layer.forward = forward_of(at)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[torch.Tensor, LayerArguments]:
    """The hidden states and the other arguments; a cache object would append keys and values across sequences."""
    named = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
    by_name = "hidden_states" in named
    hidden, rest = (named.pop("hidden_states"), args) if by_name else (args[0] if args else None, args[1:])
    if not isinstance(hidden, torch.Tensor):
        raise UserError(f"{name} does not take its hidden states as its first argument", _FIX)
    positional = tuple(None if isinstance(value, Cache) else value for value in rest)
    return hidden, LayerArguments(positional, named, by_name)


def _like(result: Any, hidden: torch.Tensor) -> Any:
    """What a layer returned, with other hidden states in it."""
    if isinstance(result, tuple | list) and len(result):
        parts = [hidden, *result[1:]]
        return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
    return hidden


def _differs(layer: type, one: LayerArguments, other: LayerArguments) -> str | None:
    """The name of the first argument that two passes gave different values; None where all are equal."""
    names = [*inspect.signature(layer.forward).parameters][1 if one.by_name else 2 :]  # type: ignore[attr-defined]
    names += [f"argument {at}" for at in range(len(names), len(one.positional))]
    pairs = [dict(zip(names, each.positional, strict=False)) | each.named for each in (one, other)]
    if pairs[0].keys() != pairs[1].keys():
        return min(pairs[0].keys() ^ pairs[1].keys())
    return next((key for key in pairs[0] if not equal(leaves_of(pairs[0][key]), leaves_of(pairs[1][key]))), None)
