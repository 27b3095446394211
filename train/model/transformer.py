"""Defines the any-to-any model: an encoder over the tokens that are given, a decoder for the tokens that are asked for.

It follows 4M (arXiv 2312.06647; apple/ml-4m, fourm/models/fm.py): pre-norm blocks without biases, SwiGLU, fixed sine
positions (on grids at other frequencies), a learned embedding of each modality; targets of a grid see each other, those of
a sequence see what is before them, and those of different modalities do not see each other. Unlike there, all modalities
share one token table and one head table (with an offset each), and only the tokens that the mask chose are embedded: they
stay packed, T or U rows of D, and are laid out by sample for attention alone.

Letters: B samples, T inputs, U targets, D width, H heads, N longest sample.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from manifests.errors import ConfigError
from train.data.batch import MaskedBatch
from train.data.hashing import name_hash
from train.data.vocabulary import Vocabulary

_WIDTH_A_DEPTH = 64
_NORM_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Holds the size of a model. `depth` sets it: width 64 x depth, `depth` heads, and `depth` blocks on either side.

    Depth 6 is 4M's Ti, 8 its S, 12 its B; L and XL set `dim` and `heads` themselves.
    """

    depth: PositiveInt = 12
    dim: PositiveInt | None = None
    heads: PositiveInt | None = None
    encoder_depth: PositiveInt | None = None
    decoder_depth: PositiveInt | None = None
    mlp_ratio: PositiveFloat = 4.0

    @property
    def width(self) -> int:
        """Returns D. Raises ConfigError if it does not divide into heads of an even width."""
        width = self.dim or _WIDTH_A_DEPTH * self.depth
        if width % (4 * self.head_count):
            raise ConfigError(
                f"model: width {width} with {self.head_count} heads; expected dim to be a multiple of 4 x heads"
            )
        return width

    @property
    def head_count(self) -> int:
        """Returns H."""
        return self.heads or self.depth

    @property
    def hidden(self) -> int:
        """Returns the width inside a block's gated MLP: two thirds of a plain one's."""
        return int(2 / 3 * self.mlp_ratio * self.width)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Lays packed rows out by sample: row i goes to `place[i]` of B x N."""

    samples: int
    longest: int
    place: Int64[Tensor, "T"]

    @classmethod
    def of(cls, sample: Int64[Tensor, "T"], samples: int) -> "Layout":
        """Returns the layout of rows that are sorted by sample."""
        counts = torch.bincount(sample, minlength=samples)
        longest = max(1, int(counts.max()))
        first = counts.cumsum(0) - counts
        within = torch.arange(len(sample), device=sample.device) - first[sample]
        return cls(samples=samples, longest=longest, place=sample * longest + within)

    def spread(self, packed: Tensor) -> Tensor:
        """Turns (T, ...) into (B, N, ...), zeros at places without a row."""
        laid = packed.new_zeros((self.samples * self.longest, *packed.shape[1:]))
        return laid.index_copy(0, self.place, packed).unflatten(0, (self.samples, self.longest))

    def gather(self, laid: Tensor) -> Tensor:
        """Turns (B, N, ...) back into (T, ...)."""
        return laid.flatten(0, 1).index_select(0, self.place)

    def filled(self) -> Bool[Tensor, "B N"]:
        """Returns which places hold a row."""
        return self.spread(torch.ones_like(self.place, dtype=torch.bool))


@dataclass(frozen=True, kw_only=True)
class Context:
    """Holds the encoder's output for B samples, as the decoder attends to it; `seen` (B, 1, 1, N) marks places in use."""

    hidden: Float[Tensor, "T D"]
    layout: Layout
    seen: Bool[Tensor, "B 1 1 N"]


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=_NORM_EPSILON, bias=False)


class Mlp(nn.Module):
    """Computes SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class SelfAttention(nn.Module):
    """Computes the attention of packed rows among themselves."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, layout: Layout, seen: Tensor) -> Tensor:
        q, k, v = (_by_head(part, self.heads) for part in layout.spread(self.qkv(x)).chunk(3, dim=-1))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(layout.gather(attended.transpose(1, 2).flatten(2)))


class CrossAttention(nn.Module):
    """Computes the attention of packed rows to those of a context."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def look_at_alike(self) -> None:
        """Makes keys of queries, and both large: a target begins by looking at what stands where it stands.

        With the grid's positions a small model then copies 14 x 14 cells after 54 to 84 steps, without it not in 300.
        """
        with torch.no_grad():
            self.q.weight.mul_(1.5)
            self.kv.weight[: len(self.q.weight)] = self.q.weight

    def forward(self, x: Tensor, layout: Layout, context: Tensor, about: Context) -> Tensor:
        q = _by_head(layout.spread(self.q(x)), self.heads)
        k, v = (_by_head(part, self.heads) for part in about.layout.spread(self.kv(context)).chunk(2, dim=-1))
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=about.seen)
        return self.out(layout.gather(attended.transpose(1, 2).flatten(2)))


class EncoderBlock(nn.Module):
    """Applies self-attention and MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = _norm(config.width)
        self.attention = SelfAttention(config.width, config.head_count)
        self.norm_2 = _norm(config.width)
        self.mlp = Mlp(config.width, config.hidden)

    def forward(self, x: Tensor, layout: Layout, seen: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), layout, seen)
        return x + self.mlp(self.norm_2(x))


class DecoderBlock(nn.Module):
    """Applies self-attention, attention to the context, and MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_1 = _norm(config.width)
        self.attention = SelfAttention(config.width, config.head_count)
        self.query_norm = _norm(config.width)
        self.context_norm = _norm(config.width)
        self.cross = CrossAttention(config.width, config.head_count)
        self.norm_2 = _norm(config.width)
        self.mlp = Mlp(config.width, config.hidden)

    def forward(self, x: Tensor, layout: Layout, seen: Tensor, about: Context) -> Tensor:
        x = x + self.attention(self.norm_1(x), layout, seen)
        x = x + self.cross(self.query_norm(x), layout, self.context_norm(about.hidden), about)
        return x + self.mlp(self.norm_2(x))


class Model(nn.Module):
    """Holds an encoder and a decoder over the modalities of a vocabulary."""

    def __init__(self, vocabulary: Vocabulary, config: ModelConfig) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.config = config
        width = config.width
        self.tokens = nn.Embedding(vocabulary.size, width)
        self.head = nn.Linear(width, vocabulary.size, bias=False)
        self.modalities = nn.Embedding(len(vocabulary.modalities), width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.encoder = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_depth or config.depth))
        self.encoder_norm = _norm(width)
        self.to_context = nn.Linear(width, width)
        self.decoder = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_depth or config.depth))
        self.decoder_norm = _norm(width)
        table, starts = positions(vocabulary, width)
        self.register_buffer("position_table", table, persistent=False)
        self.register_buffer("position_start", starts, persistent=False)
        ordered = torch.tensor([modality.sequence for modality in vocabulary.modalities])
        self.register_buffer("ordered", ordered, persistent=False)

    def initialize(self, seed: int) -> None:
        """Fills every parameter from a generator of its own, keyed by its name: parts of a model can be made alone."""
        for name, parameter in self.named_parameters():
            if isinstance(self.get_submodule(name.rpartition(".")[0]), nn.LayerNorm):
                nn.init.ones_(parameter)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
            else:
                generator = torch.Generator(parameter.device).manual_seed(name_hash(seed, name) & (2**63 - 1))
                spread = (2.0 / sum(parameter.shape)) ** 0.5
                if name == "head.weight":
                    spread = 0.02
                elif name.startswith(("tokens.", "modalities.", "mask_token")):
                    # As large as sine positions, which would drown smaller ones: with 4M's 0.02 the captions of a small
                    # model cost 2.0 nats a token after 450 steps, so 1.6.
                    spread = 0.5
                with torch.no_grad():
                    parameter.normal_(0.0, spread, generator=generator)
        for module in self.modules():
            if isinstance(module, CrossAttention):
                module.look_at_alike()

    def encode(
        self,
        ids: Int64[Tensor, "T"],
        modality: Int64[Tensor, "T"],
        position: Int64[Tensor, "T"],
        sample: Int64[Tensor, "T"],
        samples: int,
    ) -> Context:
        """Encodes the inputs; rows are sorted by sample, and a sample may have no rows."""
        layout = Layout.of(sample, samples)
        seen = layout.filled()
        # A softmax over nothing is not a number: a sample without inputs looks at one empty place.
        seen[:, 0] = True
        seen = seen[:, None, None, :]
        where = self.where(modality, position)
        x = self.tokens(ids) + where
        for block in self.encoder:
            x = block(x, layout, seen)
        return Context(hidden=self.to_context(self.encoder_norm(x)) + where, layout=layout, seen=seen)

    def decode(
        self,
        context: Context,
        previous_ids: Int64[Tensor, "U"],
        modality: Int64[Tensor, "U"],
        position: Int64[Tensor, "U"],
        sample: Int64[Tensor, "U"],
    ) -> Float[Tensor, "U D"]:
        """Returns the decoder's output for each target, for `logits`; rows are sorted by sample."""
        layout = Layout.of(sample, context.layout.samples)
        seen = self._seen_targets(layout, modality, position)
        embedded = self.tokens(previous_ids.clamp(min=0))
        x = torch.where((previous_ids >= 0)[:, None], embedded, self.mask_token) + self.where(modality, position)
        for block in self.decoder:
            x = block(x, layout, seen, context)
        return self.decoder_norm(x)

    def forward(self, batch: MaskedBatch) -> Float[Tensor, "U D"]:
        """Returns the decoder's output for each target of a batch."""
        context = self.encode(
            batch.input_ids, batch.input_modality, batch.input_position, batch.input_sample, batch.samples
        )
        return self.decode(
            context, batch.previous_ids, batch.target_modality, batch.target_position, batch.target_sample
        )

    def logits(self, hidden: Float[Tensor, "n D"], modality: int) -> Float[Tensor, "n vocabulary"]:
        """Returns unnormalized log-probabilities of the tokens of one modality."""
        facts = self.vocabulary.modalities[modality]
        return functional.linear(hidden, self.head.weight[facts.offset : facts.offset + facts.vocabulary])

    def where(self, modality: Tensor, position: Tensor) -> Tensor:
        """Returns the embedding of modality and position."""
        table: Tensor = self.get_buffer("position_table")
        return self.modalities(modality) + table[self.get_buffer("position_start")[modality] + position]

    def _seen_targets(self, layout: Layout, modality: Tensor, position: Tensor) -> Bool[Tensor, "B 1 N N"]:
        """Returns which targets see which: those of one modality each other, but in a sequence none that come later."""
        # 0 is where no row stands.
        group = layout.spread(modality + 1)
        order = layout.spread(torch.where(self.get_buffer("ordered")[modality], position, 0))
        same = group[:, :, None] == group[:, None, :]
        # Empty places see each other, so that their softmax is a number.
        return (same & (order[:, None, :] <= order[:, :, None]))[:, None]


def positions(vocabulary: Vocabulary, width: int) -> tuple[Float[Tensor, "P D"], Int64[Tensor, "M"]]:
    """Returns one table of all sine positions, and where those of each modality begin; equal shapes share rows."""
    tables: dict[tuple[int | None, int], Tensor] = {}
    begins: dict[tuple[int | None, int], int] = {}
    starts, size = [], 0
    for modality in vocabulary.modalities:
        # A target sequence may hold a sentinel for every token, the first and the last beside them.
        length = 2 * modality.tokens + 2 if modality.sequence else modality.tokens
        shape = modality.side, length
        if shape not in tables:
            tables[shape] = (
                _line(torch.arange(length), width) if modality.side is None else _plane(modality.side, width)
            )
            begins[shape], size = size, size + length
        starts.append(begins[shape])
    return torch.cat(list(tables.values())), torch.tensor(starts)


def _line(places: Tensor, width: int) -> Float[Tensor, "P D"]:
    """Returns sines and cosines of places at wavelengths from 2 pi to 10,000 x 2 pi, spread by ratio (arXiv 1706.03762)."""
    return _waves(places, 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2)))


def _plane(side: int, width: int) -> Float[Tensor, "P D"]:
    """Returns sines and cosines at evenly spread frequencies: half the width for the row of a cell, half for its column.

    The embeddings of any two rows are thus nearly orthogonal, and a target finds its own cell. At wavelengths up to 10,000
    (4M's) most sines are the same all over a grid, and a small model did not learn to copy 14 x 14 cells in 300 steps.
    """
    cells = torch.arange(side * side)
    waves = width // 4
    rates = torch.pi * torch.arange(1, waves + 1, dtype=torch.float64) / waves
    return torch.cat([_waves(cells // side, rates), _waves(cells % side, rates)], dim=1)


def _waves(places: Tensor, rates: Float[Tensor, "w"]) -> Float[Tensor, "P 2w"]:
    angles = places.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def _by_head(x: Float[Tensor, "B N D"], heads: int) -> Float[Tensor, "B H N d"]:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
