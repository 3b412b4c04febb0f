"""Statistics of what enters a linear, accumulated sequence by sequence so that the batch size does not matter."""

from __future__ import annotations

from typing import Any, Literal

import torch

from sparsedeploy.errors import UserError
from sparsedeploy.linear_algebra import add_gram, all_finite
from sparsedeploy.processes import Processes

Kind = Literal["none", "sum_squares", "hessian"]

# Short sequences wait until they make a product of this many rows: by sequences, so that batches do not show.
_ROWS_AT_ONCE = 1024


def richest(*kinds: Kind) -> Kind:
    """The kind that answers for all: the Hessian's diagonal holds the sums of squares."""
    return max(kinds, key=("none", "sum_squares", "hessian").index)


def never_reached(name: str) -> UserError:
    """What to raise for a linear that no calibration token reached."""
    return UserError(f"no calibration token reached {name}", "Use more or other calibration text.")


class InputStatistics:
    """Running sums over calibration sequences of the inputs ``X [tokens, columns]`` of one or more linears.

    Args:
        accumulate: the type of products and sums. In float64 the order of the sums no longer shows in the results.

    Attributes:
        sequences: how many were added; the driver counts those that ran through the layer, reached or not.
        rows: tokens that were added.
        linears: how many read this input.
        reused: several methods read the sums, so none may consume them.
        memo: what was derived from the complete sums and serves all linears with this input, such as a factorisation.
    """

    def __init__(self, columns: int, kind: Kind, device: torch.device, accumulate: torch.dtype = torch.float32) -> None:
        self.columns = columns
        self.kind = kind
        self.sequences = 0
        self.rows = 0
        self.linears = 1
        self.reused = False
        self._computed_in: torch.dtype | None = None
        self.memo: dict[object, Any] = {}
        shape = (columns, columns) if kind == "hessian" else (columns,)
        self._sum = torch.zeros(shape, dtype=accumulate, device=device)
        self._pending: list[torch.Tensor] = []

    def add(self, inputs: torch.Tensor, sequences: int) -> None:
        """Add the inputs of ``sequences`` sequences, ``[..., columns]``, one sequence at a time.

        Where their rows cannot be told apart (routed experts see some tokens only), they are added in one piece.
        """
        rows = inputs.detach().reshape(-1, self.columns)
        self._computed_in = inputs.dtype
        for part in rows.chunk(sequences) if len(rows) % sequences == 0 else (rows,):
            if self.kind == "hessian":
                self._pending.append(part)
                if sum(map(len, self._pending)) >= _ROWS_AT_ONCE:
                    self._add_pending()
            else:
                self._sum += part.to(self._sum.dtype).square().sum(dim=0)
        # What waits for the next batch may not keep all of this one in memory.
        self._pending = [part.clone() for part in self._pending]
        self.sequences += sequences
        self.rows += len(rows)

    def _add_pending(self) -> None:
        if self._pending:
            x = torch.cat(self._pending).to(self._sum.dtype)
            self._pending = []
            add_gram(self._sum, x.T.contiguous())

    @property
    def _total(self) -> torch.Tensor:
        """The sums, of everything that was added."""
        self._add_pending()
        return self._sum

    def combine(self, processes: Processes) -> None:
        """Add up what each process of a job accumulated over its share of the sequences."""
        processes.all_reduce(self._total)
        counts = torch.tensor([self.sequences, self.rows], device=self._total.device)
        processes.all_reduce(counts)
        self.sequences, self.rows = counts.tolist()

    @property
    def mean_square(self) -> torch.Tensor:
        """a_j = (1/sequences) sum over tokens of x_tj^2, fp32 ``[columns]``."""
        total = self._total.diagonal() if self.kind == "hessian" else self._total
        return (total / self.sequences).to(torch.float32)

    @property
    def hessian(self) -> torch.Tensor:
        """H = (2/sequences) X^T X, fp32 ``[columns, columns]``, exactly symmetric."""
        if self.kind != "hessian":
            raise ValueError("no Hessian was accumulated")
        whole = self._total.triu()
        whole += whole.triu(1).T
        return whole.mul_(2 / self.sequences).to(torch.float32)

    def consume_hessian(self) -> torch.Tensor:
        """The upper triangle of :attr:`hessian`; what is below it is not defined. Takes no memory of its own: the sums
        become the Hessian, and of them the diagonal alone stays here. Sums that are reused stay, and this is a copy.
        """
        if self.reused:
            return self.hessian
        if self.kind != "hessian":
            raise ValueError("no Hessian was accumulated, or it was already consumed")
        whole = self._total
        self._sum, self.kind = whole.diagonal().clone(), "sum_squares"
        return whole.mul_(2 / self.sequences).to(torch.float32)

    def assume_equal_inputs(self) -> None:
        """For a linear that no token reached: inputs of equal size everywhere, so that weights count by magnitude."""
        if self.kind == "hessian":
            self._sum.fill_diagonal_(1)
        else:
            self._sum.fill_(1)
        self.sequences = self.rows = 1

    def check(self, name: str) -> None:
        """Refuse statistics that are not finite or were never fed.

        Raises:
            UserError: naming the module.
        """
        if self.rows == 0:
            raise never_reached(name)
        if not all_finite(self._total) and self._computed_in == torch.float16:
            raise UserError(
                f"the inputs of {name} overflow float16, in which the model is computed",
                "Compute in a type with a larger range: --dtype bfloat16 or float32.",
            )
        if not all_finite(self._total):
            raise UserError(
                f"the inputs of {name} overflow or hold NaN on the calibration text",
                "Check the checkpoint, or compute in another type with --dtype float32.",
            )
