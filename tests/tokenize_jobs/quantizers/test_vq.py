"""The codebook."""

import numpy as np
import torch

from tokenize_jobs.quantizers.vq import Codebook, MovingAverages, start_codebook


def blobs(count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents around eight far corners, and the corners."""
    corners = torch.tensor([[x, y, z] for x in (-4.0, 4.0) for y in (-4.0, 4.0) for z in (-4.0, 4.0)])
    noise = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))
    return corners[torch.arange(count) % 8] + 0.1 * noise, corners


def test_nearest_is_nearest_and_the_first_of_equals() -> None:
    codebook = Codebook(5, 3)
    codebook.codes.copy_(torch.tensor([[0.0, 0, 1], [0, 2, 0], [0, 2, 0], [3, 3, 3], [-1, 0, 0]]))
    latents = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.cdist(latents, codebook.codes.expand(2, 5, 3)).argmin(dim=2)
    assert torch.equal(codebook.nearest(latents), expected)
    assert codebook.nearest(torch.tensor([[0.0, 2.1, 0]])).tolist() == [1]


def test_many_latents_are_chosen_for_as_few_are() -> None:
    codebook = Codebook(8, 3)
    codebook.codes.copy_(blobs()[1])
    latents, _ = blobs(3000)
    assert torch.equal(codebook.nearest(latents)[2990:], codebook.nearest(latents[2990:]))


def test_k_means_finds_the_clusters() -> None:
    latents, corners = blobs()
    codebook = Codebook(8, 3)
    # With empty clusters moved onto random latents, all eight are found in the end.
    averages = start_codebook(codebook, latents, rounds=30, batch=100, rng=np.random.default_rng(0))
    distances = torch.cdist(corners, codebook.codes)
    assert distances.min(dim=1).values.median() < 0.1
    assert torch.isclose(averages.count.sum(), torch.tensor(100.0), rtol=0.05)


def test_fewer_latents_than_codes_is_no_error() -> None:
    codebook = Codebook(16, 3)
    start_codebook(codebook, blobs(5)[0], rounds=2, batch=5, rng=np.random.default_rng(0))
    assert torch.isfinite(codebook.codes).all()


def test_codes_follow_the_latents_that_chose_them() -> None:
    latents, corners = blobs()
    codebook = Codebook(8, 3)
    codebook.codes.copy_(corners * 0.5)
    averages = MovingAverages(torch.full((8,), 37.5), codebook.codes * 37.5)
    rng = np.random.default_rng(0)
    replaced = [averages.update(codebook, latents, codebook.nearest(latents), decay=0.5, rng=rng) for _ in range(20)]
    assert sum(replaced) == 0
    assert torch.allclose(codebook.codes, corners, atol=0.1)


def test_dead_codes_move_onto_latents_that_the_generator_picks() -> None:
    latents, corners = blobs()

    def run(seed: int) -> tuple[torch.Tensor, int]:
        codebook = Codebook(8, 3)
        codebook.codes.copy_(corners)
        codebook.codes[3] = 1000.0
        averages = MovingAverages(torch.full((8,), 37.5), codebook.codes * 37.5)
        averages.count[3], averages.total[3] = 0.01, 10.0
        indices = codebook.nearest(latents)
        replaced = averages.update(codebook, latents, indices, decay=0.9, rng=np.random.default_rng(seed))
        return codebook.codes, replaced

    codes, replaced = run(0)
    assert replaced == 1
    assert torch.cdist(codes[3:4], latents).min() < 1e-4
    assert torch.equal(codes, run(0)[0])
    assert not torch.equal(codes[3], run(1)[0][3])
