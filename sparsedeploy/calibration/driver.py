"""The sequential layer driver: run a causal LM one decoder layer at a time over calibration sequences.

Every layer is run with the keyword arguments that the model itself gave it in one full forward pass, so position
embeddings, masks and mixed layer types are the model's business and none of ours (methods 1.2, 1.3).
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
from sparsedeploy.calibration.arguments import Arguments, StopForward, check_handed, enter_head, hidden_of, probe
from sparsedeploy.calibration.statistics import InputStatistics, Kind
from sparsedeploy.errors import UserError
from sparsedeploy.memory import return_freed_memory
from sparsedeploy.models.layers import LayerSource, ResidentLayers
from sparsedeploy.models.linear_views import LinearView, PrunableLinear, is_fused_experts, watch_inputs
from sparsedeploy.models.loading import exact_matmul
from sparsedeploy.models.structure import check_finite
from sparsedeploy.processes import SINGLE_PROCESS, Processes


class _Irregular(Exception):
    """Linears that shared an input at first do not always: private to the driver."""


@dataclass
class LayerContext:
    """One decoder layer, or the output head, during a pass, before it is changed.

    Attributes:
        index: depth, from 0; the head comes after the last layer.
        linears: full name -> linear, in order of definition.
        statistics: full name -> statistics of its input; linears that share an input share the object.
        inputs: the hidden states ``[sequences, tokens, hidden]`` that enter; empty where only weights are read.
        outputs: the hidden states that leave it, in a pass that does not change weights; for the head its inputs.
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
    for index in range(finished, len(layers.stack)):
        with layers.layer(index):
            layers.read_ahead(index + 1)
            linears = layers.stack.linears(index)
            for name, linear in linears.items():
                check_finite(name, linear.weight)
            yield LayerContext(index, linears, {}, torch.empty(0))


def as_source(model: nn.Module | LayerSource) -> LayerSource:
    """A loaded model as a source of its layers; a source as it is."""
    return ResidentLayers(model) if isinstance(model, nn.Module) else model


def routes_tokens(layer: nn.Module) -> bool:
    """Whether parts of a layer may see some tokens only: experts, as a list of modules or in one tensor."""
    for module in layer.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and any(True for _ in module.parameters()):
            return True
        weights_of_several = any(p.dim() == 3 for p in module.parameters(recurse=False))
        if is_fused_experts(module) or (weights_of_several and not isinstance(module, nn.Conv1d)):
            return True
    return False


class LayerDriver:
    """Walks the decoder layers in order; what the caller changes in a layer is in force for the next one's inputs.

    Args:
        model: a causal LM in evaluation mode, or a source of its layers.
        tokens: int64 ``[sequences, length]``.
        batch_size: sequences per layer call; it changes memory and speed, not results. None chooses by free memory.
            Layers that route tokens to experts are run on one sequence at a time.
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
        if any(map(routes_tokens, self.stack.layers)):
            self.batch_size = 1

    def __len__(self) -> int:
        return len(self.stack)

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
        hidden, arguments = self._enter()
        spare = None if changes_weights else new_buffer(tuple(hidden.shape), hidden.dtype, self.device, self.keep)
        for index in range(len(self.stack.layers)):
            return_freed_memory()
            with self.source.layer(index) as layer:
                # Before a layer is changed there is no room for the next one: its statistics and the solver take it.
                changes = changes_weights and index >= finished
                if not changes:
                    self.source.read_ahead(index + 1)
                if index < finished:
                    self._run(index, layer, hidden, arguments, hidden)
                    continue
                linears = self.stack.linears(index)
                for name, linear in linears.items():
                    check_finite(name, linear.weight)
                statistics: dict[str, InputStatistics] = {}
                if kind != "none":
                    statistics = self._gather(index, layer, linears, kind, hidden, arguments, spare)
                elif spare is not None:
                    self._run(index, layer, hidden, arguments, spare)
                return_freed_memory()
                yield LayerContext(index, linears, statistics, hidden, spare)
                if spare is not None:
                    hidden, spare = spare, hidden
                else:
                    self.source.read_ahead(index + 1)
                    if index + 1 < len(self):
                        self._run(index, layer, hidden, arguments, hidden)
        if self.stack.head is not None and finished < len(self):
            with self.source.layer(len(self.stack.layers)):
                yield self._head(kind, hidden)

    @torch.no_grad()
    def hidden_states(self) -> Iterator[torch.Tensor]:
        """Run the layers in order and yield the hidden states ``[sequences, tokens, hidden]`` that leave each.

        There is one buffer: what is yielded is overwritten by the next layer.
        """
        hidden, arguments = self._enter()
        for index in range(len(self.stack.layers)):
            with self.source.layer(index) as layer:
                self.source.read_ahead(index + 1)
                self._run(index, layer, hidden, arguments, hidden)
            yield hidden

    def _enter(self) -> tuple[torch.Tensor, Arguments]:
        """The hidden states that enter layer 0, ``[sequences, tokens, hidden]``, and what else the layers take."""
        known = self._known = probe(self.source, self.tokens[:1])
        self._entering = known.entering
        # Several streams of hidden states ([streams, 1, tokens, hidden]) are kept whole, sequence by sequence.
        self._batched = known.batched
        if not known.batched:
            self.batch_size = 1
        arguments = Arguments(self.source, known)
        # By batch, what the layer before handed on and what this one does: place in what it returned -> tensor.
        self._at = -1
        self._received: dict[int, dict[int, torch.Tensor]] = {}
        self._returned: dict[int, dict[int, torch.Tensor]] = {}
        hidden: torch.Tensor | None = None
        starts = range(0, len(self.tokens), self.batch_size)
        for batch, start in enumerate(starts):
            rows = arguments.capture(self.tokens[start : start + self.batch_size], len(starts) - batch)
            rows = rows if known.batched else rows[None]
            if hidden is None:
                hidden = new_buffer((len(self.tokens), *rows.shape[1:]), known.dtype, self.device, self.keep)
            hidden[start : start + self.batch_size] = rows
        assert hidden is not None
        return hidden, arguments

    def _run(
        self, index: int, layer: nn.Module, hidden: torch.Tensor, arguments: Arguments, outputs: torch.Tensor | None
    ) -> None:
        """Run a layer over all sequences, batch by batch; ``outputs`` may be ``hidden`` itself.

        Raises:
            UserError: what it hands on to the next layer beside hidden states does not fit in memory.
        """
        if index != self._at:
            self._at, self._received, self._returned = index, self._returned, {}
        takes = self._known.handed[index]
        gives = set(self._known.handed[index + 1].values()) if index + 1 < len(self.stack.layers) else set()
        for batch, start in enumerate(range(0, len(hidden), self.batch_size)):
            rows = hidden[start : start + self.batch_size].to(self.device, non_blocking=True)
            if index == 0:
                rows = rows.to(self._entering)
            taken = arguments[batch][index]
            taken = taken.with_named({name: self._received[batch][place] for name, place in takes.items()})
            try:
                result = taken.call(layer, rows if self._batched else rows[0])
            except StopForward:
                continue
            if outputs is not None:
                left = hidden_of(result)
                outputs[start : start + self.batch_size] = left if self._batched else left[None]
                if gives:
                    self._returned[batch] = {place: result[place] for place in gives}
                if gives and batch == 0:
                    check_handed(self._returned[batch].values(), len(hidden), self.batch_size, self.device)

    def _head(self, kind: Kind, hidden: torch.Tensor) -> LayerContext:
        """The output head and its inputs, which the model makes of ``hidden``, what leaves the last layer.

        ``hidden`` may be overwritten.
        """
        assert self.stack.head is not None
        name, head = self.stack.head
        check_finite(name, head.weight)
        statistics = InputStatistics(head.in_features, kind, self.device, self.accumulate)
        inputs: torch.Tensor | None = None
        for start in range(0, len(hidden), self.batch_size):
            span = slice(start, start + self.batch_size)
            rows = hidden[span].to(self.device, non_blocking=True)
            found = enter_head(self.source, self.tokens[span], rows if self._batched else rows[0], self._known)
            if inputs is None:
                shape = (len(hidden), *found.shape[1:])
                inputs = hidden if hidden.shape == shape else new_buffer(shape, found.dtype, self.device, self.keep)
            inputs[span] = found
            if kind != "none":
                statistics.add(found, len(found))
        assert inputs is not None
        measured = {}
        if kind != "none":
            statistics.combine(self.processes)
            statistics.check(name)
            measured[name] = statistics
        return LayerContext(len(self.stack.layers), {name: head}, measured, inputs, inputs)

    def _gather(
        self,
        index: int,
        layer: nn.Module,
        linears: dict[str, PrunableLinear],
        kind: Kind,
        hidden: torch.Tensor,
        arguments: Arguments,
        outputs: torch.Tensor | None,
    ) -> dict[str, InputStatistics]:
        """Statistics of each linear's input; those that always read the very same tensor (q, k, v) share theirs."""
        for share in (True, False):
            inputs = _Inputs(
                linears, kind, self, len(hidden), stops=outputs is None, share=share, routes=routes_tokens(layer)
            )
            handle = layer.register_forward_pre_hook(inputs.begin)
            irregular = torch.zeros(1, device=self.device)
            try:
                with watch_inputs(linears, inputs.feed):
                    self._run(index, layer, hidden, arguments, outputs)
                inputs.end()
            except _Irregular:
                irregular += 1
            finally:
                handle.remove()
            self.processes.all_reduce(irregular)
            if not irregular.item():
                return inputs.statistics(self.processes)
        raise AssertionError("without sharing, every layer is regular")


class _Inputs:
    """Listens to the linears of one layer while batches run through it.

    Where nobody needs what the layer returns, a batch ends with the last linear's turn. The first batch is run whole:
    it shows whether a linear is called more than once.
    """

    def __init__(
        self,
        linears: dict[str, PrunableLinear],
        kind: Kind,
        driver: LayerDriver,
        sequences: int,
        *,
        stops: bool,
        share: bool,
        routes: bool,
    ) -> None:
        self._linears = linears
        self._kind: Kind = kind
        self._driver = driver
        self._sequences = sequences
        self._stops = stops
        self._share = share
        self._routes = routes
        self._leaders: dict[str, str] = {}
        self._sums: dict[str, InputStatistics] = {}
        self._batches = 0
        self._repeats = False
        self._reset()

    def _reset(self) -> None:
        # An identity is only unique while its tensor lives.
        self._alive: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        self._seer: list[str] = []
        self._calls: dict[str, list[int]] = {name: [] for name in self._linears}

    def begin(self, *_: Any) -> None:
        """A batch enters the layer."""
        self.end()
        self._batches += 1

    def end(self) -> None:
        """Check that linears which share statistics saw the same tensors in the batch that is over."""
        self._repeats |= any(len(calls) > 1 for calls in self._calls.values())
        if any(self._calls[name] != self._calls[leader] for name, leader in self._leaders.items()):
            raise _Irregular
        self._reset()

    def feed(self, name: str, inputs: torch.Tensor) -> None:
        """A linear is about to be applied to ``inputs [..., columns]``."""
        known = self._alive.get(id(inputs))
        if known is None or known[0]() is not inputs:
            known = self._alive[id(inputs)] = weakref.ref(inputs), len(self._seer)
            self._seer.append(name)
        self._calls[name].append(known[1])
        leader = self._leaders.setdefault(name, self._seer[known[1]] if self._share else name)
        if leader == name:
            # Some layers (OPT's) flatten [batch, tokens] before a linear; statistics go sequence by sequence.
            done = (self._batches - 1) * self._driver.batch_size
            self._sum(name).add(inputs, min(self._driver.batch_size, self._sequences - done))
        if self._stops and self._batches > 1 and not self._repeats and all(self._calls.values()):
            raise StopForward

    def _sum(self, leader: str) -> InputStatistics:
        if leader not in self._sums:
            columns = self._linears[leader].in_features
            self._sums[leader] = InputStatistics(columns, self._kind, self._driver.device, self._driver.accumulate)
        return self._sums[leader]

    def statistics(self, processes: Processes) -> dict[str, InputStatistics]:
        """By name, of all processes' sequences.

        Raises:
            UserError: a linear that was not reached, or inputs that are not finite.
        """
        leaders = self._leaders
        # A routed expert may have been reached on some processes only.
        for rank in range(processes.count):
            leaders = {**processes.broadcast_object(leaders, rank), **leaders}
        leaders = {name: leaders.get(name, name) for name in self._linears}
        idle = 0
        for leader in dict.fromkeys(leaders.values()):
            statistics = self._sum(leader)
            statistics.sequences = self._sequences
            statistics.combine(processes)
            if statistics.rows == 0 and isinstance(self._linears[leader], LinearView):
                statistics.assume_equal_inputs()
                idle += 1
            if statistics.rows == 0 and not self._routes:
                raise UserError(
                    f"no text reaches {leader} as a layer of its own, so its inputs cannot be measured",
                    "Use --method magnitude, which measures nothing, or another model.",
                )
            statistics.check(leader)
            statistics.linears = list(leaders.values()).count(leader)
        if idle:
            progress.note(f"{idle} expert weights were reached by no calibration token: pruned by magnitude")
        return {name: self._sum(leader) for name, leader in leaders.items()}
