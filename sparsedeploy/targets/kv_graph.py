"""One wrapper that turns any decoder-only transformers model into a graph with an explicit key/value cache.

It runs the model's own modules: only the cache object, the mask, the positions and the product of queries, keys and
values are ours, so every family keeps its own projections, rotary embeddings, norms and scales.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsedeploy.errors import UserError
from sparsedeploy.targets.switches import check_positions

INPUTS = ("input_ids", "attention_mask", "positions", "causal_mask")
_ATTENTION = "sparsedeploy_grouped"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class GraphCache(Cache):
    """A transformers cache whose past is given and whose present is remembered, both as plain tensors.

    Attributes:
        past: per layer (key, value), each [B, KV heads, S-L, head size]; None for an empty cache.
        present: layer index -> (key, value), each [B, KV heads, S, head size], filled by the model's forward pass.
    """

    def __init__(self, past: list[tuple[torch.Tensor, torch.Tensor]] | None) -> None:
        super().__init__(layers=[])
        self.past = past
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.past is not None:
            past_key, past_value = self.past[layer_idx]
            key_states = torch.cat([past_key, key_states], dim=2)
            value_states = torch.cat([past_value, value_states], dim=2)
        self.present[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.past is None else self.past[layer_idx][0].shape[2]


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of H query heads over K key/value heads without copying the cache H / K times.

    The queries of a group are stacked along the length, so the cache goes into the two products as it is. DeepSparse
    1.8.0 needs that to keep the cache inside the engine: repeating the heads, as transformers does, ends its
    compilation with an assertion.

    Args:
        query: [B, H, L, D].
        key: [B, K, S, D]; ``value`` likewise.
        attention_mask: additive, [B, 1, L, S].
        softcap: bound the scores to plus or minus this by a tanh, as Gemma 2 does.

    Returns:
        The output [B, L, H, D], and None for the weights.
    """
    if kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention sinks")
    _, heads, length, size = query.shape
    groups, rows = key.shape[1], heads // key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    stacked = (query * scale).reshape(-1, groups, rows * length, size) if rows > 1 else query * scale
    scores = torch.matmul(stacked, key.transpose(2, 3))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.reshape(-1, heads, length, key.shape[2]) if rows > 1 else scores
    weights = torch.softmax(scores + attention_mask, dim=-1)
    weights = weights.reshape(-1, groups, rows * length, key.shape[2]) if rows > 1 else weights
    output = torch.matmul(weights, value)
    output = output.reshape(-1, heads, length, value.shape[3]) if rows > 1 else output
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, grouped_attention)


@dataclass(frozen=True)
class CacheShape:
    """Sizes of one layer's cache: number of key/value heads and the size of a key and of a value vector."""

    heads: int
    key_size: int
    value_size: int


class KVCacheGraph(nn.Module):
    """A causal LM as a function of tokens, masks, positions and past keys and values.

    Inputs, in order (B batch, L new tokens, S all tokens including the cached ones):
    ``input_ids`` [B, L], ``attention_mask`` [B, S], ``positions`` [B, L], ``causal_mask`` [B, 1, L, S] (1 = attend),
    all int64; then ``past_key_values.{i}.key`` and ``.value``, [B, KV heads, S-L, head size], float32.
    Outputs: ``logits`` [B, L, V], then ``present.{i}.key`` and ``.value``, [B, KV heads, S, head size].

    A position is attended when both masks say so. Sliding-window layers also need it to be less than a window of
    columns behind the query, as transformers itself counts it.

    Args:
        max_positions: positions that the graph is for, where its rotary tables end; None takes the model's own.

    Attributes:
        max_positions: the same; None where the model has no limit.

    Raises:
        UserError: the model has no plain per-layer key/value cache, or layers that cannot be traced.
    """

    def __init__(self, model: PreTrainedModel, max_positions: int | None = None) -> None:
        super().__init__()
        self.config = model.config.get_text_config(decoder=True)
        _check_layers(type(model).__name__, self.config)
        self.max_positions = check_positions(type(model).__name__, self.config, max_positions)
        self.model: PreTrainedModel = model
        self.window: int | None = getattr(self.config, "sliding_window", None)
        self.layer_types = getattr(self.config, "layer_types", None)
        self.rotary = _rotary_tables(model, self.config, self.max_positions or 0)
        self.cache_shapes = self._measure_cache()

    @property
    def input_names(self) -> list[str]:
        pairs = [f"past_key_values.{i}.{part}" for i in range(len(self.cache_shapes)) for part in ("key", "value")]
        return [*INPUTS, *pairs]

    @property
    def output_names(self) -> list[str]:
        return ["logits", *(f"present.{i}.{part}" for i in range(len(self.cache_shapes)) for part in ("key", "value"))]

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Which axes of the graph's inputs and outputs are free, by name."""
        axes = {
            "input_ids": {0: "batch", 1: "length"},
            "attention_mask": {0: "batch", 1: "sequence"},
            "positions": {0: "batch", 1: "length"},
            "causal_mask": {0: "batch", 2: "length", 3: "sequence"},
            "logits": {0: "batch", 1: "length"},
        }
        axes.update({name: {0: "batch", 2: "past"} for name in self.input_names[len(INPUTS) :]})
        axes.update({name: {0: "batch", 2: "sequence"} for name in self.output_names[1:]})
        return axes

    def example_inputs(self, batch: int = 2, length: int = 3, past: int = 4) -> tuple[torch.Tensor, ...]:
        """Inputs of the given sizes, in order, with random tokens and an arbitrary past."""
        generator = torch.Generator().manual_seed(0)
        total = past + length
        tokens = torch.randint(0, self.config.vocab_size, (batch, length), generator=generator)
        positions = torch.arange(past, total).repeat(batch, 1)
        causal = torch.ones(length, total, dtype=torch.int64).tril(past).repeat(batch, 1, 1, 1)
        cache = [
            torch.randn(batch, shape.heads, past, size, generator=generator)
            for shape in self.cache_shapes
            for size in (shape.key_size, shape.value_size)
        ]
        return (tokens, torch.ones(batch, total, dtype=torch.int64), positions, causal, *cache)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        positions: torch.Tensor,
        causal_mask: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        cache = GraphCache(list(zip(past[0::2], past[1::2], strict=True)))
        with _graph_form(self.model, self.rotary):
            output = self.model(
                input_ids=input_ids,
                attention_mask=self._float_masks(attention_mask, causal_mask),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        present = [tensor for index in range(len(self.cache_shapes)) for tensor in cache.present[index]]
        return (output.logits, *present)

    def _float_masks(
        self, attention_mask: torch.Tensor, causal_mask: torch.Tensor
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive masks in the form that this model takes: one tensor, or one for each kind of layer."""
        attend = causal_mask.float() * attention_mask[:, None, None, :].float()
        if self.layer_types is None:
            return _additive(attend if self.window is None else attend * _near(causal_mask, self.window))
        masks = {"full_attention": _additive(attend)}
        if self.window is not None and "sliding_attention" in self.layer_types:
            masks["sliding_attention"] = _additive(attend * _near(causal_mask, self.window))
        return masks

    @torch.no_grad()
    def _measure_cache(self) -> list[CacheShape]:
        """Run one token and read the sizes of the keys and values that the layers really store."""
        zero = torch.zeros(1, 1, dtype=torch.int64)
        one = torch.ones(1, 1, dtype=torch.int64)
        cache = GraphCache(None)
        fix = (
            "Use a decoder-only transformer with attention in every layer, such as Llama, Qwen, Mistral, OPT or Gemma."
        )
        name = type(self.model).__name__
        try:
            with _graph_form(self.model, self.rotary):
                self.model(
                    input_ids=zero,
                    attention_mask=self._float_masks(one, one[None, None]),
                    position_ids=zero,
                    past_key_values=cache,
                    use_cache=True,
                )
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{name} does not run with a 4-D mask, positions and a cache ({type(error).__name__}: {reason})", fix
            ) from error
        if sorted(cache.present) != list(range(self.config.num_hidden_layers)):
            raise UserError(
                f"{name} stores keys and values in {len(cache.present)} of its {self.config.num_hidden_layers} layers",
                fix,
            )
        return [
            CacheShape(heads=key.shape[1], key_size=key.shape[3], value_size=value.shape[3])
            for key, value in (cache.present[index] for index in range(len(cache.present)))
        ]


class RotaryTable(nn.Module):
    """A rotary embedding as two tables looked up by position, instead of sines and cosines of it.

    DeepSparse 1.8.0 ends its compilation with an assertion on the computed form when it keeps the cache inside.

    Args:
        embedding: the model's module, called as ``embedding(x, position_ids, layer_type)`` or without the last.
        positions: number of rows of the tables.
        layer_types: the values of its last argument; ``[None]`` when it takes none.
    """

    def __init__(self, embedding: nn.Module, positions: int, layer_types: list[str | None]) -> None:
        super().__init__()
        steps = torch.arange(positions)[None]
        for layer_type in layer_types:
            extra = () if layer_type is None else (layer_type,)
            cosine, sine = embedding(torch.zeros(1), steps, *extra)
            self.register_buffer(f"cosine_{layer_type}", cosine[0].float().contiguous())
            self.register_buffer(f"sine_{layer_type}", sine[0].float().contiguous())

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cosine, sine = getattr(self, f"cosine_{layer_type}"), getattr(self, f"sine_{layer_type}")
        return nn.functional.embedding(position_ids, cosine), nn.functional.embedding(position_ids, sine)


@torch.no_grad()
def _rotary_tables(model: PreTrainedModel, config: Any, positions: int) -> nn.ModuleDict:
    """A table for each rotary embedding of the model that maps positions to (cosine, sine), by its module path."""
    tables = nn.ModuleDict()
    for name, module in model.named_modules():
        parameters = list(inspect.signature(module.forward).parameters)
        if "RotaryEmbedding" not in type(module).__name__ or parameters[:2] != ["x", "position_ids"]:
            continue
        if positions == 0:
            raise UserError(
                f"{type(model).__name__} does not state its maximum number of positions",
                "Give it: --target-option max_positions=N.",
            )
        by_type = parameters[2:3] == ["layer_type"]
        layer_types = sorted(set(config.layer_types)) if by_type else [None]
        try:
            tables[name.replace(".", "/")] = RotaryTable(module, positions, layer_types)
        except Exception as error:
            raise UserError(
                f"{type(model).__name__} has a rotary embedding of a form of its own at {name} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]})",
                "Use a model whose positions are one number a token, such as Llama, Qwen, Mistral or Gemma.",
            ) from error
    return tables


@contextmanager
def _graph_form(model: PreTrainedModel, rotary: nn.ModuleDict) -> Iterator[None]:
    """Let the model run with grouped attention and rotary tables inside the block, and as it was after it."""
    before = model.config._attn_implementation
    modules = [(model.get_submodule(name.replace("/", ".")), table) for name, table in rotary.items()]
    model.set_attn_implementation(_ATTENTION)
    for module, table in modules:
        module.forward = table.forward
    try:
        yield
    finally:
        for module, _ in modules:
            del module.forward
        model.set_attn_implementation(before)


def _near(causal_mask: torch.Tensor, window: int) -> torch.Tensor:
    """1 where a column lies less than a window behind its query's own column, [L, S].

    Columns and not positions are counted, as transformers does; it also leaves only shapes in this part of the graph,
    so an engine with fixed shapes folds it into a constant.
    """
    length, total = causal_mask.shape[2], causal_mask.shape[3]
    column = torch.arange(total)
    query = torch.arange(length)[:, None] + (total - length)
    return (query - column < window).float()


def _additive(attend: torch.Tensor) -> torch.Tensor:
    """0 where 1, the lowest float32 where 0: finite, so that a row without any column stays free of NaN."""
    return (1.0 - attend) * torch.finfo(torch.float32).min


def _check_layers(name: str, config: Any) -> None:
    unknown = sorted(set(getattr(config, "layer_types", None) or []) - _LAYER_TYPES)
    if unknown:
        raise UserError(
            f"{name} has layers of type {', '.join(unknown)}",
            "Only full and sliding-window attention can be exported with a key/value cache.",
        )
