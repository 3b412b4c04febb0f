"""Products and the factorisation made of them, against float64."""

import pytest
import torch

from sparsedeploy.linear_algebra import add_gram, add_product, upper_cholesky_


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 5, 7), (400, 300, 500)], ids=["torch's product", "oneDNN's product"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_product_is_added_in_place(shape: tuple[int, int, int], sign: int) -> None:
    m, k, n = shape
    left, right, total = random(m, k), random(n, k, seed=1).T, random(m, 2 * n, seed=2)
    expected = total.double()
    expected[:, n:] += sign * left.double() @ right.double()
    add_product(total[:, n:], left, right, sign)
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 128, 129, 700])
def test_a_gram_matrix_is_right_in_its_upper_triangle(size: int) -> None:
    x, total = random(size, 90), random(size, size, seed=1)
    expected = (total.double() + x.double() @ x.double().T).triu()
    add_gram(total, x)
    torch.testing.assert_close(total.triu().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 128, 129, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_factor_is_upper_triangular_and_gives_the_matrix_back(size: int, dtype: torch.dtype) -> None:
    x = random(size, 2 * size).double()
    matrix = x @ x.T + torch.eye(size)
    factor = matrix.to(dtype).triu()
    assert upper_cholesky_(factor)
    assert not factor.tril(-1).any()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    error = (factor.double() @ factor.double().T - matrix).abs().max() / matrix.abs().max()
    assert error < tolerance


@pytest.mark.parametrize("where", [0, 699])
def test_a_matrix_that_is_not_positive_definite_is_told(where: int) -> None:
    matrix = torch.eye(700)
    matrix[where, where] = -1
    assert not upper_cholesky_(matrix)
