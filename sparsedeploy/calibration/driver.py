"""The sequential layer driver: run a causal LM one decoder layer at a time over calibration sequences.

Every layer is run with the keyword arguments that the model itself gave it in one full forward pass, so position
embeddings, masks and mixed layer types are the model's business and none of ours.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsedeploy import progress
from sparsedeploy.calibration.activations import Keep, choose_batch_size, new_buffer
from sparsedeploy.calibration.statistics import InputStatistics, Kind
from sparsedeploy.memory import return_freed_memory
from sparsedeploy.models.layers import LayerSource, ResidentLayers
from sparsedeploy.models.linear_views import LinearView, PrunableLinear, watch_inputs
from sparsedeploy.models.loading import exact_matmul
from sparsedeploy.models.structure import check_finite
from sparsedeploy.processes import SINGLE_PROCESS, Processes

# The hidden states are the caller's; a replayed cache object would append keys and values across sequences.
_NOT_REPLAYED = ("hidden_states", "past_key_values", "past_key_value")


class _StopForward(Exception):
    """Raised by our own hooks to leave a forward pass early; private, so no real error is swallowed."""


def _pass_through(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@dataclass
class LayerContext:
    """One decoder layer during a pass, before it is changed.

    Attributes:
        index: depth, from 0.
        linears: full name -> linear, in order of definition.
        statistics: full name -> statistics of its input; linears that share an input share the object.
        inputs: the hidden states ``[sequences, tokens, hidden]`` that enter; empty where only weights are read.
        outputs: the hidden states that leave it, in a pass that does not change weights.
    """

    index: int
    linears: dict[str, PrunableLinear]
    statistics: dict[str, InputStatistics]
    inputs: torch.Tensor
    outputs: torch.Tensor | None = None


def iterate_weights(source: nn.Module | LayerSource, *, finished: int = 0) -> Iterator[LayerContext]:
    """Yield each layer from ``finished`` on with its weights only: no text, no statistics.

    Raises:
        UserError: weights that are not finite.
    """
    layers = as_source(source)
    for index in range(finished, len(layers.stack.layers)):
        with layers.layer(index):
            layers.read_ahead(index + 1)
            linears = layers.stack.linears(index)
            for name, linear in linears.items():
                check_finite(name, linear.weight)
            yield LayerContext(index, linears, {}, torch.empty(0))


def as_source(model: nn.Module | LayerSource) -> LayerSource:
    """A loaded model as a source of its layers; a source as it is."""
    return ResidentLayers(model) if isinstance(model, nn.Module) else model


@dataclass(frozen=True)
class LayerArguments:
    """What the model passes to a layer besides the hidden states."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class LayerDriver:
    """Walks the decoder layers in order; what the caller changes in a layer is in force for the next one's inputs.

    Args:
        model: a causal LM in evaluation mode, or a source of its layers.
        tokens: int64 ``[sequences, length]``.
        batch_size: sequences per layer call; it changes memory and speed, not results. None chooses by free memory.
        keep: where the hidden states of all sequences are kept.
        accumulate: the type that statistics are summed in.
        processes: the processes that share the sequences; each runs its part, and statistics are of all.
    """

    def __init__(
        self,
        model: nn.Module | LayerSource,
        tokens: torch.Tensor,
        *,
        batch_size: int | None = None,
        keep: Keep = "auto",
        accumulate: torch.dtype = torch.float32,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        exact_matmul()
        self.source = as_source(model)
        self.stack = self.source.stack
        self.tokens = processes.shard(tokens)
        self.accumulate = accumulate
        self.processes = processes
        self.keep = keep
        self.device = self.source.device
        self.widest = max(max(linear.in_features, linear.out_features) for linear in self.stack.linears(0).values())
        self.batch_size = batch_size or choose_batch_size(
            len(self.tokens), self.tokens.shape[1], self.widest, self.device
        )
        if any(isinstance(one, LinearView) and one.expert is not None for one in self.stack.all_linears().values()):
            self.batch_size = 1  # what reaches an expert can only be told apart by sequences when they come one by one

    def __len__(self) -> int:
        return len(self.stack.layers)

    @torch.no_grad()
    def iterate(self, kind: Kind, *, changes_weights: bool, finished: int = 0) -> Iterator[LayerContext]:
        """Yield each layer with its statistics; after the caller is done with it, go on to the next.

        Args:
            kind: which statistics to accumulate.
            finished: layers before this one are run as they are and not yielded.
            changes_weights: the caller prunes: run the changed layer again for the next one's inputs. Otherwise the
                one pass that gathers statistics gives them too.

        Raises:
            UserError: weights or activations that are not finite.
        """
        arguments = self._layer_arguments()
        hidden = self._embed()
        spare = None if changes_weights else new_buffer(tuple(hidden.shape), hidden.dtype, self.device, self.keep)
        for index in range(len(self)):
            return_freed_memory()
            with self.source.layer(index) as layer:
                # Before a layer is changed there is no room for the next one: its statistics and the solver take it.
                changes = changes_weights and index >= finished
                if not changes:
                    self.source.read_ahead(index + 1)
                if index < finished:
                    self._run(layer, hidden, arguments[index], hidden)
                    continue
                linears = self.stack.linears(index)
                for name, linear in linears.items():
                    check_finite(name, linear.weight)
                statistics: dict[str, InputStatistics] = {}
                if kind != "none":
                    statistics = self._gather(layer, linears, kind, hidden, arguments[index], spare)
                elif spare is not None:
                    self._run(layer, hidden, arguments[index], spare)
                return_freed_memory()
                yield LayerContext(index, linears, statistics, hidden, spare)
                if spare is not None:
                    hidden, spare = spare, hidden
                else:
                    self.source.read_ahead(index + 1)
                    if index + 1 < len(self):
                        self._run(layer, hidden, arguments[index], hidden)

    @torch.no_grad()
    def hidden_states(self) -> Iterator[torch.Tensor]:
        """Run the layers in order and yield the hidden states ``[sequences, tokens, hidden]`` that leave each.

        There is one buffer: what is yielded is overwritten by the next layer.
        """
        arguments = self._layer_arguments()
        hidden = self._embed()
        for index in range(len(self)):
            with self.source.layer(index) as layer:
                self.source.read_ahead(index + 1)
                self._run(layer, hidden, arguments[index], hidden)
            yield hidden

    def _layer_arguments(self) -> list[LayerArguments]:
        """The arguments of every layer, without cache objects, from a forward pass that skips the layers' own work."""
        captured = [LayerArguments((), {}) for _ in self.stack.layers]

        def keep(at: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                captured[at] = LayerArguments(
                    args[1:], {key: value for key, value in kwargs.items() if key not in _NOT_REPLAYED}
                )

            return hook

        handles = [
            layer.register_forward_pre_hook(keep(at), with_kwargs=True) for at, layer in enumerate(self.stack.layers)
        ]
        try:
            for layer in self.stack.layers:
                layer.forward = _pass_through
            self._base_model()(input_ids=self.tokens[:1].to(self.device), use_cache=False)
        finally:
            for layer in self.stack.layers:
                del layer.forward
            for handle in handles:
                handle.remove()
        return captured

    def _embed(self) -> torch.Tensor:
        """The hidden states that enter layer 0, ``[sequences, tokens, hidden]``."""
        hidden: torch.Tensor | None = None
        at = 0

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal hidden
            row = args[0] if args else kwargs["hidden_states"]
            if hidden is None:
                hidden = new_buffer((len(self.tokens), *row.shape[1:]), row.dtype, self.device, self.keep)
            hidden[at] = row[0]
            raise _StopForward

        handle = self.stack.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for at in range(len(self.tokens)):
                try:
                    self._base_model()(input_ids=self.tokens[at : at + 1].to(self.device), use_cache=False)
                except _StopForward:
                    continue
                raise RuntimeError("the model's forward pass did not reach its first decoder layer")
        finally:
            handle.remove()
        assert hidden is not None
        return hidden

    def _base_model(self) -> nn.Module:
        """The model without its head, whose logits no pass needs."""
        base = getattr(self.source.model, "base_model", self.source.model)
        return base if isinstance(base, nn.Module) else self.source.model

    def _run(
        self, layer: nn.Module, hidden: torch.Tensor, arguments: LayerArguments, outputs: torch.Tensor | None
    ) -> None:
        """Run a layer over all sequences, batch by batch; ``outputs`` may be ``hidden`` itself."""
        for start in range(0, len(hidden), self.batch_size):
            self._run_batch(layer, hidden, arguments, outputs, start)

    def _run_batch(
        self,
        layer: nn.Module,
        hidden: torch.Tensor,
        arguments: LayerArguments,
        outputs: torch.Tensor | None,
        start: int,
    ) -> None:
        batch = hidden[start : start + self.batch_size].to(self.device, non_blocking=True)
        try:
            result = layer(batch, *arguments.positional, **arguments.named)
        except _StopForward:
            return
        if outputs is not None:
            outputs[start : start + self.batch_size] = result[0] if isinstance(result, tuple) else result

    def _gather(
        self,
        layer: nn.Module,
        linears: dict[str, PrunableLinear],
        kind: Kind,
        hidden: torch.Tensor,
        arguments: LayerArguments,
        outputs: torch.Tensor | None,
    ) -> dict[str, InputStatistics]:
        """Statistics of each linear's input; those that read the very same tensor (q, k, v; gate, up) share theirs.

        Without ``outputs`` a batch ends when it has reached its last linear: nobody needs what that would compute.
        """
        leaders: dict[str, str] = {}
        by_leader: dict[str, InputStatistics] = {}
        # An identity is only unique while its tensor lives.
        seen: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        reached: set[str] = set()

        def new(leader: str) -> InputStatistics:
            return InputStatistics(linears[leader].in_features, kind, self.device, self.accumulate)

        def feed(name: str, inputs: torch.Tensor) -> None:
            first = seen.get(id(inputs))
            if first is None or first[0]() is not inputs:
                first = seen[id(inputs)] = weakref.ref(inputs), name
            if leaders.setdefault(name, first[1]) == name:
                statistics = by_leader[name] = by_leader.get(name) or new(name)
                # Some layers (OPT's) flatten [batch, tokens] before a linear; statistics go sequence by sequence.
                statistics.add(inputs, min(self.batch_size, len(hidden) - statistics.sequences))
            reached.add(name)
            if outputs is None and len(reached) == len(linears):
                raise _StopForward

        handle = layer.register_forward_pre_hook(lambda *_: reached.clear())
        try:
            with watch_inputs(linears, feed):
                self._run(layer, hidden, arguments, outputs)
        finally:
            handle.remove()
        # A routed expert may have been reached on some processes only.
        for rank in range(self.processes.count):
            leaders = {**self.processes.broadcast_object(leaders, rank), **leaders}
        leaders = {name: leaders.get(name, name) for name in linears}
        idle = 0
        for leader in dict.fromkeys(leaders.values()):
            statistics = by_leader[leader] = by_leader.get(leader) or new(leader)
            statistics.combine(self.processes)
            if statistics.sequences == 0 and isinstance(linears[leader], LinearView):
                statistics.assume_equal_inputs()
                idle += 1
            statistics.check(leader)
        if idle:
            progress.note(f"{idle} expert weights were reached by no calibration token: pruned by magnitude")
        return {name: by_leader[leader] for name, leader in leaders.items()}
