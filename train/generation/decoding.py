"""Decides which tokens are drawn from what a model predicts: options, schedules, filters and the draw itself."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import cos, pi
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError
from torch import Tensor

from manifests import mistakes
from manifests.errors import ConfigError
from train.data.vocabulary import TokenModality

Order = Literal["confidence", "random"]
Schedule = Literal["cosine", "linear"]

# Options that only grids, and only sequences, have a use for.
OF_GRIDS = ("steps", "schedule", "order")
OF_SEQUENCES = ("tokens",)


class DecodeOptions(BaseModel):
    """Holds how one modality is decoded.

    steps        grids: the number of steps in which the cells are decoded; at most one per cell
    schedule     grids: `linear` decodes equally many cells in every step, `cosine` few at first (MaskGIT, arXiv 2202.04200)
    order        grids: `confidence` decodes all remaining cells in every step and keeps the likeliest (MaskGIT, without its
                 noise); `random` decodes cells in random order (4M's ROAR)
    temperature  divides the logits; 0 takes the likeliest token
    temperature_schedule  `constant`, or `linear`: falls towards 0 at the last step (grids) or the longest length (sequences)
    top_k        only this many of the likeliest tokens; None: all
    top_p        only the likeliest tokens that hold this share of the probability before `temperature`, as in 4M
    guidance     w of l_u + w (l_c - l_u), the logits without and with the conditions (arXiv 2207.12598); 1 is without guidance,
                 0 without conditions
    tokens       sequences: the most tokens; None: as many as the model sees of a sequence
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    steps: PositiveInt = 25
    schedule: Schedule = "linear"
    order: Order = "random"
    temperature: NonNegativeFloat = 1.0
    temperature_schedule: Literal["constant", "linear"] = "constant"
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    guidance: NonNegativeFloat = 1.0
    tokens: PositiveInt | None = None

    def temperature_at(self, done: float) -> float:
        """Returns the temperature when the share `done` of all steps is done."""
        return self.temperature * (1 - done if self.temperature_schedule == "linear" else 1.0)


_DENSE = DecodeOptions(steps=1, temperature=0.01, top_p=0.8, guidance=2.0)
_PICTURE = DecodeOptions(steps=25, temperature=0.5, top_p=0.9, guidance=3.0)
_SENTENCE = DecodeOptions(temperature=0.3, top_p=0.8)
_RECORD = DecodeOptions(temperature=0.1, top_p=0.8)


def defaults(modality: TokenModality, conditions: Collection[str]) -> DecodeOptions:
    """Returns the options of a modality that are used by default; `conditions` are the modalities that are given.

    Maps from a given `rgb` in one step, captions and boxes at temperature 0.3, palettes and metadata at 0.1: 4M's
    (apple/ml-4m, fourm/demo_4M_sampler.py). Other grids in 25 steps of random order at temperature 0.5 with top_p 0.9 and
    guidance 3: those of its text-to-image figures for rgb.
    """
    base = modality.name.partition("@")[0]
    if modality.sequence:
        return _RECORD if base in ("palette", "metadata") else _SENTENCE
    has_pixels = any(name.partition("@")[0] == "rgb" for name in conditions)
    return _DENSE if has_pixels and base != "rgb" else _PICTURE


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Holds what differs from `defaults`: names and values of `DecodeOptions`.

    every  for every modality
    each   for some, by name; these take precedence over `every`
    """

    every: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ConfigError for an unknown option, and for a value that an option cannot have."""
        for place, given in (((), self.every), *(((name,), given) for name, given in self.each.items())):
            try:
                DecodeOptions.model_validate(given)
            except ValidationError as error:
                found = error.errors(include_url=False)
                lines = mistakes.explain(found, {(): DecodeOptions}, lambda _: "decode options", below=place)
                raise ConfigError("\n".join(lines)) from None

    def of(self, modality: TokenModality, conditions: Collection[str]) -> DecodeOptions:
        """Returns the options of one modality, generated from `conditions`."""
        return defaults(modality, conditions).model_copy(update={**self.every, **self.each.get(modality.name, {})})


def counts(cells: int, steps: int, schedule: Schedule) -> list[int]:
    """Returns how many of `cells` cells each step decodes: at least one, and all in min(cells, steps) steps."""
    steps = min(cells, steps)
    known = [0]
    for step in range(1, steps + 1):
        share = step / steps if schedule == "linear" else 1 - cos(pi / 2 * step / steps)
        # Every step has at least one, and leaves at least one to each of those after it.
        known.append(min(max(round(cells * share), known[-1] + 1), cells - (steps - step)))
    return [int(many) for many in np.diff(known)]


def filtered(logits: Float[Tensor, "n V"], top_k: int | None, top_p: float) -> Float[Tensor, "n V"]:
    """Sets logits outside the `top_k` and outside the nucleus of `top_p` to minus infinity; one always stays."""
    if top_k is None and top_p >= 1:
        return logits
    ordered, places = logits.sort(dim=-1, descending=True, stable=True)
    share = ordered.softmax(dim=-1)
    kept = share.cumsum(dim=-1) - share < top_p
    if top_k is not None:
        kept[:, top_k:] = False
    kept[:, 0] = True
    return torch.full_like(logits, -torch.inf).scatter(-1, places, ordered.where(kept, -torch.inf))


def draw(
    logits: Float[Tensor, "n V"],
    chances: Float[np.ndarray, "n"],
    temperature: float,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> tuple[Int64[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Returns a token for each row of float64 logits, and its probability before temperature and filters.

    `chances` in (0, 1) say at which point of the distribution each token is taken: equal chances give equal tokens.
    """
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        kept = filtered(logits, top_k, top_p)
        # Before the division, so that no temperature is too low.
        kept = kept - kept.max(dim=-1, keepdim=True).values
        reached = (kept / temperature).softmax(dim=-1).cumsum(dim=-1)
        wanted = torch.from_numpy(chances).to(reached)[:, None] * reached[:, -1:]
        tokens = torch.searchsorted(reached, wanted).squeeze(1)
    confidence = logits.softmax(dim=-1).gather(-1, tokens[:, None]).squeeze(1)
    return tokens.cpu().numpy(), confidence.cpu().numpy()
