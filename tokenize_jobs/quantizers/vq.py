"""Quantizes vectors by a Euclidean codebook: nearest codes, started by k-means and updated by moving averages.

The codebook has no gradient: each code is the moving average of the latents that chose it (van den Oord et al.,
arXiv 1711.00937, appendix A.1), and a code that too few latents choose is moved onto a latent of the batch. Distances are
Euclidean, not cosine: latents start as principal components, whose squared distance is the squared error in pixels, and
cosine fitted 1.5 dB worse in equal time.
"""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

# Latents compared at a time, so that the matrix of distances, rows x codes, stays in the processor's cache.
_ROWS = 1024


class Codebook(nn.Module):
    """Holds K codes of D values, as a buffer, since fitting moves them without a gradient."""

    codes: Tensor

    def __init__(self, size: int, latent: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.empty(size, latent))

    @torch.no_grad()
    def nearest(self, latents: Float[Tensor, "*grid D"]) -> Int64[Tensor, "*grid"]:
        """Returns the index of the nearest code of each latent; of equally near codes the first."""
        rows = latents.reshape(-1, latents.shape[-1])
        half_norms = self.codes.square().sum(dim=1).mul(0.5)
        # |x - c|^2 without |x|^2, which does not change the choice.
        chosen = [torch.addmm(half_norms, part, self.codes.T, alpha=-1).argmin(dim=1) for part in rows.split(_ROWS)]
        return torch.cat(chosen).reshape(latents.shape[:-1])

    def forward(self, indices: Int64[Tensor, "*grid"]) -> Float[Tensor, "*grid D"]:
        """Returns the codes at `indices`."""
        return self.codes[indices]


class MovingAverages:
    """Holds what fitting knows of a codebook besides its codes: how often each is chosen, and the sum of its latents.

    `count` (K,) float32 and `total` (K, D) float32 are moving averages over batches. They are part of a checkpoint, not of
    the fitted tokenizer.
    """

    def __init__(self, count: Float[Tensor, "K"], total: Float[Tensor, "K D"]) -> None:
        self.count = count
        self.total = total

    @torch.no_grad()
    def update(
        self,
        codebook: Codebook,
        latents: Float[Tensor, "N D"],
        indices: Int64[Tensor, "N"],
        *,
        decay: float,
        rng: np.random.Generator,
    ) -> int:
        """Moves the codes of `codebook` towards the latents that chose them; returns how many dead codes were replaced.

        A code is dead if its average count is under 1/32 of an even share (as in 4M's tokenizers). `rng` alone decides
        which latents replace dead codes.
        """
        size = len(self.count)
        count, total = _sums(latents, indices, size)
        self.count.mul_(decay).add_(count, alpha=1 - decay)
        self.total.mul_(decay).add_(total, alpha=1 - decay)
        share = len(latents) / size
        dead = self.count < share / 32
        picks = torch.from_numpy(rng.integers(len(latents), size=size)).to(latents.device)
        self.count[dead] = share / 8
        self.total[dead] = latents[picks[dead]] * (share / 8)
        codebook.codes.copy_(self.total / self.count.unsqueeze(1))
        return int(dead.sum())


@torch.no_grad()
def start_codebook(
    codebook: Codebook, latents: Float[Tensor, "N D"], *, rounds: int, batch: int, rng: np.random.Generator
) -> MovingAverages:
    """Sets the codes by k-means of `latents` (Lloyd's algorithm); empty clusters are moved onto random latents.

    Returns the averages as they would be after many batches of `batch` latents like these. With fewer latents than
    codes some codes are equal; `nearest` then chooses the first of them.
    """
    size, count_all = len(codebook.codes), len(latents)
    first = rng.choice(count_all, size=size, replace=count_all < size)
    codebook.codes.copy_(latents[torch.from_numpy(first).to(latents.device)])
    count = torch.zeros(size, device=latents.device)
    for _ in range(rounds):
        count, total = _sums(latents, codebook.nearest(latents), size)
        means = total / count.clamp(min=1).unsqueeze(1)
        picks = torch.from_numpy(rng.integers(count_all, size=size)).to(latents.device)
        codebook.codes.copy_(torch.where((count > 0).unsqueeze(1), means, latents[picks]))
    share = (count * (batch / count_all)).clamp(min=batch / size / 8)
    return MovingAverages(share, codebook.codes * share.unsqueeze(1))


def _sums(latents: Float[Tensor, "N D"], indices: Int64[Tensor, "N"], size: int) -> tuple[Tensor, Tensor]:
    """Returns how many latents chose each code (K,) float32, and their sums (K, D).

    On a CPU index_add_ adds in the order of the rows; on a GPU the order, and the last bits, may differ.
    """
    total = torch.zeros(size, latents.shape[1], device=latents.device).index_add_(0, indices, latents)
    return torch.bincount(indices, minlength=size).float(), total
