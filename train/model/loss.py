"""Computes the loss: cross-entropy per modality, normalized by how many targets each has in the whole step."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from train.data.batch import MaskedBatch
from train.model.transformer import Model


def sums(model: Model, hidden: Float[Tensor, "U D"], batch: MaskedBatch) -> Float[Tensor, "M"]:
    """Returns the summed cross-entropy in nats of each modality's targets; 0 if it has no targets.

    Logits are computed for a modality's own targets over its own vocabulary only.
    """
    found = []
    for modality in range(len(model.vocabulary.modalities)):
        of_it = torch.nonzero(batch.target_modality == modality).squeeze(1)
        if len(of_it) == 0:
            found.append(hidden.new_zeros((), dtype=torch.float32))
            continue
        logits = model.logits(hidden[of_it], modality).float()
        found.append(functional.cross_entropy(logits, batch.target_ids[of_it], reduction="sum"))
    return torch.stack(found)


def total(
    sums: Float[Tensor, "M"], counts: Int64[Tensor, "M"], weights: Float[Tensor, "M"] | None = None
) -> Float[Tensor, ""]:
    """Returns the weighted mean over modalities of nats per target; modalities without targets in the step do not count.

    `counts` are of the whole step: the losses of its micro-batches add up to the loss of the step, however it is cut.
    """
    weights = torch.ones_like(sums) if weights is None else weights.to(sums)
    weights = torch.where(counts > 0, weights, 0.0)
    return (weights * sums / counts.clamp(min=1)).sum() / weights.sum().clamp(min=1e-12)
