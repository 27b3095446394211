"""Generates modalities from others that are given, one after the other.

As 4M does it (apple/ml-4m, fourm/models/generate.py): a modality that is finished is an input of the next. Cells of a
grid are decoded many at a time; those that are known are inputs of the encoder and the rest are asked for, which is how
the model is trained. Sequences are decoded left to right after their first sentinel, like one that was masked whole.

Every draw is a hash of (seed, number of the sample, modality, step, place): a sample does not depend on those beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from manifests.errors import ConfigError, TokenizeError
from manifests.store.storage import open_storage
from tokenize_jobs import protocol
from train.data.hashing import combine, name_hash, uniform
from train.data.vocabulary import TokenModality, Vocabulary
from train.generation.decoding import DecodeOptions, GenerateOptions, counts, draw
from train.generation.left_to_right import Prefix
from train.model.transformer import Context, Model

UNKNOWN = -1


@dataclass(frozen=True, kw_only=True)
class _Goal:
    """Holds one modality that is being made; its draws are keyed with `keys` (B,)."""

    model: Model
    index: int
    options: DecodeOptions
    keys: Int64[np.ndarray, "B"]
    known: Mapping[str, Sequence[np.ndarray | None]]

    @property
    def facts(self) -> TokenModality:
        return self.model.vocabulary.modalities[self.index]

    def contexts(self, cells: np.ndarray | None = None) -> list[Context]:
        """Encodes what is known with the conditions, and also without them if guidance needs it."""
        own = {} if cells is None else {self.facts.name: list(cells)}
        found = [_encode(self.model, {**self.known, **own}, len(self.keys))]
        if self.options.guidance != 1 and self.known:
            found.append(_encode(self.model, own, len(self.keys)))
        return found

    def logits(self, contexts: Sequence[Context], place: np.ndarray, sample: np.ndarray) -> Float[Tensor, "n V"]:
        """Returns guided logits of cells of a grid; the cells are sorted by sample."""
        device = contexts[0].hidden.device
        mask, modality = np.full_like(place, -1), np.full_like(place, self.index)
        tensors = [torch.from_numpy(row).to(device) for row in (mask, modality, place, sample)]
        return self.guided([self.model.decode(context, *tensors) for context in contexts])

    def guided(self, hidden: Sequence[Float[Tensor, "n D"]]) -> Float[Tensor, "n V"]:
        """Returns guided logits, float64, of the decoder's output with the conditions, and without them if it has both."""
        logits, *without = (self.model.logits(one, self.index).double() for one in hidden)
        return without[0] + self.options.guidance * (logits - without[0]) if without else logits

    def draw(
        self, logits: Tensor, sample: np.ndarray, place: np.ndarray, step: int, done: float
    ) -> tuple[Int64[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Returns drawn tokens and their probabilities."""
        chances = uniform(combine(combine(self.keys[sample], step), place))
        options = self.options
        return draw(logits, chances, options.temperature_at(done), top_k=options.top_k, top_p=options.top_p)


def generate(
    model: Model,
    given: Mapping[str, Sequence[np.ndarray | None]],
    wanted: Sequence[str],
    options: GenerateOptions | None = None,
    *,
    seed: int,
    samples: int | None = None,
    first: int = 0,
) -> dict[str, list[Int64[np.ndarray, "tokens"]]]:
    """Generates tokens of the wanted modalities of B samples, in this order; a finished modality is an input of the next.

    `given` holds B rows of tokens by modality, None if a sample does not have it. A grid may have `UNKNOWN` cells, which are
    made if the modality is wanted too. A row that is given whole stays. `samples` is B, needed only if nothing is given.
    `first` is the number of the first sample: several calls make the same samples as one. A row of a sequence ends with
    its end token, unless the model closed or filled it without one.

    Raises ConfigError if the model does not have a modality, if nothing or one modality twice is wanted, and for tokens
    that do not fit.
    """
    options = options or GenerateOptions()
    vocabulary = model.vocabulary
    rows = {len(tokens) for tokens in given.values()} | ({samples} if samples is not None else set())
    if len(rows) != 1 or not wanted or len(set(wanted)) != len(wanted):
        raise ConfigError(
            f"{sorted(rows)} samples of {list(given)}, wanted {list(wanted)}; expected equally many of each modality, or "
            "`samples`, and at least one modality, each once"
        )
    for name in (*wanted, *options.each):
        vocabulary.index(name)
    known = {name: [_checked(vocabulary[name], row) for row in tokens] for name, tokens in given.items()}
    keys = combine(name_hash("generate", seed), np.arange(first, first + rows.pop()))
    made = {}
    with torch.inference_mode():
        for name in wanted:
            conditions = {other: tokens for other, tokens in known.items() if other != name}
            goal = _Goal(
                model=model,
                index=vocabulary.index(name),
                options=options.of(vocabulary[name], conditions),
                keys=combine(keys, name_hash("draw", name)),
                known=conditions,
            )
            own = known.get(name, [None] * len(keys))
            made[name] = _sequences(goal, own) if goal.facts.sequence else _grids(goal, own)
            known[name] = made[name]
    return made


def _grids(goal: _Goal, own: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """Decodes grids, some of whose cells may be known, a few cells a step."""
    empty = np.full(goal.facts.tokens, UNKNOWN)
    cells = np.stack([empty if row is None else row for row in own])
    options = goal.options
    plans = [counts(int((row < 0).sum()), options.steps, options.schedule) for row in cells]
    lottery = combine(combine(goal.keys, name_hash("order"))[:, None], np.arange(goal.facts.tokens))
    for step in range(max(map(len, plans), default=0)):
        many = np.array([plan[step] if step < len(plan) else 0 for plan in plans])
        unknown = cells < 0
        by_confidence = options.order == "confidence"
        asked = unknown & (many > 0)[:, None] if by_confidence else _first(many, uniform(lottery), unknown)
        sample, place = np.nonzero(asked)
        logits = goal.logits(goal.contexts(cells), place, sample)
        tokens, confidence = goal.draw(logits, sample, place, step, step / options.steps)
        drawn = np.full_like(cells, UNKNOWN)
        drawn[sample, place] = tokens
        # By confidence, all unknown cells were drawn above, and only the likeliest of them are kept.
        if by_confidence:
            rank = np.zeros(cells.shape)
            rank[sample, place] = -confidence
            asked = _first(many, rank, asked)
        cells = np.where(asked, drawn, cells)
    return list(cells)


def _first(
    many: Int64[np.ndarray, "B"], rank: Float[np.ndarray, "B K"], among: Bool[np.ndarray, "B K"]
) -> Bool[np.ndarray, "B K"]:
    """Returns in each row the `many` places of the lowest rank among some."""
    order = np.argsort(np.where(among, rank, np.inf), axis=1, kind="stable")
    found = np.zeros(among.shape, dtype=bool)
    np.put_along_axis(found, order, np.arange(among.shape[1]) < many[:, None], axis=1)
    return found


def _sequences(goal: _Goal, own: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    """Decodes sequences, left to right."""
    facts = goal.facts
    opening, closing = facts.first_sentinel + 1, facts.first_sentinel + 2
    # In training, a sequence that was masked whole had only these two sentinels: the others are never drawn.
    others = [id_ for id_ in range(facts.first_sentinel, facts.first_sentinel + facts.sentinels) if id_ != closing]
    most = min(facts.tokens, goal.options.tokens or facts.tokens)
    written = np.full((len(own), most + 1), opening)
    lengths = np.zeros(len(own), dtype=np.int64)
    device = goal.model.mask_token.device
    active = np.array([number for number, row in enumerate(own) if row is None], dtype=np.int64)
    rows = torch.from_numpy(active).to(device)
    prefixes = [Prefix.start(goal.model, context, goal.index).only(rows) for context in goal.contexts()]
    for step in range(most):
        if len(active) == 0:
            break
        previous = torch.from_numpy(written[active, step] + facts.offset).to(device)
        hidden, prefixes = zip(*(prefix.extended(goal.model, previous) for prefix in prefixes), strict=True)
        logits = goal.guided(hidden)
        logits[:, others] = -torch.inf
        tokens, _ = goal.draw(logits, active, np.zeros_like(active), step, step / most)
        written[active, step + 1] = tokens
        lengths[active] = np.where(tokens == closing, step, step + 1)
        going = np.flatnonzero((tokens != closing) & (tokens != facts.end))
        if len(going) < len(active):
            prefixes = [prefix.only(torch.from_numpy(going).to(device)) for prefix in prefixes]
            active = active[going]
    made = [row[1 : length + 1] for row, length in zip(written, lengths, strict=True)]
    return [row if kept is None else kept for row, kept in zip(made, own, strict=True)]


def _encode(model: Model, known: Mapping[str, Sequence[np.ndarray | None]], samples: int) -> Context:
    """Encodes all known tokens."""
    columns = [np.empty((4, 0), dtype=np.int64)]
    for name, rows in known.items():
        index = model.vocabulary.index(name)
        for sample, row in enumerate(rows):
            if row is not None:
                place = np.flatnonzero(row >= 0)
                ids = row[place] + model.vocabulary.modalities[index].offset
                columns.append(np.stack([ids, np.full_like(place, index), place, np.full_like(place, sample)]))
    packed = np.concatenate(columns, axis=1)
    packed = packed[:, np.lexsort((packed[2], packed[1], packed[3]))]
    device = model.mask_token.device
    ids, modality, position, sample = (torch.from_numpy(row.copy()).to(device) for row in packed)
    return model.encode(ids, modality, position, sample, samples)


def _checked(facts: TokenModality, row: np.ndarray | None) -> np.ndarray | None:
    """Returns a row of tokens as int64. Raises ConfigError if it does not fit the modality."""
    if row is None:
        return None
    tokens = np.asarray(row)
    fits = len(tokens) <= facts.tokens if facts.sequence else tokens.shape == (facts.tokens,)
    if tokens.ndim != 1 or not fits or (tokens.size and tokens.dtype.kind not in "ui"):
        expected = f"at most {facts.tokens}" if facts.sequence else f"{facts.tokens}"
        raise ConfigError(f"{facts.name}: given {tokens.dtype} {tokens.shape}; expected {expected} tokens, integers")
    tokens = tokens.astype(np.int64)
    least = 0 if facts.sequence else UNKNOWN
    if tokens.size and not (tokens.min() >= least and tokens.max() < facts.vocabulary):
        raise ConfigError(
            f"{facts.name}: given tokens from {tokens.min()} to {tokens.max()}; expected 0 to {facts.vocabulary - 1}"
        )
    return tokens


class Tokenizers:
    """Holds the tokenizers that a model's vocabulary names, each loaded when it is first needed.

    `workspaces` are the URIs of the workspaces that hold them, by modality (`Checkpoint.workspaces`).
    """

    def __init__(self, vocabulary: Vocabulary, workspaces: Mapping[str, str]) -> None:
        self.vocabulary = vocabulary
        self.workspaces = workspaces
        self._loaded: dict[str, protocol.Tokenizer] = {}

    def get(self, modality: str) -> protocol.Tokenizer:
        """Returns the tokenizer of a modality. Raises ConfigError if it is not the one that the model was trained with."""
        if modality not in self._loaded:
            facts, storage = self.vocabulary[modality], open_storage(self.workspaces[modality])
            folder, found = protocol.fetch(storage, facts.path)
            if found != facts.digest:
                raise ConfigError(
                    f"{storage.location(facts.path)}: the tokenizer of {modality} is {found[:12]}, the model was trained with "
                    f"{facts.tokenizer}-{facts.digest[:12]}; restore that folder from a copy, or train on the new tokens"
                )
            self._loaded[modality] = protocol.load(folder, modality)
        return self._loaded[modality]

    def encode(self, modality: str, label: Any) -> Int64[np.ndarray, "tokens"]:
        """Returns the tokens of one label. Raises ConfigError if the tokenizer refuses it, or if it is too long."""
        facts = self.vocabulary[modality]
        labels = label[None] if isinstance(label, np.ndarray) else [label]
        try:
            tokens = np.asarray(self.get(modality).encode(labels)[0], dtype=np.int64)
        except TokenizeError as error:
            raise ConfigError(f"the given {modality}: {error}") from error
        # Text that is over the tokenizer's own limit is cut without an end.
        cut = facts.sequence and not (len(tokens) and tokens[-1] == facts.end)
        if cut or len(tokens) > facts.tokens:
            raise ConfigError(
                f"the given {modality} is {'over ' if cut else ''}{len(tokens)} tokens; the model sees {facts.tokens}, the "
                "end included: give a shorter one"
            )
        return tokens

    def decode(self, modality: str, tokens: Sequence[np.ndarray]) -> list[Any]:
        """Returns the labels of rows of tokens."""
        return list(self.get(modality).decode(list(tokens)))
