"""Decodes a sequence token by token, without computing again what was decoded before.

It is the same arithmetic as `Model.decode` of the whole prefix (a test compares them). Keys and values of the tokens so
far are kept, those of the context are made once.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from train.model.transformer import Context, DecoderBlock, Model


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """Holds A prefixes of t tokens of one modality: what each decoder block needs of them, a list item per block.

    context  keys and values of the context, (2, A, H, N, d), of which `seen` (A, 1, 1, N) hold anything
    own      keys and values of the tokens so far, (2, A, H, t, d)
    """

    modality: int
    context: tuple[Float[Tensor, "2 A H N d"], ...]
    seen: Tensor
    own: tuple[Float[Tensor, "2 A H t d"], ...]

    @classmethod
    def start(cls, model: Model, context: Context, modality: int) -> "Prefix":
        """Returns empty prefixes, one for each sample of the context."""
        kept, own = [], []
        for block in _blocks(model):
            laid = context.layout.spread(block.cross.kv(block.context_norm(context.hidden)))
            kept.append(_by_head(laid, 2, block.cross.heads))
            own.append(kept[-1][:, :, :, :0])
        return cls(modality=modality, context=tuple(kept), seen=context.seen, own=tuple(own))

    def only(self, rows: Int64[Tensor, "a"]) -> "Prefix":
        """Returns some of the prefixes."""
        return replace(
            self,
            context=tuple(kept[:, rows] for kept in self.context),
            seen=self.seen[rows],
            own=tuple(kept[:, rows] for kept in self.own),
        )

    def extended(self, model: Model, previous_ids: Int64[Tensor, "A"]) -> tuple[Float[Tensor, "A D"], "Prefix"]:
        """Returns the decoder's output for the next token (for `Model.logits`), and the prefixes with `previous_ids` added."""
        position = torch.full_like(previous_ids, self.own[0].shape[3])
        x = model.tokens(previous_ids) + model.where(torch.full_like(previous_ids, self.modality), position)
        grown = []
        for block, context, own in zip(_blocks(model), self.context, self.own, strict=True):
            q, kv = block.attention.qkv(block.norm_1(x)).split([x.shape[1], 2 * x.shape[1]], dim=1)
            own = torch.cat([own, _by_head(kv[:, None], 2, block.attention.heads)], dim=3)
            x = x + block.attention.out(_attended(q, own, None))
            x = x + block.cross.out(_attended(block.cross.q(block.query_norm(x)), context, self.seen))
            x = x + block.mlp(block.norm_2(x))
            grown.append(own)
        return model.decoder_norm(x), replace(self, own=tuple(grown))


def _attended(q: Float[Tensor, "A D"], kv: Float[Tensor, "2 A H n d"], seen: Tensor | None) -> Float[Tensor, "A D"]:
    """Computes the attention of one query per row."""
    by_head = _by_head(q[:, None], 1, kv.shape[2])[0]
    return functional.scaled_dot_product_attention(by_head, kv[0], kv[1], attn_mask=seen).flatten(1)


def _by_head(x: Float[Tensor, "A n PD"], parts: int, heads: int) -> Float[Tensor, "P A H n d"]:
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def _blocks(model: Model) -> list[DecoderBlock]:
    return [cast(DecoderBlock, block) for block in model.decoder]
