"""Gives the modalities of a model their places in its one token table and its one head table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any, Self

from pydantic import TypeAdapter

from manifests.errors import ConfigError, nearest
from manifests.snapshots.snapshot import Snapshot, SnapshotModality

# Sequences are cut to windows of this many tokens unless the trainer file says otherwise.
MOST_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class TokenModality:
    """Holds one modality as a model sees it.

    sequence     whether it is a sequence (spans, sentinels, left to right) or a set of places (grid, vector)
    vocabulary   tokens are 0 <= token < vocabulary
    tokens       tokens per row; for a sequence the most that a model sees of it
    offset       where its tokens begin in the token table and in the head table
    tokenizer, digest, path   the tokenizer, and its folder in the workspace
    first_sentinel, sentinels   [S_0] and how many there are; sequences only
    end          the id that ends a sequence
    record_start the ids first <= id < last begin a record: such a sequence is masked record by record; else None
    """

    name: str
    sequence: bool
    vocabulary: int
    tokens: int
    offset: int
    tokenizer: str
    digest: str
    path: str
    first_sentinel: int = 0
    sentinels: int = 0
    end: int = 0
    record_start: tuple[int, int] | None = None

    @property
    def side(self) -> int | None:
        """Returns the side of a square grid of tokens, or None for sequences and grids that are not square."""
        side = isqrt(self.tokens)
        return side if not self.sequence and side * side == self.tokens else None


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Holds all modalities of a model, in a fixed order; both tables have `size` rows.

    Modalities of one tokenizer share its rows, so that documents teach the words of captions.
    """

    modalities: tuple[TokenModality, ...]
    size: int

    def index(self, name: str) -> int:
        """Returns the place of a modality. Raises ConfigError with the nearest name if the model does not have it."""
        names = [modality.name for modality in self.modalities]
        if name not in names:
            raise ConfigError(f"the model has no modality {name!r}; {nearest(name, names)}")
        return names.index(name)

    def __getitem__(self, name: str) -> TokenModality:
        return self.modalities[self.index(name)]

    def document(self) -> dict[str, Any]:
        """Returns the vocabulary as plain JSON values, as a checkpoint holds it."""
        return {"size": self.size, "modalities": [asdict(modality) for modality in self.modalities]}

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Returns the vocabulary that `document` wrote."""
        return TypeAdapter(cls).validate_python(document)


def of_snapshots(snapshots: Sequence[Snapshot], *, most_tokens: int = MOST_TOKENS) -> Vocabulary:
    """Returns the vocabulary of all modalities of some snapshots, ordered by name.

    Raises ConfigError if a modality has different tokenizers in two snapshots, or if the snapshots have no modality.
    """
    found: dict[str, tuple[Snapshot, SnapshotModality]] = {}
    for snapshot in snapshots:
        for facts in snapshot.modalities:
            held = found.setdefault(facts.modality, (snapshot, facts))
            if held[1].tokenizer_digest != facts.tokenizer_digest:
                raise ConfigError(
                    f"modality {facts.modality!r} is tokenized by {facts.tokenizer}-{facts.tokenizer_digest[:12]} in "
                    f"{snapshot.uri}, by {held[1].tokenizer}-{held[1].tokenizer_digest[:12]} in {held[0].uri}; one model "
                    "reads one tokenizer's tokens: leave the modality out of one of the two snapshots"
                )
    if not found:
        raise ConfigError("the snapshots have no modality with tokens; see `modmill status WORKSPACE`")
    offsets: dict[str, int] = {}
    size = 0
    modalities = []
    for name in sorted(found):
        snapshot, facts = found[name]
        if facts.tokenizer_digest not in offsets:
            offsets[facts.tokenizer_digest] = size
            size += facts.vocabulary
        modalities.append(_modality(snapshot, facts, offsets[facts.tokenizer_digest], most_tokens))
    return Vocabulary(modalities=tuple(modalities), size=size)


def _modality(snapshot: Snapshot, facts: SnapshotModality, offset: int, most_tokens: int) -> TokenModality:
    marks: dict[str, Any] = {}
    tokens = facts.tokens
    if facts.is_sequence:
        tokens = min(tokens or most_tokens, most_tokens)
        marks = _marks(snapshot, facts)
    if tokens is None:
        raise ConfigError(
            f"{snapshot.uri}: modality {facts.modality!r} states no tokens per row; make the snapshot again"
        )
    return TokenModality(
        name=facts.modality,
        sequence=facts.is_sequence,
        vocabulary=facts.vocabulary,
        tokens=tokens,
        offset=offset,
        tokenizer=facts.tokenizer,
        digest=facts.tokenizer_digest,
        path=facts.tokenizer_path,
        **marks,
    )


def _marks(snapshot: Snapshot, facts: SnapshotModality) -> dict[str, Any]:
    """Reads the ids that masking needs from a text tokenizer's tokenizer.json (no library is needed to look them up)."""
    path = f"{facts.tokenizer_path}/tokenizer.json"
    try:
        document = json.loads(snapshot.storage.read(path))
        ids = {token["content"]: int(token["id"]) for token in document["added_tokens"]}
        first = ids["[S_0]"]
        sentinels = 0
        while ids.get(f"[S_{sentinels}]") == first + sentinels:
            sentinels += 1
        # 4M masks metadata by whole records, whose first word is the type.
        start = (ids["v1=0"], ids["v1=999"] + 1) if facts.modality.partition("@")[0] == "metadata" else None
        return {"first_sentinel": first, "sentinels": sentinels, "end": ids["[EOS]"], "record_start": start}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{snapshot.storage.location(path)}: no text tokenizer with [EOS], [S_0].. and v1=0.. ({error!r}); fit the "
            "tokenizer `text` again"
        ) from error
