"""Reads the tokens of a batch's rows from snapshots, file by file and without a loop over rows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from manifests.errors import ConfigError, ShardError
from manifests.snapshots.snapshot import Snapshot, SnapshotShard
from train.data import hashing
from train.data.batch import Batch, Column
from train.data.mixture import Picks
from train.data.token_cache import TokenColumn, open_column
from train.data.vocabulary import TokenModality, Vocabulary

# Mapped files that are kept at hand: a window of 64 parts has some thousand.
_COLUMNS = 16_384


class Reader:
    """Reads the tokens of rows. All rows of a file are read together and put at their places in the batch."""

    def __init__(self, snapshots: Sequence[Snapshot], vocabulary: Vocabulary) -> None:
        """Raises ConfigError if a snapshot has another tokenizer than the vocabulary."""
        self._snapshots = tuple(snapshots)
        self._vocabulary = vocabulary
        self._corpora = tuple(sorted({part.corpus for snapshot in snapshots for part in snapshot.parts}))
        self._corpus = [_numbers(self._corpora.index(part.corpus) for part in found.parts) for found in snapshots]
        self._part = [_numbers(part.part for part in found.parts) for found in snapshots]
        self._shards = [
            {(shard.corpus, shard.part, shard.modality, shard.crop): shard for shard in found.shards}
            for found in snapshots
        ]
        for snapshot in snapshots:
            _check_tokenizers(snapshot, vocabulary)
        self._open = lru_cache(maxsize=_COLUMNS)(self._checked_column)

    def read(self, slot: int, picks: Picks) -> Batch:
        """Returns the batch of these rows; `slot` is that of the first."""
        corpus = np.empty_like(picks.rows)
        parts = np.empty_like(picks.rows)
        for source in np.unique(picks.sources).tolist():
            here = picks.sources == source
            corpus[here] = self._corpus[source][picks.places[here]]
            parts[here] = self._part[source][picks.places[here]]
        order = np.lexsort((picks.rows, picks.crops, picks.places, picks.sources))
        grouped = picks.take(order)
        files = np.stack([grouped.sources, grouped.places, grouped.crops], axis=1)
        changes = (files[1:] != files[:-1]).any(axis=1)
        edges = np.concatenate([[0], np.flatnonzero(changes) + 1, [len(order)]])
        columns = {}
        for modality in self._vocabulary.modalities:
            found = [self._open(*file, modality.name) for file in files[edges[:-1]].tolist()]
            columns[modality.name] = _column(modality, found, edges, order, grouped)
        return Batch(
            slots=np.arange(slot, slot + len(order)),
            sources=picks.sources,
            corpora=self._corpora,
            corpus=corpus,
            parts=parts,
            rows=picks.rows,
            crops=picks.crops,
            epochs=picks.epochs,
            keys=picks.keys,
            columns=columns,
        )

    def _checked_column(self, source: int, place: int, crop: int, name: str) -> TokenColumn | None:
        """Returns the column of a modality in a part, or None if the part does not have it (or not this crop)."""
        snapshot, shards = self._snapshots[source], self._shards[source]
        part = snapshot.parts[place]
        shard = shards.get((part.corpus, part.part, name, crop)) or shards.get((part.corpus, part.part, name, None))
        if shard is None:
            return None
        column = open_column(snapshot, shard)
        _check_tokens(snapshot, shard, column, self._vocabulary[name])
        return column


def cut(batch: Batch, first: int, last: int) -> Batch:
    """Returns rows first..last-1 as a batch of their own; its arrays are views."""
    rows = slice(first, last)
    columns = {}
    for name, column in batch.columns.items():
        offsets = column.offsets[first : last + 1]
        columns[name] = Column(values=column.values[offsets[0] : offsets[-1]], offsets=offsets - offsets[0])
    by_row = ("slots", "sources", "corpus", "parts", "rows", "crops", "epochs", "keys")
    return replace(batch, columns=columns, **{name: getattr(batch, name)[rows] for name in by_row})


def _column(
    modality: TokenModality,
    found: Sequence[TokenColumn | None],
    edges: Int64[np.ndarray, "G+1"],
    order: Int64[np.ndarray, "B"],
    grouped: Picks,
) -> Column:
    """Reads the tokens of a modality. Rows edges[g]..edges[g + 1] of `grouped` are in file g, `order` has their places."""
    starts, lengths = np.zeros_like(order), np.zeros_like(order)
    for column, first, last in zip(found, edges[:-1], edges[1:], strict=True):
        if column is not None:
            rows = grouped.rows[first:last]
            starts[first:last] = column.offsets[rows]
            lengths[first:last] = column.offsets[rows + 1] - starts[first:last]
    if modality.sequence:
        window = hashing.combine(grouped.keys, hashing.name_hash("window", modality.name))
        starts += hashing.below(window, np.maximum(lengths - modality.tokens, 0) + 1)
        lengths = np.minimum(lengths, modality.tokens)
    batch_lengths = np.empty_like(lengths)
    batch_lengths[order] = lengths
    offsets = np.concatenate([[0], np.cumsum(batch_lengths)])
    values = np.empty(offsets[-1], np.min_scalar_type(modality.vocabulary - 1))
    places = offsets[:-1][order]
    copy = _copy_ragged if modality.sequence else _copy_fixed
    for column, first, last in zip(found, edges[:-1], edges[1:], strict=True):
        if column is not None:
            copy(values, places[first:last], column.values, starts[first:last], lengths[first:last])
    return Column(values=values, offsets=offsets)


def _copy_fixed(
    to: np.ndarray, places: np.ndarray, source: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> None:
    """Copies all rows at once, each of which has the one length or is empty."""
    size = int(lengths.max())
    if size:
        present = lengths > 0
        to.reshape(-1, size)[places[present] // size] = source.reshape(-1, size)[starts[present] // size]


def _copy_ragged(
    to: np.ndarray, places: np.ndarray, source: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> None:
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    to[np.repeat(places, lengths) + within] = source[np.repeat(starts, lengths) + within]


def _check_tokenizers(snapshot: Snapshot, vocabulary: Vocabulary) -> None:
    known = {modality.name: modality for modality in vocabulary.modalities}
    for facts in snapshot.modalities:
        modality = known.get(facts.modality)
        if modality is not None and modality.digest != facts.tokenizer_digest:
            raise ConfigError(
                f"modality {facts.modality!r} of {snapshot.uri} has the tokens of "
                f"{facts.tokenizer}-{facts.tokenizer_digest[:12]}, the model those of {modality.tokenizer}-"
                f"{modality.digest[:12]}: their numbers mean other things; train a new model, or take a snapshot of the "
                "model's tokenizer"
            )


def _check_tokens(snapshot: Snapshot, shard: SnapshotShard, column: TokenColumn, modality: TokenModality) -> None:
    """Raises ShardError if tokens are outside the model's vocabulary or too many for it."""
    where = snapshot.storage.location(shard.path)
    most = int(column.values.max(initial=0))
    if most >= modality.vocabulary:
        raise ShardError(
            f"{where}: holds token {most}, expected 0..{modality.vocabulary - 1} of {modality.name!r}; run `modmill verify`"
        )
    lengths = np.diff(column.offsets)[column.present]
    if not modality.sequence and (lengths != modality.tokens).any():
        wrong = int(lengths[lengths != modality.tokens][0])
        raise ShardError(
            f"{where}: a row has {wrong} tokens, expected {modality.tokens} of {modality.name!r}; run `modmill verify`"
        )


def _numbers(values: Iterator[int]) -> Int64[np.ndarray, "N"]:
    return np.fromiter(values, dtype=np.int64)
