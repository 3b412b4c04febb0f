"""Values of few bits: a code times a scale that a group of columns shares, and the choice of the scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What the largest value of a group is multiplied by before it is put at the end of the codes: less than 1 cuts it
# off in favour of all others.
_SHARES = tuple(1 - 0.04 * step for step in range(11))
KINDS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Grid:
    """Codes of ``bits`` bits, with a float16 scale for every ``group`` columns of a row.

    8 bits: -127 to 127. 4 bits: -8 to 7, with a scale of either sign, so that the side of the larger values gets the
    longer end; both are what GGUF's Q8_0 and Q4_0 can hold.
    """

    bits: int
    group: int = 32

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        return (-8, 7) if self.bits == 4 else (-127, 127)

    def groups(self, columns: int) -> int:
        """How many scales a row of ``columns`` has."""
        return -(-columns // self.group)

    def codes(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The nearest codes, in the type of ``values``; the two shapes broadcast."""
        return (values / scales).round_().clamp_(*self.ends)

    def choose_scales(self, values: torch.Tensor, kept: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        """The scale of one group for every row: of a few candidates the one with the least weighted squared error.

        Args:
            values: ``[columns of the group, rows]``.
            kept: 1 where a value stays and 0 where it is pruned, of the same shape.
            importance: ``[columns of the group]``, what a squared error in a column weighs.

        Returns:
            ``[rows]``, each a number that float16 holds and not 0; 1 for a group without values.
        """
        import torch

        values = values * kept
        extreme = values.gather(0, values.abs().argmax(dim=0, keepdim=True)).squeeze(0)
        low, high = self.ends
        starts = [extreme / high] if self.bits == 8 else [extreme / low, extreme / high]
        weight = importance[:, None]
        best = torch.ones_like(extreme)
        least = torch.full_like(extreme, torch.inf)
        for start in starts:
            for share in _SHARES:
                scale = (start * share).to(torch.float16).to(values.dtype)
                scale = torch.where(scale == 0, 1, scale)
                error = self.codes(values, scale).mul_(scale).sub_(values).square_().mul_(weight).sum(dim=0)
                better = error < least
                best, least = torch.where(better, scale, best), torch.where(better, error, least)
        return best


def by_column(scales: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """Scales ``[rows, groups]``, one for every column: float32 ``[rows, columns]``."""
    return scales.float().repeat_interleave(group, dim=1)[:, :columns]


def codes_of(weight: torch.Tensor, scales: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The codes that a weight was made of, int8 ``[rows, columns]``.

    They are exact for weights in float32, float16 and bfloat16, whose rounding of a code times its scale is less than
    half a code.

    Args:
        weight: ``[rows, columns]``.
        scales: float16 ``[rows, groups]``.
    """
    import torch

    return grid.codes(weight.float(), by_column(scales, grid.group, weight.shape[1])).to(torch.int8)
