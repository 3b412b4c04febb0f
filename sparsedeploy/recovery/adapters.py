"""Low-rank adapters whose product is masked by a sparsity pattern, so that they merge without making nonzeros.

y = W x + scale * ((B A) o M) dropout(x). Without a mask the same adapter is plain LoRA (Hu et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from sparsedeploy.masks import apply_mask, pack_bits, unpack_bits

# LoSA keeps alpha / 8 whatever the rank, so that growth does not rescale what was learnt.
SCALE_RANK = 8
ReinitPolicy = Literal["reinit", "retain"]


def masked_product(a: torch.Tensor, b: torch.Tensor, packed: torch.Tensor | None, scale: float) -> torch.Tensor:
    """scale * (B A) o M, ``[rows, columns]`` in the factors' type; masked entries are exactly 0."""
    with torch.autocast(a.device.type, enabled=False):
        product = (b * scale) @ a
    return product if packed is None else product.mul_(unpack_bits(packed, a.shape[1]))


class _MaskedLowRank(torch.autograd.Function):
    """x -> x (W + (scale B A) o M)^T, keeping x, A, B and the mask's bits; dense temporaries live only inside a call.

    With G = (dL/dy)^T x: dB = scale (G o M) A^T, dA = scale B^T (G o M), dx = dL/dy (W + (scale B A) o M). W gets no
    gradient; None stands for zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        packed: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, a, b, packed)
        ctx.scale = scale
        return x @ _sum(weight, a, b, packed, scale).to(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, a, b, packed = ctx.saved_tensors
        with torch.autocast(a.device.type, enabled=False):
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = grad @ _sum(weight, a, b, packed, ctx.scale).to(grad.dtype)
            weight_grad = grad.flatten(0, -2).T @ x.flatten(0, -2)
            weight_grad = weight_grad.to(a.dtype).mul_(unpack_bits(packed, a.shape[1])).mul_(ctx.scale)
            return grad_x, None, b.T @ weight_grad, weight_grad @ a.T, None, None


def _sum(
    weight: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, packed: torch.Tensor, scale: float
) -> torch.Tensor:
    product = masked_product(a, b, packed, scale)
    return product if weight is None else product.add_(weight)


class Adapter(nn.Module):
    """The low-rank delta of one linear; factors in float32 (float64 for a float64 linear) whatever the model's type.

    Attributes:
        a: ``[rank, columns]``; ``b``: ``[rows, rank]``, zero at first, so that the model starts unchanged.
        packed: the mask's bits, or None for plain LoRA.
        scale: constant, alpha / 8.

    Args:
        linear: gives shape and device; it is not kept.
        mask: bool ``[rows, columns]``, True where the weight is kept; None adapts every weight.
        generator: of the initial values of ``a``, on the CPU.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        mask: torch.Tensor | None,
        *,
        alpha: float = 16.0,
        dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError("an adapter needs a rank of at least 1")
        self.device = linear.weight.device
        dtype = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        bound = linear.in_features**-0.5  # Kaiming's, as LoRA starts
        start = torch.rand(rank, linear.in_features, generator=generator) * 2 * bound - bound
        self.a = nn.Parameter(start.to(self.device, dtype))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, device=self.device, dtype=dtype))
        self.scale = alpha / SCALE_RANK
        self.dropout = nn.Dropout(dropout)
        self.packed: torch.Tensor | None = None
        self.dropped_a: torch.Tensor
        self.dropped_b: torch.Tensor
        self.register_buffer("dropped_a", self.a.data[:0].clone())
        self.register_buffer("dropped_b", self.b.data[:, :0].clone())
        if mask is not None:
            self.set_mask(mask)

    @property
    def rank(self) -> int:
        return len(self.a)

    def set_mask(self, mask: torch.Tensor) -> None:
        """Replace the mask, bool ``[rows, columns]``."""
        if mask.shape != (len(self.b), self.a.shape[1]) or mask.dtype != torch.bool:
            raise ValueError(f"the mask is {mask.dtype} {tuple(mask.shape)}")
        self.packed = pack_bits(mask.to(self.device))

    def set_rank(self, rank: int, *, regrow: ReinitPolicy = "reinit", generator: torch.Generator | None = None) -> None:
        """Grow or shrink; the parameters are new objects afterwards when the rank changes.

        Args:
            regrow: what growth brings: ``reinit`` new Gaussian rows of A and zero columns of B, so that the output
                stays as it is (the paper); ``retain`` the components that an earlier shrink dropped, as they were
                (the released code), and new ones when there are none left.
        """
        if rank < 1:
            raise ValueError("an adapter needs a rank of at least 1")
        a = torch.cat([self.a.data, self.dropped_a])
        b = torch.cat([self.b.data, self.dropped_b], dim=1)
        if rank > len(a):
            columns = a.shape[1]
            fresh = torch.randn(rank - len(a), columns, generator=generator) * (3 * columns) ** -0.5
            a = torch.cat([a, fresh.to(a)])
            b = torch.cat([b, b.new_zeros(len(b), rank - b.shape[1])], dim=1)
        keep = slice(rank, None) if regrow == "retain" else slice(0, 0)
        self.dropped_a, self.dropped_b = a[keep].clone(), b[:, keep].clone()
        if rank != self.rank:
            self.a, self.b = nn.Parameter(a[:rank].clone()), nn.Parameter(b[:, :rank].clone())

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over ``state_dict()`` values; a parameter stays the same object when its shape does."""
        for key in ("a", "b"):
            value, parameter = tensors[key].to(self.device), getattr(self, key)
            if value.shape == parameter.shape:
                parameter.data.copy_(value)
            else:
                setattr(self, key, nn.Parameter(value.to(parameter.dtype)))
        self.dropped_a = tensors["dropped_a"].to(self.device)
        self.dropped_b = tensors["dropped_b"].to(self.device)

    def delta(self) -> torch.Tensor:
        """scale * (B A) o M in the factors' type, ``[rows, columns]``."""
        return masked_product(self.a.data, self.b.data, self.packed, self.scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The delta's output for inputs ``[..., columns]``, in the inputs' type."""
        x = self.dropout(x)
        if self.packed is not None:
            return _MaskedLowRank.apply(x, None, self.a, self.b, self.packed, self.scale)
        with torch.autocast(x.device.type, enabled=False):
            return (x @ self.a.to(x.dtype).T) @ (self.b * self.scale).to(x.dtype).T

    def beside(self, linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """The outputs of the linear and the delta together.

        With a mask, weights in the factors' type and no dropout it is one product, with the sum of both matrices.
        """
        same = x.dtype == linear.weight.dtype == self.a.dtype and not torch.is_autocast_enabled(x.device.type)
        if same and self.packed is not None and not (self.training and self.dropout.p):
            output = _MaskedLowRank.apply(x, linear.weight, self.a, self.b, self.packed, self.scale)
            return output if linear.bias is None else output + linear.bias
        output = nn.functional.linear(x, linear.weight, linear.bias)
        return output + self(x.to(output.dtype))


@contextmanager
def attached(linears: Mapping[str, nn.Linear], adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """Within the block the linears add their adapters' outputs; afterwards they are as before."""
    chosen = {linears[name]: adapter for name, adapter in adapters.items()}
    for linear, adapter in chosen.items():
        vars(linear)["forward"] = partial(adapter.beside, linear)
    try:
        yield
    finally:
        for linear in chosen:
            del vars(linear)["forward"]


def merged(weight: torch.Tensor, adapter: Adapter, mask: torch.Tensor | None) -> torch.Tensor:
    """W + delta, added in float32, rounded once to the weight's type; masked entries exactly +0."""
    total = (weight.to(adapter.a.dtype) + adapter.delta()).to(weight.dtype)
    return total if mask is None else apply_mask(total, mask.to(weight.device))


def unmerged(weight: torch.Tensor, adapter: Adapter, mask: torch.Tensor) -> torch.Tensor:
    """W - delta under the adapter's present mask, rounded once; masked entries exactly +0."""
    total = (weight.to(adapter.a.dtype) - adapter.delta()).to(weight.dtype)
    return apply_mask(total, mask.to(weight.device))
