"""One forward pass of a layer that pauses in front of each linear until its weight has been changed.

What SparseGPT's and GPTQ's code calls "true sequential": every linear sees what the changed ones before it give. There
it takes a pass for each group of linears. Here the passes over the batches wait inside the layer, each on a stack of
its own (greenlets), so that one pass serves all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from sparsedeploy.errors import UserError

# (the linear's name, for each batch its input or None where it did not come by, whether all inputs are those of the
# linear before)
Pause = tuple[str, list[torch.Tensor | None], bool]


def pauses(linears: dict[str, nn.Linear], batches: Sequence[Callable[[], None]]) -> Iterator[Pause]:
    """Run all batches through a layer and yield in front of each linear, in the order in which they are reached.

    Between two yields the caller may change the weight of the linear that was yielded first.

    Args:
        linears: the layer's, by name.
        batches: calls that each run one batch through the layer.

    Raises:
        UserError: a batch comes by a linear that the others have passed: routed layers.
    """
    passed: dict[str, set[int]] = {}
    waiting: dict[int, tuple[str, torch.Tensor]] = {}
    outside = getcurrent()
    flows = [greenlet(run) for run in batches]
    at = {id(flow): index for index, flow in enumerate(flows)}

    def stop_at(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            index = at[id(getcurrent())]
            if name not in passed:
                outside.switch((name, args[0]))
            elif index not in passed[name]:
                raise UserError(f"some tokens reach {name} after others have passed it", "Leave --true-sequential out.")

        return hook

    def go_on(index: int) -> None:
        waiting.pop(index, None)
        arrival = flows[index].switch()
        if arrival is not None:
            waiting[index] = arrival

    handles = [linear.register_forward_pre_hook(stop_at(name)) for name, linear in linears.items()]
    try:
        for index in range(len(flows)):
            go_on(index)
        before: dict[int, weakref.ref[torch.Tensor]] = {}
        while waiting:
            name = next(one for one in linears if any(one == there for there, _ in waiting.values()))
            inputs = {index: given for index, (there, given) in waiting.items() if there == name}
            same = inputs.keys() == before.keys() and all(before[index]() is given for index, given in inputs.items())
            before = {index: weakref.ref(given) for index, given in inputs.items()}
            yield name, [inputs.get(index) for index in range(len(flows))], same
            passed[name] = set(inputs)
            del inputs  # each batch lets go of its own
            for index in sorted(passed[name]):
                go_on(index)
    finally:
        for handle in handles:
            handle.remove()
