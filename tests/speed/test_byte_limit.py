"""The byte limit: golden values, and one artifact counted by hand."""

import dataclasses

import pytest

from sparsedeploy.errors import UserError
from sparsedeploy.speed.byte_limit import bitmask_limit, bytes_per_token, decode_limit
from tests.runtimes.artifacts import describe


@pytest.mark.parametrize(
    ("bits", "sparsity", "limit"),
    [
        (16, 0.5, 1.78),
        (16, 0.6, 2.16),
        (16, 0.7, 2.76),
        (32, 0.5, 1.88),
        (32, 0.6, 2.32),
        (32, 0.7, 3.02),
        (32, 0.0, 1.0),
        (32, 0.01, 1.0),
        (32, 1.0, 32.0),
    ],
)
def test_bitmask_limit(bits: int, sparsity: float, limit: float) -> None:
    assert bitmask_limit(sparsity, bits) == pytest.approx(limit, abs=0.005)


def test_output_matrix_is_read_densely_and_lowers_the_limit() -> None:
    dense = describe(weights=1000, zeros=0, vocab=50, hidden=10)
    pruned = describe(weights=1000, zeros=500, vocab=50, hidden=10)
    # 1000 weights of 4 bytes and 50 x 10 of the output matrix; pruned: 1 bit for each weight, 4 bytes for every second.
    assert bytes_per_token(dense) == 4000 + 2000
    assert bytes_per_token(pruned) == 125 + 2000 + 2000
    assert decode_limit(pruned, dense) == pytest.approx(6000 / 4125)
    assert decode_limit(dense, dense) == 1.0


def test_unknown_dtype() -> None:
    with pytest.raises(UserError, match=r"the size of dtype 'fp4' is not known"):
        bytes_per_token(dataclasses.replace(describe(), dtype="fp4"))
