"""Defines the networks of the grid tokenizer: pixels to a grid of latents and back.

Axes: B rows, H W pixels, C channels, h = H / patch and w = W / patch grid cells, D latent, E width.

An encoder is any module that maps (B, H, W, C) to (B, h, w, D), a decoder maps back; another pair (a ViT, say) can be
added here and named in `GridNetwork`. This pair is made to be fitted on one CPU core in a minute. Each side is a linear
map, which `start_from` sets to the principal components of patches, plus a residual trunk of ConvNeXt blocks on the grid
whose last layer starts at zero: with a k-means codebook, fitting begins at vector quantization of principal components and
can only get better. All layers are convolutional, so that they take windows of any size in whole patches.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tokenize_jobs.quantizers.vq import Codebook

# Scale of the class logits: at 8, a pixel whose decoded channels equal a class's own has that class with p > 0.99.
_LOGIT_SCALE = 8.0


def patchify(pixels: Float[Tensor, "B H W C"], patch: int) -> Float[Tensor, "B h w F"]:
    """Cuts pixels into patches of F = patch * patch * C values, in the order row, column, channel."""
    b, height, width, c = pixels.shape
    grid = pixels.reshape(b, height // patch, patch, width // patch, patch, c)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(b, height // patch, width // patch, patch * patch * c)


def unpatchify(patches: Float[Tensor, "B h w F"], patch: int) -> Float[Tensor, "B H W C"]:
    """Puts patches back together; the inverse of `patchify`."""
    b, h, w, f = patches.shape
    grid = patches.reshape(b, h, w, patch, patch, f // patch**2)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, f // patch**2)


class Block(nn.Module):
    """Applies a ConvNeXt block (arXiv 2201.03545, fig. 4) with 3 x 3 depthwise kernels and ReLU.

    GELU and 5 x 5 kernels took more time here and fitted no better.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Float[Tensor, "B h w E"]) -> Float[Tensor, "B h w E"]:
        # Permuting gives a channels-last view, without a copy.
        y = self.depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.scale * self.contract(torch.relu(self.expand(self.norm(y))))


class Trunk(nn.Module):
    """Adds a linear map and a residual stack of blocks, both from `inputs` to `outputs` channels."""

    def __init__(self, inputs: int, width: int, blocks: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Float[Tensor, "B h w inputs"]) -> Float[Tensor, "B h w outputs"]:
        return self.linear(x) + self.head(self.norm(self.blocks(self.stem(x))))


class Encoder(nn.Module):
    """Encodes pixels as latents."""

    def __init__(self, *, channels: int, patch: int, latent: int, width: int, blocks: int) -> None:
        super().__init__()
        self.patch = patch
        self.trunk = Trunk(channels * patch**2, width, blocks, latent)

    def forward(self, pixels: Float[Tensor, "B H W C"]) -> Float[Tensor, "B h w D"]:
        return self.trunk(patchify(pixels, self.patch))


class Decoder(nn.Module):
    """Decodes latents to pixels."""

    def __init__(self, *, channels: int, patch: int, latent: int, width: int, blocks: int) -> None:
        super().__init__()
        self.patch = patch
        self.trunk = Trunk(latent, width, blocks, channels * patch**2)

    def forward(self, latents: Float[Tensor, "B h w D"]) -> Float[Tensor, "B H W C"]:
        return unpatchify(self.trunk(latents), self.patch)


class GridNetwork(nn.Module):
    """Joins encoder, codebook and decoder; maps of classes are embedded before and classified after them.

    `channels` are those of the encoder's pixels; with `classes` > 0 they are the channels of the class embedding, which
    is fixed (unit vectors, orthogonal if `channels` suffice) and has `classes` + 1 rows: the last is the null class, which
    is an input and never an output. On a GPU raise `width` to 512, the blocks to 8 each, `codebook` to 8192 or 16384.
    """

    embedding: Tensor | None

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        patch: int,
        codebook: int,
        latent: int,
        width: int,
        encoder_blocks: int,
        decoder_blocks: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.register_buffer("embedding", torch.empty(classes + 1, channels) if classes else None)
        self.encoder = Encoder(channels=channels, patch=patch, latent=latent, width=width, blocks=encoder_blocks)
        self.codebook = Codebook(codebook, latent)
        self.decoder = Decoder(channels=channels, patch=patch, latent=latent, width=width, blocks=decoder_blocks)
        self.classifier = nn.Linear(channels, classes) if classes else None

    def pixels(self, inputs: Tensor) -> Float[Tensor, "B H W C"]:
        """Returns what the encoder sees: float32 (B, H, W, C) unchanged, int64 classes (B, H, W) embedded."""
        return inputs if self.embedding is None else self.embedding[inputs]

    def latents(self, inputs: Tensor) -> Float[Tensor, "B h w D"]:
        """Returns continuous latents of prepared labels."""
        return self.encoder(self.pixels(inputs))

    def outputs(self, latents: Float[Tensor, "B h w D"]) -> Float[Tensor, "B H W outputs"]:
        """Returns pixels in the prepared scale, or logits of classes."""
        pixels = self.decoder(latents)
        return pixels if self.classifier is None else self.classifier(pixels)

    def encode(self, inputs: Tensor) -> Int64[Tensor, "B h w"]:
        """Returns the codes of prepared labels."""
        return self.codebook.nearest(self.latents(inputs))

    def decode(self, codes: Int64[Tensor, "B h w"]) -> Float[Tensor, "B H W outputs"]:
        """Returns `outputs` of the codes' latents."""
        return self.outputs(self.codebook(codes))


def empty(**shape: int) -> GridNetwork:
    """Returns a GridNetwork without values, on the meta device: it draws no random numbers and takes no memory."""
    with torch.device("meta"):
        return GridNetwork(**shape)


@torch.no_grad()
def initialize(network: GridNetwork, generator: torch.Generator) -> None:
    """Gives every parameter of an `empty` network its first value, on the CPU, from `generator` alone.

    Torch's constructors draw from the process's own generator, which other threads may be using; it stays untouched.
    """
    # Not `to_empty`, which imports sympy for tensors of the meta device and takes seconds.
    memory = {name: torch.empty(tensor.shape) for name, tensor in network.state_dict().items()}
    network.load_state_dict(memory, assign=True)
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, (3 * fan_in) ** -0.5, generator=generator)
            module.get_parameter("bias").zero_()
        elif isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
        elif isinstance(module, Block):
            # ConvNeXt's 1e-6 would keep a fit of a few hundred steps from using its blocks at all.
            module.scale.fill_(0.1)
    # The residual trunks start at zero, so that the linear maps decide at first.
    network.encoder.trunk.head.weight.zero_()
    network.decoder.trunk.head.weight.zero_()
    network.codebook.codes.zero_()
    if network.embedding is not None and network.classifier is not None:
        classes, channels = network.embedding.shape
        rows = torch.randn(classes, channels, generator=generator)
        network.embedding.copy_(torch.eye(classes, channels) if classes <= channels else unit(rows))
        network.classifier.weight.copy_(_LOGIT_SCALE * network.embedding[:-1])


def unit(rows: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    """Scales rows to length 1."""
    return torch.nn.functional.normalize(rows, dim=-1)


@torch.no_grad()
def start_from(network: GridNetwork, patches: Float[Tensor, "N F"], generator: torch.Generator) -> None:
    """Sets the linear maps to the principal components of `patches` (N >= 1), with latents of mean square 1."""
    latent = network.codebook.codes.shape[1]
    mean = patches.mean(dim=0)
    axes = _principal_axes(patches - mean, latent, generator)
    scale = ((patches - mean) @ axes.T).square().mean().sqrt().clamp(min=1e-6)
    into, back = network.encoder.trunk.linear, network.decoder.trunk.linear
    into.weight.copy_(axes / scale)
    into.bias.copy_(-(axes @ mean) / scale)
    back.weight.copy_(axes.T * scale)
    back.bias.copy_(mean)


def _principal_axes(centered: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Finds the first `count` principal axes, (count, F): randomized subspace iteration (Halko et al. 2011, 4.4).

    torch.svd_lowrank does the same but draws from the process's own generator.
    """
    # Eight extra axes make the wanted ones exact after three rounds.
    draws = torch.randn(centered.shape[1], count + 8, generator=generator).to(centered.device)
    basis = torch.linalg.qr(draws).Q
    for _ in range(3):
        basis = torch.linalg.qr(centered.T @ (centered @ basis)).Q
    small = centered @ basis
    _, vectors = torch.linalg.eigh(small.T @ small)
    # eigh sorts ascending.
    return (basis @ vectors.flip(1))[:, :count].T.contiguous()
