"""Decoder layers on demand: all resident, or one at a time from the files of a model that never fits as a whole."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.errors import UserError
from sparsedeploy.models.computing import compute_type
from sparsedeploy.models.linear_views import uncalled_linears, watchable_experts
from sparsedeploy.models.loading import build_empty, load_config
from sparsedeploy.models.stored_names import StoredNames, StoredParameter, check_shape
from sparsedeploy.models.structure import DecoderStack, check_alone, check_not_shared, find_decoder_stack
from sparsedeploy.models.tensor_files import TensorFiles


class LayerSource(Protocol):
    """A causal LM whose decoder layers have their weights only between entering and leaving :meth:`layer`.

    Attributes:
        model: the whole module tree; everything outside the decoder layers that their inputs depend on is loaded.
        stack: its decoder layers.
        device: where the computing is done.
    """

    model: nn.Module
    stack: DecoderStack
    device: torch.device

    def layer(self, index: int) -> Any:
        """Context manager: the layer of that depth, or the output head, with its weights in place."""

    def read_ahead(self, index: int) -> None:
        """The layer of that depth is next: begin to read it, where that takes time. Beyond the last one: nothing."""


class ResidentLayers:
    """All layers of a loaded model, in evaluation mode.

    Args:
        head: whether the output head counts as a last layer.
    """

    def __init__(self, model: nn.Module, head: bool = False) -> None:
        if model.training:
            raise ValueError("the model must be in evaluation mode")
        watchable_experts(model)
        self.model = model
        self.stack = find_decoder_stack(model, head)
        check_alone(model, self.stack)
        self.device = next(model.parameters()).device

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        yield self.stack.module(index)

    def read_ahead(self, index: int) -> None:
        pass


class StreamedLayers:
    """One decoder layer in memory at a time, read from a safetensors folder; the next one is read ahead when asked.

    Args:
        folder: the model folder.
        dtype: to compute in; None takes the configuration's own, or float32 where the processor is bad at that.
        head: whether the output head counts as a last layer.

    Raises:
        UserError: a folder that is no causal LM or lacks tensors.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        head: bool = False,
    ) -> None:
        config = load_config(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"{folder} is packed for inference", "Use the checkpoint that it was exported from.")
        self.files = TensorFiles(folder)
        self.device = device
        dtype = self.dtype = compute_type(config, device, dtype)
        self.model = build_empty(folder, config, dtype=dtype, trust_remote_code=trust_remote_code)
        watchable_experts(self.model)
        self.stack = find_decoder_stack(self.model, head)
        check_alone(self.model, self.stack)
        self.names = StoredNames(self.model, self.files)
        self.names.note_left_over()
        if dense := sorted({name for layer in self.stack.layers for name in uncalled_linears(layer)}):
            progress.note(f"{', '.join(dense)} of a layer stay dense: their inputs cannot be measured")
        self._kept_in_float32 = _float32_names(self.model, dtype)
        self._layer_tensors = [self._stored(self.stack.layer_name(i)) for i in range(len(self.stack))]
        # Without weights, layers that share them hold parameters of their own: what is stored once tells.
        check_not_shared(
            self.model,
            (
                (
                    self.stack.layer_name(at),
                    [one.name for each in tensors.values() for one in each.sources if len(one.shape) > 1],
                )
                for at, tensors in enumerate(self._layer_tensors)
            ),
        )
        self._load_surroundings()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[dict[str, torch.Tensor]]] | None = None

    def redirect(self, index: int, folder: Path) -> None:
        """Read a layer from now on from another folder with shards of the same layout: a checkpoint in the making."""
        self._layer_tensors[index] = {
            parameter: stored.redirected(folder) for parameter, stored in self._layer_tensors[index].items()
        }

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Bring in a layer; on leaving, its weights are let go."""
        tensors = self._take(index)
        for parameter, stored in self._layer_tensors[index].items():
            self._set(parameter, stored.assemble(tensors, self.model))
        del tensors
        try:
            yield self.stack.module(index)
        finally:
            for parameter in self._layer_tensors[index]:
                module, name = self._owner(parameter)
                empty = torch.empty_like(getattr(module, name), device="meta")
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
                else:
                    module._buffers[name] = empty

    def read_ahead(self, index: int) -> None:
        if index < len(self.stack):
            self._ahead = (index, self._reader.submit(self._read, index))

    def _take(self, index: int) -> dict[str, torch.Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == index:
            return ahead[1].result()
        return self._read(index)

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        tensors = self.files.read(source for stored in self._layer_tensors[index].values() for source in stored.sources)
        return {name: t.pin_memory() for name, t in tensors.items()} if self.device.type == "cuda" else tensors

    def _stored(self, prefix: str) -> dict[str, StoredParameter]:
        module = self.model.get_submodule(prefix)
        return {f"{prefix}.{name}": self.names.locate(f"{prefix}.{name}") for name in module.state_dict()}

    def _load_surroundings(self) -> None:
        """Everything of the base model outside its layers: embeddings, norms, projections; not the output head.

        Where that is pruned, also what lies between the base model and it.
        """
        base = self.model if self.stack.head else getattr(self.model, "base_model", self.model)
        state = self.model.state_dict(keep_vars=True)
        parts = [self.stack.layers, *([self.stack.head[1]] if self.stack.head else [])]
        inside = {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}
        ours = {id(tensor) for tensor in base.state_dict(keep_vars=True).values()} - inside
        # Tied parameters are one object under several names.
        groups: dict[int, list[str]] = {}
        for name, tensor in state.items():
            if id(tensor) in ours:
                groups.setdefault(id(tensor), []).append(name)
        wanted = {names[0]: self.names.locate(names[0]) for names in groups.values()}
        tensors = self.files.read(source for stored in wanted.values() for source in stored.sources)
        for first, *others in groups.values():
            self._set(first, wanted[first].assemble(tensors, self.model))
            for name in others:
                module, last = self._owner(name)
                setattr(module, last, getattr(*self._owner(first)))
        layers = {s.name for layer in self._layer_tensors for stored in layer.values() for s in stored.sources}
        self.files.check_others(layers | tensors.keys())  # the output head is read by nothing else
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        """Give a parameter or a stored buffer its value."""
        module, last = self._owner(name)
        place = getattr(module, last)
        check_shape(name, tuple(tensor.shape), place)
        dtype = torch.float32 if name in self._kept_in_float32 else place.dtype
        value = tensor.to(self.device, dtype, non_blocking=True)
        if last in module._parameters:
            module._parameters[last] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[last] = value

    def _owner(self, parameter: str) -> tuple[nn.Module, str]:
        module, _, name = parameter.rpartition(".")
        return self.model.get_submodule(module), name


def _float32_names(model: Any, dtype: torch.dtype) -> set[str]:
    """The parameters and buffers that transformers loads in float32 whatever type is asked for."""
    plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    return {name for name in model.state_dict() if any(re.search(pattern.replace("*", ".*"), name) for pattern in plan)}
