"""Makes the optimizer of a training run: torch's AdamW, fused if it can be."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Holds the options of AdamW (decoupled decay), or of Adam with the decay in the gradient if `decoupled` is false."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = True


def adam(model: nn.Module, options: OptimizerOptions, device: torch.device) -> Adam:
    """Returns AdamW (arXiv 1711.05101), or Adam if decay is not decoupled. Embeddings, norms and biases do not decay."""
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    decays: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decays[parameter.dim() >= 2 and name not in embeddings].append(parameter)
    groups = [
        {"params": decays[True], "weight_decay": options.weight_decay},
        {"params": decays[False], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {"lr": options.lr, "betas": options.betas, "eps": options.eps}
    kind = AdamW if options.decoupled else Adam
    return kind(groups, fused=device.type in ("cpu", "cuda"), **settings)
