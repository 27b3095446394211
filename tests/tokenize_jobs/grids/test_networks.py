"""The networks of the grid tokenizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenize_jobs.grids.networks import empty, initialize, patchify, start_from, unpatchify

SHAPE = {
    "channels": 3,
    "classes": 0,
    "patch": 8,
    "codebook": 16,
    "latent": 4,
    "width": 8,
    "encoder_blocks": 1,
    "decoder_blocks": 1,
}


def built(seed: int = 0, **changes: int):
    network = empty(**(SHAPE | changes))
    initialize(network, torch.Generator().manual_seed(seed))
    return network


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_patches_go_back_to_where_they_came_from(b: int, h: int, w: int, patch: int, c: int) -> None:
    pixels = torch.arange(b * h * patch * w * patch * c).reshape(b, h * patch, w * patch, c)
    patches = patchify(pixels, patch)
    assert patches.shape == (b, h, w, patch * patch * c)
    assert torch.equal(patches[0, 0, 0], pixels[0, :patch, :patch].flatten())
    assert torch.equal(unpatchify(patches, patch), pixels)


def test_first_values_depend_on_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = built(0), built(0), built(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.encoder.trunk.stem.weight, other.encoder.trunk.stem.weight)


def test_starts_as_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    # Patches in a four-dimensional subspace, which four components hold without loss.
    patches = torch.randn(500, 4, generator=generator) @ torch.randn(4, 192, generator=generator) + 0.3
    network = built()
    start_from(network, patches, generator)
    pixels = unpatchify(patches[:6].reshape(1, 2, 3, 192), 8)
    with torch.no_grad():
        latents = network.latents(pixels)
        assert torch.allclose(network.outputs(latents), pixels, atol=1e-3)
        everything = network.encoder.trunk(patches.reshape(1, 20, 25, 192))
    assert everything.square().mean().item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("channels", [6, 3])
def test_each_class_is_read_back_from_its_own_embedding(channels: int) -> None:
    network = built(classes=5, channels=channels)
    assert network.embedding is not None
    assert network.classifier is not None
    assert network.embedding.shape == (6, channels)
    assert network.classifier(network.embedding[:-1]).argmax(dim=1).tolist() == [0, 1, 2, 3, 4]
    assert not any(parameter.shape == (6, channels) for parameter in network.parameters())
