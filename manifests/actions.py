"""The actions of a log entry: what a commit says happened.

Each class is one action; its fields are the fields of the JSON, and `action` is its name there. Reading passes over
fields it does not know, and fills fields that an older writer did not know with their defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from manifests.errors import LogError
from manifests.modality import Form


@dataclass(frozen=True, kw_only=True)
class CorpusAdded:
    """A corpus exists. `config` is its section of the pipeline file; seed and part_rows never change after."""

    action: ClassVar[str] = "corpus"
    corpus: str
    kind: str
    source: str
    seed: int
    part_rows: int
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PartAdded:
    """A part exists: rows, in this order, for ever. `source_bytes` is the sum of its sources' sizes."""

    action: ClassVar[str] = "part"
    corpus: str
    part: int
    rows: int
    path: str
    sha256: str
    size_bytes: int
    keys_sha256: str
    source_bytes: int


@dataclass(frozen=True, kw_only=True)
class SourcesChanged:
    """Sources that an ingest found gone or altered; `path` is the Parquet file that names them."""

    action: ClassVar[str] = "sources_changed"
    corpus: str
    path: str
    vanished: int
    changed: int


@dataclass(frozen=True, kw_only=True)
class RecipeAdded:
    """A recipe is known by its fingerprint; `document` is what the fingerprint is the hash of."""

    action: ClassVar[str] = "recipe"
    fingerprint: str
    document: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RecipeCurrent:
    """From here on this recipe is the current one of a modality and form in a corpus, with so many crops.

    `crops` is None where the grain is sample.
    """

    action: ClassVar[str] = "current"
    corpus: str
    modality: str
    form: Form
    fingerprint: str
    crops: int | None


@dataclass(frozen=True, kw_only=True)
class TokenizerAdded:
    """A tokenizer was fitted or taken in; the newest of a name is the one in use."""

    action: ClassVar[str] = "tokenizer"
    name: str
    digest: str
    path: str
    family: str
    family_version: int
    vocabulary: int
    options: Mapping[str, Any]
    rows: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ShardAdded:
    """A shard is live; it replaces the one of the same corpus, part, crop, modality, form and fingerprint, if any.

    `crop` is None where the grain is sample. `tokens` counts all tokens of the shard (None for labels). `device` and
    `micro_batch` tell what made it; they are not part of its recipe.
    """

    action: ClassVar[str] = "shard"
    corpus: str
    part: int
    crop: int | None
    modality: str
    form: Form
    fingerprint: str
    path: str
    format: str
    sha256: str
    size_bytes: int
    rows: int
    ok: int
    failed: int
    absent: int
    not_selected: int = 0
    forgotten: int = 0
    keys_sha256: str
    failed_path: str | None = None
    failed_sha256: str | None = None
    tokens: int | None = None
    vocabulary: int | None = None
    device: str = "cpu"
    micro_batch: int | None = None


@dataclass(frozen=True, kw_only=True)
class SnapshotAdded:
    """A selection of rows and shards is frozen under a name, for ever; `manifests/snapshot.py` reads it.

    `sha256` is of the SHA256SUMS in its folder `path`, and so of all of it. `where` is the condition over `samples`
    that picked the rows, None where all were picked; `held_out` counts those of `rows` that are never trained on.
    """

    action: ClassVar[str] = "snapshot"
    snapshot: str
    path: str
    sha256: str
    rows: int
    held_out: int
    where: str | None
    modalities: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """An execution began. `config` is the whole pipeline file, `versions` the libraries at work."""

    action: ClassVar[str] = "run_started"
    run: str
    kind: str
    time: str
    host: str
    commit: str | None
    versions: Mapping[str, str]
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunEnded:
    """An execution ended; `status` is done, failed, over_budget or interrupted. A killed one has no such entry."""

    action: ClassVar[str] = "run_ended"
    run: str
    time: str
    status: str
    counts: Mapping[str, int] = field(default_factory=dict)


Action = (
    CorpusAdded
    | PartAdded
    | SourcesChanged
    | RecipeAdded
    | RecipeCurrent
    | TokenizerAdded
    | ShardAdded
    | SnapshotAdded
    | RunStarted
    | RunEnded
)

KINDS: dict[str, type[Action]] = {
    kind.action: kind
    for kind in (
        CorpusAdded,
        PartAdded,
        SourcesChanged,
        RecipeAdded,
        RecipeCurrent,
        TokenizerAdded,
        ShardAdded,
        SnapshotAdded,
        RunStarted,
        RunEnded,
    )
}
AnyAction = TypeVar("AnyAction", bound=Action)


def to_json(action: Action) -> dict[str, Any]:
    """The action as it stands in the log."""
    return {"action": action.action, **asdict(action)}


def from_json(document: Mapping[str, Any]) -> Action | None:
    """The action of a log document, None for a kind that this code does not know.

    Raises LogError where a field is missing.
    """
    kind = KINDS.get(document.get("action", ""))
    if kind is None:
        return None
    known = {item.name: item for item in fields(kind)}
    missing = [
        name
        for name, item in known.items()
        if name not in document and item.default is MISSING and item.default_factory is MISSING
    ]
    if missing:
        raise LogError(f"an action {kind.action!r} in the log has no field {missing[0]!r}")
    return kind(**{name: document[name] for name in known if name in document})
