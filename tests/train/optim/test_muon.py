"""The optimizer of tokenizers."""

import pytest
import torch

from train.optim.muon import MuonAdam, orthogonalized


@pytest.mark.parametrize("shape", [(4, 4), (3, 50), (64, 16)])
def test_singular_values_are_brought_near_1(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 1000
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_vectors_take_the_steps_of_adam() -> None:
    vector = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = MuonAdam({}, {"vector": vector})
    vector.grad = torch.tensor([0.5, -8.0])
    optimizer.step(1, matrix_rate=0.0, rate=0.1)
    # The first step is the rate times the sign.
    assert torch.allclose(vector, torch.tensor([0.9, -1.9]), atol=1e-6)
    assert vector.grad is None
    vector.grad = torch.tensor([-0.5, 0.0])
    optimizer.step(2, matrix_rate=0.0, rate=0.1)
    # Means 0.9 * 0.05 - 0.05 and 0.9 * -0.8, over 1 - 0.81; squares 0.004975 and 0.99 * 0.64, over 1 - 0.9801.
    step = torch.tensor([-0.005 / 0.19 / 0.5, -0.72 / 0.19 / (0.6336 / 0.0199) ** 0.5])
    assert torch.allclose(vector, torch.tensor([0.9, -1.9]) - 0.1 * step, atol=1e-5)


def test_matrices_take_orthogonal_steps_along_their_momentum() -> None:
    matrix = torch.nn.Parameter(torch.zeros(8, 2))
    optimizer = MuonAdam({"matrix": matrix}, {})
    matrix.grad = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    expected = orthogonalized(matrix.grad * 1.95) * -0.1 * 2.0
    optimizer.step(1, matrix_rate=0.1, rate=0.0)
    assert torch.allclose(matrix, expected, atol=1e-6)
    assert optimizer.state["momentum.matrix"].abs().sum() > 0


def test_a_missing_gradient_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\) has no gradient"):
        MuonAdam({}, {"vector": torch.nn.Parameter(torch.zeros(3))}).step(1, matrix_rate=0.1, rate=0.1)
