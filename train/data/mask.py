"""Decides which tokens of a row are inputs, and which are targets.

It is 4M's recipe (arXiv 2406.09406; apple/ml-4m, fourm/data/masking.py) on whole batches. Every draw is keyed by the
row's own key: a row gets the same mask in any batch, in any process, in a run that resumes. A strategy is drawn for the
row, then how many tokens are inputs and how many targets; Dirichlet draws divide both among the row's modalities. A grid
gives a random set of its places as inputs and others as targets. In a sequence each token is kept or dropped (metadata:
each record); a run of dropped tokens becomes one sentinel in the input, and the target is each sentinel with the tokens
it stands for, then one more sentinel:

    tokens   a red cube on the grass [EOS]
    input    a [S_1] on the [S_2]
    target   [S_1] red cube [S_2] grass [EOS] [S_3]

As in 4M, budgets that a modality cannot fill stay unfilled: a caption may be the only input. What differs from 4M is in
docs/4m.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import AfterValidator, BeforeValidator, NonNegativeFloat, PositiveFloat, PositiveInt

from manifests.errors import ConfigError, nearest
from train.data.batch import Batch, Column, MaskedBatch
from train.data.hashing import below, combine, name_hash, uniform
from train.data.vocabulary import TokenModality, Vocabulary

OTHERS = "*"
# A modality of alpha 0 is nearly never drawn, but always if the row has no other (as in 4M).
_LEAST_ALPHA = 1e-9
_GAMMA_TRIES = 8
_KEEP_DECAY = 0.9
_DECAYS = 64


def _in_order(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"is {list(value)}, expected [a, b] with 1 <= a <= b")
    return value


Budget = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_in_order)]
Keep = Literal["random", "all", "binary"]
Overlong = Literal["fill", "random"]


def _schemes(value: Any) -> Any:
    is_each = isinstance(value, Mapping)
    for name, scheme in value.items() if is_each else [("", value)]:
        if scheme not in get_args(Keep):
            raise ValueError(f"{name} is {scheme!r}; it should be 'random', 'all' or 'binary'".lstrip())
    return value


Keeps = Annotated[Keep | Mapping[str, Keep], BeforeValidator(_schemes)]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Holds one way to mask. `inputs` and `targets` are Dirichlet alphas by modality, "*" those of all others.

    A small alpha gives all to one modality, a large one divides evenly. `keep` is how many tokens of a sequence stay:
    `random` a share drawn from 0 to 1, `all` (as far as the budget reaches), `binary` all or none. It is one for every
    sequence, or one by modality, "*" that of all others (`random` if it is missing).
    """

    weight: PositiveFloat = 1.0
    inputs: Mapping[str, NonNegativeFloat] = field(default_factory=lambda: {OTHERS: 1.0})
    targets: Mapping[str, NonNegativeFloat] = field(default_factory=lambda: {OTHERS: 1.0})
    keep: Keeps = "random"

    def keep_of(self, modality: str) -> Keep:
        """Returns how a sequence is kept."""
        if isinstance(self.keep, str):
            return self.keep
        return self.keep.get(modality, self.keep.get(OTHERS, "random"))


def _some(value: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
    if not value:
        raise ValueError("is [], expected at least one strategy")
    return value


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Holds the least and the most tokens of a row that are inputs, and targets; and the strategies, drawn by weight.

    `overlong` says where a sequence's target over its budget begins: at a sentinel drawn at random (`random`), or, if what
    remains from there is less than the budget, at the earliest sentinel from which all that remains fits (`fill`, as in
    4M). None is `fill`; a run that goes on has the rule that it began with.
    """

    inputs: Budget = (128, 128)
    targets: Budget = (128, 128)
    strategies: Annotated[tuple[Strategy, ...], AfterValidator(_some)] = (Strategy(),)
    overlong: Overlong | None = None

    def check(self, vocabulary: Vocabulary) -> None:
        """Raises ConfigError for options of modalities that the vocabulary does not have, and for `keep` of a grid."""
        known = [OTHERS, *(modality.name for modality in vocabulary.modalities)]
        sequences = [OTHERS, *(modality.name for modality in vocabulary.modalities if modality.sequence)]
        for number, strategy in enumerate(self.strategies):
            keep = {} if isinstance(strategy.keep, str) else strategy.keep
            for option, names in (("inputs", strategy.inputs), ("targets", strategy.targets), ("keep", keep)):
                for name in names:
                    place = f"masking.strategies[{number}].{option}"
                    if name not in known:
                        raise ConfigError(f"{place}: no modality {name!r} in the snapshots; {nearest(name, known)}")
                    if option == "keep" and name not in sequences:
                        raise ConfigError(
                            f"{place}: {name!r} has no sequence, which `keep` is of; expected {', '.join(sequences)}"
                        )


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Holds the most inputs and targets of each modality of each row, and the share of a sequence's tokens that stays."""

    inputs: Int64[np.ndarray, "B M"]
    targets: Int64[np.ndarray, "B M"]
    keep: Float[np.ndarray, "B M"]


def mask_batch(
    batch: Batch, vocabulary: Vocabulary, masking: Masking, *, device: str | torch.device = "cpu"
) -> MaskedBatch:
    """Returns a batch with the mask that its rows' keys draw. `masking` must have passed its `check`."""
    lengths = np.stack([batch.columns[modality.name].lengths() for modality in vocabulary.modalities], axis=1)
    drawn = budgets(batch.keys, lengths, vocabulary, masking)
    inputs, targets = [_nothing(4)], [_nothing(5)]
    for index, modality in enumerate(vocabulary.modalities):
        column = batch.columns[modality.name]
        if len(column.values) == 0:
            continue
        keys = combine(batch.keys, name_hash("tokens", modality.name))
        own = column, keys, drawn.inputs[:, index], drawn.targets[:, index]
        if modality.sequence:
            given, asked = mask_sequence(*own, drawn.keep[:, index], modality, masking.overlong)
        else:
            given, asked = mask_grid(*own, modality)
        inputs.append(np.insert(given, 1, index, axis=0))
        targets.append(np.insert(asked, 1, index, axis=0))
    return _packed(np.concatenate(inputs, axis=1), np.concatenate(targets, axis=1), len(batch), device)


def budgets(
    keys: Int64[np.ndarray, "B"], lengths: Int64[np.ndarray, "B M"], vocabulary: Vocabulary, masking: Masking
) -> Budgets:
    """Draws the budgets of rows whose modalities have `lengths` tokens (0: the row does not have the modality)."""
    weights = np.cumsum([strategy.weight for strategy in masking.strategies])
    drawn = uniform(combine(keys, name_hash("strategy"))) * weights[-1]
    strategy = np.minimum(np.searchsorted(weights, drawn, side="right"), len(weights) - 1)
    names = [modality.name for modality in vocabulary.modalities]
    keep = np.empty(lengths.shape)
    shares = {}
    for side, (least, most) in (("inputs", masking.inputs), ("targets", masking.targets)):
        total = least + below(combine(keys, name_hash(side)), most - least + 1)
        alphas = np.array([_alphas(getattr(one, side), names) for one in masking.strategies])
        shares[side] = _divided(total, _log_gamma(keys, side, names, alphas[strategy]), lengths > 0)
    for column, name in enumerate(names):
        drawn = uniform(combine(keys, name_hash("keep", name)))
        kinds = np.array([one.keep_of(name) for one in masking.strategies])[strategy]
        keep[:, column] = np.select([kinds == "all", kinds == "binary"], [1.0, np.round(drawn)], drawn)
    inputs = np.minimum(shares["inputs"], lengths)
    grids = np.array([not modality.sequence for modality in vocabulary.modalities])
    targets = np.where(grids, np.minimum(shares["targets"], lengths - inputs), shares["targets"])
    return Budgets(inputs=inputs, targets=targets, keep=keep)


def mask_grid(
    column: Column,
    keys: Int64[np.ndarray, "B"],
    inputs: Int64[np.ndarray, "B"],
    targets: Int64[np.ndarray, "B"],
    modality: TokenModality,
) -> tuple[Int64[np.ndarray, "3 T"], Int64[np.ndarray, "4 U"]]:
    """Returns the chosen places of grids: sample, position and id of the inputs; the same and the previous id, -1, of targets.

    All places are equally likely: the first `inputs` of a random order are inputs, the next `targets` are targets.
    """
    rows = np.flatnonzero(column.lengths())
    tokens = column.values.reshape(len(rows), modality.tokens)
    order = np.argsort(combine(keys[rows, None], np.arange(modality.tokens)), axis=1)
    rank = np.arange(modality.tokens)
    chosen = rank < inputs[rows, None]
    asked = ~chosen & (rank < (inputs + targets)[rows, None])

    def taken(which: np.ndarray) -> np.ndarray:
        row, column_ = np.nonzero(which)
        place = order[row, column_]
        return np.stack([rows[row], place, tokens[row, place].astype(np.int64)])

    given, wanted = taken(chosen), taken(asked)
    given[2] += modality.offset
    return given, np.concatenate([wanted, np.full((1, wanted.shape[1]), -1)])


def mask_sequence(
    column: Column,
    keys: Int64[np.ndarray, "B"],
    inputs: Int64[np.ndarray, "B"],
    targets: Int64[np.ndarray, "B"],
    keep: Float[np.ndarray, "B"],
    modality: TokenModality,
    overlong: Overlong | None = None,
) -> tuple[Int64[np.ndarray, "3 T"], Int64[np.ndarray, "4 U"]]:
    """Returns the spans of sequences in the form of `mask_grid`; previous ids are of the token table.

    A sequence without an input budget is a target as a whole, and not even a sentinel of it is an input. The kept share
    shrinks until the input fits. A target over its budget begins at one of its sentinels, never the last, and is cut;
    `overlong` is that of `Masking`.
    """
    tokens = column.values.astype(np.int64)
    lengths = column.lengths()
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(tokens)) - column.offsets[row]
    drawn = uniform(combine(keys[row], _units(tokens, place, modality)))

    def cut(share: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns which tokens stay, which begin a run of dropped ones, and how many runs each row has."""
        kept = drawn < share[row]
        begins = ~kept & ((place == 0) | np.concatenate([[True], kept[:-1]]))
        return kept, begins, _sum(begins, row, len(lengths))

    # How many tokens the input has depends on how the draws fall into runs, since each run adds a sentinel: the share is
    # lowered until input and sentinels fit, the last time to 0 (one run). Two sentinels are kept back for the target's end.
    share = np.where(inputs > 0, keep, 0.0)
    kept, begins, runs = cut(share)
    for attempt in range(_DECAYS):
        over = (inputs > 0) & (_sum(kept | begins, row, len(lengths)) > inputs)
        over |= runs > modality.sentinels - 2
        if not over.any():
            break
        share = np.where(over, share * _KEEP_DECAY if attempt < _DECAYS - 1 else 0.0, share)
        kept, begins, runs = cut(share)
    run = np.cumsum(begins) - (np.cumsum(runs) - runs)[row]
    sentinel = modality.first_sentinel + run
    shown = (kept | begins) & (inputs > 0)[row]
    given = np.stack(
        [row[shown], _place(shown, row, lengths)[shown], np.where(begins, sentinel, tokens)[shown] + modality.offset]
    )
    asked = _spans(tokens, row, ~kept, begins, run, runs, keys, targets, modality, fills=overlong != "random")
    return given, asked


def _spans(
    tokens: np.ndarray,
    row: np.ndarray,
    dropped: np.ndarray,
    begins: np.ndarray,
    run: np.ndarray,
    runs: np.ndarray,
    keys: np.ndarray,
    targets: np.ndarray,
    modality: TokenModality,
    *,
    fills: bool,
) -> np.ndarray:
    """Returns the targets of sequences: each is laid out whole, its tokens with the sentinel of their run before them."""
    count = _sum(dropped, row, len(runs))
    asked = np.where((runs > 0) & (targets > 0), count + runs + 1, 0)
    first = np.cumsum(asked) - asked
    laid = np.zeros(asked.sum(), dtype=np.int64)
    # Tokens dropped before this one in its row.
    before = np.cumsum(dropped) - dropped - (np.cumsum(count) - count)[row]
    wanted = dropped & (asked > 0)[row]
    laid[(first[row] + before + run)[wanted]] = tokens[wanted]
    opens = begins & wanted
    opened = before + run - 1
    laid[(first[row] + opened)[opens]] = modality.first_sentinel + run[opens]
    closed = asked > 0
    laid[(first + asked - 1)[closed]] = modality.first_sentinel + runs[closed] + 1
    # The sentinel that a target over its budget begins at: one of the runs', by the row's own key.
    start = np.zeros(len(runs), dtype=np.int64)
    chosen = 1 + below(combine(keys, name_hash("start")), runs)
    picked = opens & (run == chosen[row])
    start[row[picked]] = opened[picked]
    if fills:
        # From the chosen one less may remain than the budget: then the earliest from which all that remains fits.
        fits = opens & ((asked - 1)[row] - opened <= targets[row])
        earliest = start.copy()
        # Backwards, since of several in a row the one that is put last stays.
        earliest[row[fits][::-1]] = opened[fits][::-1]
        start = np.where(asked - 1 - start < targets, earliest, start)
    start = np.where(asked - 1 > targets, start, 0)
    owner = np.repeat(np.arange(len(runs)), asked)
    position = np.arange(len(laid)) - first[owner] - start[owner] - 1
    used = np.flatnonzero((position >= 0) & (position < targets[owner]))
    return np.stack([owner[used], position[used], laid[used], laid[used - 1] + modality.offset])


def _units(tokens: np.ndarray, place: np.ndarray, modality: TokenModality) -> np.ndarray:
    """Returns a number for what is kept or dropped together in each row: tokens, or records (the end counts as a record)."""
    if modality.record_start is None:
        return place
    low, high = modality.record_start
    opens = ((tokens >= low) & (tokens < high)) | (tokens == modality.end) | (place == 0)
    number = np.cumsum(opens)
    at_start = np.maximum.accumulate(np.where(place == 0, number, 0))
    return number - at_start


def _alphas(given: Mapping[str, float], names: list[str]) -> list[float]:
    return [max(given.get(name, given.get(OTHERS, 0.0)), _LEAST_ALPHA) for name in names]


def _log_gamma(
    keys: np.ndarray, side: str, names: list[str], alpha: Float[np.ndarray, "B M"]
) -> Float[np.ndarray, "B M"]:
    """Returns the logarithm of gamma draws: Marsaglia and Tsang 2000, with the power of a uniform for alphas under 1.

    The logarithm, since a draw with alpha 0.01 may be under 1e-300. A rejected proposal is drawn again a fixed number of times;
    the last stands (one in 10**10).
    """
    logs = np.empty(alpha.shape)
    for column, name in enumerate(names):
        key = combine(keys, name_hash(side, name))
        a = alpha[:, column]
        d = np.where(a < 1, a + 1, a) - 1 / 3
        c = 1 / np.sqrt(9 * d)
        v, open_ = np.ones(len(a)), np.ones(len(a), dtype=bool)
        for attempt in range(_GAMMA_TRIES):
            first, second, third = (uniform(combine(key, 3 * attempt + number)) for number in range(3))
            x = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)
            proposal = np.maximum(1 + c * x, 1e-12) ** 3
            v = np.where(open_, proposal, v)
            open_ &= ~(np.log(third) < x * x / 2 + d * (1 - proposal + np.log(proposal)))
        boost = np.where(a < 1, np.log(uniform(combine(key, 3 * _GAMMA_TRIES))) / a, 0.0)
        logs[:, column] = np.log(d * v) + boost
    return logs


def _divided(total: np.ndarray, logs: np.ndarray, present: np.ndarray) -> Int64[np.ndarray, "B M"]:
    """Returns integers that add up to `total` in the proportions exp(logs), 0 if not present (all 0 if none is present)."""
    logs = np.where(present, logs, -np.inf)
    most = np.where(present.any(axis=1), logs.max(axis=1), 0.0)
    shares = np.exp(logs - most[:, None])
    exact = total[:, None] * shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-300)
    whole = np.floor(exact).astype(np.int64)
    left = np.where(present.any(axis=1), total - whole.sum(axis=1), 0)
    order = np.argsort(np.where(present, whole - exact, np.inf), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(order.shape[1])[None], axis=1)
    return whole + (rank < left[:, None])


def _sum(flags: np.ndarray, row: np.ndarray, rows: int) -> np.ndarray:
    return np.bincount(row[flags], minlength=rows)


def _place(flags: np.ndarray, row: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Counts the flags before each place in its own row."""
    before = np.cumsum(flags) - flags
    first = np.cumsum(lengths) - lengths
    return before - before[np.minimum(first, len(before) - 1)][row]


def _nothing(fields: int) -> np.ndarray:
    return np.empty((fields, 0), dtype=np.int64)


def _packed(inputs: np.ndarray, targets: np.ndarray, samples: int, device: str | torch.device) -> MaskedBatch:
    """Sorts the columns sample, modality, position, id(, previous id) and returns them as tensors."""

    def tensors(columns: np.ndarray, *names: str) -> dict[str, torch.Tensor]:
        order = np.lexsort((columns[2], columns[1], columns[0]))
        laid = np.ascontiguousarray(columns[:, order])
        return {name: torch.from_numpy(column).to(device) for name, column in zip(names, laid, strict=True)}

    return MaskedBatch(
        samples=samples,
        **tensors(inputs, "input_sample", "input_modality", "input_position", "input_ids"),
        **tensors(targets, "target_sample", "target_modality", "target_position", "target_ids", "previous_ids"),
    )
