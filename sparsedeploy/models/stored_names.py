"""How a model's parameters lie in its files: under which names, merged or split by transformers' own conversions.

transformers renames and merges tensors while it loads them (Mixtral's ``block_sparse_moe.experts.3.w1.weight`` becomes
a slice of ``mlp.experts.gate_up_proj``). What it would load is made by its own code; what is pruned is written back to
where it came from.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.models.linear_views import LinearView, PrunableLinear
from sparsedeploy.models.structure import find_decoder_stack
from sparsedeploy.models.tensor_files import StoredTensor, TensorFiles

_TOGETHER = "Check that config.json and the weights belong together."
# Weights of an adapter of PEFT that was not merged.
_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save)(\.|$)")
# How configurations call the number of layers behind the last one, which predict further tokens and are not loaded.
_PREDICTING = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules")


@dataclass(frozen=True)
class StoredParameter:
    """One parameter or buffer of a model and the tensors that it is made of.

    Attributes:
        name: in the model.
        sources: the stored tensors, in the order in which they are merged.
        patterns: for each source the pattern by which ``converter`` took it.
        converter: transformers' conversion; None where the one source is the parameter itself.
        key: the name under which the conversion collects its sources; it may make several parameters.
    """

    name: str
    sources: tuple[StoredTensor, ...]
    patterns: tuple[str, ...] = ()
    converter: Any = None
    key: str = ""

    def redirected(self, folder: Path) -> StoredParameter:
        """The same, in the shards of the same names in another folder."""
        return replace(self, sources=tuple(replace(one, shard=folder / one.shard.name) for one in self.sources))

    def assemble(self, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> torch.Tensor:
        """The parameter's value, from its sources by stored name."""
        if self.converter is None:
            return tensors[self.sources[0].name]
        converter = copy.deepcopy(self.converter)
        for source, pattern in zip(self.sources, self.patterns, strict=True):
            converter.add_tensor(self.key, source.name, pattern, tensors[source.name])
        made = converter.convert(self.key, model=model, config=model.config)
        value = made[self.name]
        result: torch.Tensor = value[0] if isinstance(value, list) else value
        return result


@dataclass(frozen=True)
class StoredSlice:
    """Rows of a linear's weight in a stored tensor.

    Attributes:
        first, last: the rows of ``[out_features, in_features]`` that the slice holds: ``first <= row < last``.
        start: their first byte in the shard.
        transposed: whether the bytes are ordered ``[in_features, rows]``.
    """

    tensor: StoredTensor
    first: int
    last: int
    start: int
    transposed: bool = False


class StoredNames:
    """The parameters and persistent buffers of a model, by name, and where they are stored.

    Attributes:
        left_over: stored tensors that are no part of the model and that its class does not name as such.

    Raises:
        UserError: tensors that the files lack, have twice or in another type or shape, or layers and adapters that are
            no part of the model.
    """

    def __init__(self, model: nn.Module, files: TensorFiles) -> None:
        self._model = model
        self._files = files
        state = model.state_dict()
        self._wanted = dict.fromkeys(state)
        self._tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self.left_over: list[str] = []
        self._parameters = self._match()
        optional = set(getattr(model, "_keys_to_ignore_on_load_missing", None) or ())
        for name, tensor in state.items():
            if any(re.search(pattern, name) for pattern in optional):
                continue
            stored = self.locate(name)
            if stored.converter is None:
                check_shape(name, stored.sources[0].shape, tensor)
            if tensor.is_floating_point() and (odd := next((s for s in stored.sources if not s.is_float), None)):
                raise UserError(
                    f"{files.folder} stores {odd.name} in the type {odd.kind}, not as a number that is computed with",
                    "Use the model before quantisation (float32, float16 or bfloat16).",
                )

    def locate(self, name: str) -> StoredParameter:
        """How a parameter or buffer is stored.

        Raises:
            UserError: the files hold no tensor for it.
        """
        # Of two that are tied, either may be stored.
        for known in (name, self._tied.get(name), *(one for one, other in self._tied.items() if other == name)):
            if known in self._parameters:
                return replace(self._parameters[known], name=name) if known != name else self._parameters[name]
        return StoredParameter(name, (self._files.locate(name),))

    def _match(self) -> dict[str, StoredParameter]:
        """Every stored tensor under the name that transformers loads it by."""
        renamings, converters = _conversions(self._model)
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        prefix = getattr(self._model, "base_model_prefix", "")
        grouped: dict[str, list[tuple[str, str | None]]] = {}
        for stored in sorted(self._files.names, key=_natural):
            name, pattern = _renamed(stored, renamings, converters, prefix, self._wanted)
            grouped.setdefault(name, []).append((stored, pattern))
        result: dict[str, StoredParameter] = {}
        left_over = self._unnamed({name: sources[0][0] for name, sources in grouped.items()})
        self._check_left_over(left_over)
        self.left_over = list(left_over.values())
        for name, sources in grouped.items():
            tensors = tuple(self._files[stored] for stored, _ in sources)
            pattern = sources[0][1]
            if pattern is None and len(tensors) > 1 and name in self._wanted:
                raise UserError(
                    f"{self._files.folder} stores {tensors[0].name} and {tensors[1].name}, which are one weight of the "
                    "model",
                    "Remove the one that is left over from another copy.",
                )
            if pattern is None:
                result[name] = StoredParameter(name, tensors[:1])
                continue
            converter, patterns = by_pattern[pattern], tuple(str(p) for _, p in sources)
            before, target, after = name.partition(converter.target_patterns[0])
            names = [before + one + after for one in converter.target_patterns] if target else [name]
            result.update({one: StoredParameter(one, tensors, patterns, converter, name) for one in names})
        return result

    def _check_left_over(self, left_over: Mapping[str, str]) -> None:
        """Refuse what changes the model by being left out: decoder layers and experts beyond the last, and adapters.

        Raises:
            UserError: naming the first.
        """
        for stored in left_over.values():
            if _ADAPTER.search(stored):
                raise UserError(
                    f"{self._files.folder} holds weights of an adapter that is not merged, such as {_shown(stored)}",
                    "Merge it (peft: PeftModel.merge_and_unload), then save the model.",
                )
        numbered = {name for name in left_over if re.search(r"\.\d+\.", name)}
        if not numbered:
            return
        try:
            prefix = f"{find_decoder_stack(self._model).name}."
        except UserError:
            return  # whatever needs the layers says so
        text = self._model.config.get_text_config()  # type: ignore[union-attr, operator]
        predicting = max(int(getattr(text, name, None) or 0) for name in _PREDICTING)
        last: dict[tuple[str, str], int] = {}
        for name in self._wanted:
            for before, number, after in _numbers(name):
                last[before, after] = max(number, last.get((before, after), -1))
        for name in sorted(numbered, key=_natural):
            for before, number, after in _numbers(name):
                end = last.get((before, after))
                more = predicting if before == prefix else 0
                if name.startswith(prefix) and end is not None and number > end + more:
                    raise UserError(
                        f"{self._files.folder} stores {_shown(left_over[name])}, and by its config.json the model ends "
                        f"with {before}{end}",
                        f"{_TOGETHER[:-1]} (number of layers or experts), or remove such tensors.",
                    )

    def note_left_over(self) -> None:
        """Say how many stored tensors are no part of the model."""
        if self.left_over:
            first = _shown(self.left_over[0])
            progress.note(f"{len(self.left_over)} stored tensors are not part of the model, such as {first}")

    def _unnamed(self, grouped: Mapping[str, str]) -> dict[str, str]:
        """Of the stored tensors, by the name that they would be loaded under, those that are no part of the model."""
        ignored = set(getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ())
        buffers = [name for name, _ in self._model.named_buffers()]
        # Buffers that are computed today and were stored once, wherever they were kept.
        once_stored = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
        ignored |= {pattern for pattern in once_stored if any(re.search(pattern, name) for name in buffers)}
        return {
            name: stored
            for name, stored in grouped.items()
            if name not in self._wanted and not any(re.search(pattern, name) for pattern in ignored)
        }

    def slices(self, name: str, linear: PrunableLinear) -> tuple[StoredSlice, ...]:
        """Where the rows of a linear's weight are stored.

        Raises:
            UserError: a form that transformers converts while loading and that cannot be written back.
        """
        if isinstance(linear, LinearView):
            parameter = _parameter_name(name, linear)
            stored = self.locate(parameter)
            return self._slices_of_view(name, linear, stored)
        stored = self.locate(f"{name}.weight")
        if stored.converter is not None:
            raise self._unwritable(name)
        return (StoredSlice(stored.sources[0], 0, linear.out_features, stored.sources[0].start),)

    def _slices_of_view(self, name: str, view: LinearView, stored: StoredParameter) -> tuple[StoredSlice, ...]:
        rows, columns = view.out_features, view.in_features
        operations = [type(one).__name__ for one in getattr(stored.converter, "operations", [])]
        if stored.converter is None:
            tensor = stored.sources[0]
            size = rows * columns * tensor.dtype.itemsize
            return (StoredSlice(tensor, 0, rows, tensor.start + (view.expert or 0) * size, view.transposed),)
        if view.transposed or view.expert is None or operations[:1] != ["MergeModulelist"]:
            raise self._unwritable(name)
        # One stored tensor for each expert and pattern; several patterns are halves of the rows, in their order.
        if operations[1:] not in ([], ["Concatenate"]):
            raise self._unwritable(name)
        parts: list[StoredSlice] = []
        first = 0
        for pattern in stored.converter.source_patterns:
            of_pattern = [t for t, p in zip(stored.sources, stored.patterns, strict=True) if p == pattern]
            tensor = of_pattern[view.expert]
            parts.append(StoredSlice(tensor, first, first + tensor.shape[0], tensor.start))
            first += tensor.shape[0]
        if first != rows:
            raise self._unwritable(name)
        return tuple(parts)

    def _unwritable(self, name: str) -> UserError:
        return UserError(
            f"{name} is stored in a form that transformers converts while loading, which cannot be written back",
            "Load the model with transformers, save it with save_pretrained(..., save_original_format=False), and "
            "use that folder.",
        )


def check_shape(name: str, stored: tuple[int, ...], wanted: torch.Tensor) -> None:
    """Refuse a stored shape that is not the one of the model.

    Raises:
        UserError: naming both.
    """
    if tuple(stored) != tuple(wanted.shape):
        raise UserError(f"{name} is stored as {tuple(stored)}, the configuration says {tuple(wanted.shape)}", _TOGETHER)


def stored_slices(model: nn.Module, files: TensorFiles, head: bool = False) -> dict[str, tuple[StoredSlice, ...]]:
    """Where the rows of every prunable linear are stored, by full name.

    Args:
        head: whether the output head is among them.

    Raises:
        UserError: tensors that the files lack, or a form that cannot be written back.
    """
    names = StoredNames(model, files)
    return {name: names.slices(name, linear) for name, linear in find_decoder_stack(model, head).all_linears().items()}


def read_linear(files: TensorFiles, slices: Iterable[StoredSlice], columns: int) -> torch.Tensor:
    """A linear's weight ``[out_features, columns]`` from its slices, in the stored type."""
    parts = []
    for one in slices:
        rows = one.last - one.first
        shape = (columns, rows) if one.transposed else (rows, columns)
        part = files.read_rows(one.tensor, one.start, shape)
        parts.append(part.T if one.transposed else part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parameter_name(name: str, view: LinearView) -> str:
    """The parameter that a view looks at: ``x.experts.3.down_proj`` is a slice of ``x.experts.down_proj``."""
    if view.expert is None:
        return f"{name}.{view.parameter}"
    return re.sub(rf"\.{view.expert}\.{view.parameter}$", f".{view.parameter}", name)


def _conversions(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and converters for a model; none in versions that load by name only."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    every = get_model_conversion_mapping(model)
    return (
        [one for one in every if isinstance(one, WeightRenaming)],
        [one for one in every if isinstance(one, WeightConverter)],
    )


def _renamed(
    stored: str, renamings: list[Any], converters: list[Any], prefix: str, wanted: Mapping[str, None]
) -> tuple[str, str | None]:
    if not renamings and not converters:
        return stored, None
    from transformers.core_model_loading import rename_source_key

    known = dict.fromkeys(wanted, 0)
    name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
    if pattern is None and name not in wanted and stored in wanted:
        name, pattern = rename_source_key(stored, [], [], prefix, known)
    return name, pattern


def _numbers(name: str) -> Iterator[tuple[str, int, str]]:
    """Each number between the dots of a name, with what stands before and after it."""
    for found in re.finditer(r"(?<=\.)\d+(?=\.)", name):
        yield name[: found.start()], int(found[0]), name[found.end() :]


def _shown(name: str) -> str:
    """A stored name on one line, of a length that can be read."""
    return progress.printable(name, keep="")[:200]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts ``experts.10`` behind ``experts.9``."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]
