"""The optimizer of tokenizers."""

import pytest
import torch

from train.optim import MuonAdam, orthogonalized


@pytest.mark.parametrize("shape", [(4, 4), (3, 50), (64, 16)])
def test_singular_values_are_brought_near_1(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 1000
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_vectors_take_the_steps_of_torch_adam() -> None:
    ours = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizer = MuonAdam({}, {"vector": ours})
    reference = torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99))
    for number in range(1, 6):
        for parameter in (ours, theirs):
            parameter.grad = None
            (parameter.square().sum() * number).backward()
        optimizer.step(number, matrix_rate=0.0, rate=0.1)
        reference.step()
    assert ours.grad is None
    assert torch.allclose(ours, theirs, atol=1e-6)


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
