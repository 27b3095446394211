"""Implements the optimizer of tokenizers: Muon for matrices, Adam for the rest."""

from collections.abc import Mapping

import torch
from torch import Tensor

_MUON_MOMENTUM = 0.95
_ADAM_BETAS = (0.9, 0.99)
_ADAM_EPSILON = 1e-8
# Jordan et al. 2024: the quintic that brings singular values near 1 in five rounds.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class MuonAdam:
    """Applies Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) to `matrices`, Adam (arXiv 1412.6980) to `others`.

    Both are named parameters. All state is in `state`: named tensors, as a checkpoint needs them. torch.optim is not used:
    its Muon computes in bfloat16, 26 times slower than this on CPUs without bfloat16 units, and its first step
    imports torch's compiler, which takes longer than a tenth of a small fit.
    """

    def __init__(self, matrices: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        self.matrices = dict(matrices)
        self.others = dict(others)
        self.state: dict[str, Tensor] = {f"momentum.{name}": torch.zeros_like(p) for name, p in matrices.items()}
        for moment in ("first", "second"):
            self.state |= {f"{moment}.{name}": torch.zeros_like(p) for name, p in others.items()}

    @torch.no_grad()
    def step(self, number: int, *, matrix_rate: float, rate: float) -> None:
        """Takes step `number` (from 1) along the gradients, which every parameter must have, and clears them."""
        for name, parameter in self.matrices.items():
            gradient, momentum = _taken(parameter), self.state[f"momentum.{name}"]
            momentum.mul_(_MUON_MOMENTUM).add_(gradient)
            rows, columns = parameter.shape
            update = orthogonalized(gradient.add_(momentum, alpha=_MUON_MOMENTUM))
            parameter.add_(update, alpha=-matrix_rate * max(1.0, rows / columns) ** 0.5)
        beta_1, beta_2 = _ADAM_BETAS
        for name, parameter in self.others.items():
            gradient = _taken(parameter)
            first = self.state[f"first.{name}"].lerp_(gradient, 1 - beta_1)
            second = self.state[f"second.{name}"].mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
            spread = (second / (1 - beta_2**number)).sqrt_().add_(_ADAM_EPSILON)
            parameter.addcdiv_(first, spread, value=-rate / (1 - beta_1**number))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Returns the matrix with its singular values brought to between 0.7 and 1.2, by five Newton-Schulz rounds."""
    a, b, c = _QUINTIC
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = a * wide + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def _taken(parameter: Tensor) -> Tensor:
    """Takes the gradient away from the parameter and returns it."""
    gradient = parameter.grad
    if gradient is None:
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no gradient: run backward first")
    parameter.grad = None
    return gradient
