"""Defines the actions of a log entry: what a commit says happened.

Each class is one action; its fields are the fields of the JSON, and `action` is its name there. Reading passes over
fields it does not know, and fills fields that an older writer did not know with their defaults.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_args

from manifests.errors import LogError
from manifests.modality import Form
from manifests.store import paths


@dataclass(frozen=True, kw_only=True)
class CorpusAdded:
    """Says that a corpus exists. `config` is its section of the pipeline file; seed and part_rows never change after."""

    action: ClassVar[str] = "corpus"
    corpus: str
    kind: str
    source: str
    seed: int
    part_rows: int
    config: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PartAdded:
    """Says that a part exists: rows, in this order, for ever. `source_bytes` is the sum of its sources' sizes.

    A part is recorded again, with the same keys, by a forget, with nulls in the rows that are forgotten, and when sources
    that could not be read are read once more. `key_min` and `key_max`
    are its least and greatest key, None in logs that did not say so yet. `pack_path` is the tar of its source bytes if
    they were copied into the workspace.
    """

    action: ClassVar[str] = "part"
    corpus: str
    part: int
    rows: int
    path: str
    sha256: str
    size_bytes: int
    keys_sha256: str
    source_bytes: int
    key_min: str | None = None
    key_max: str | None = None
    pack_path: str | None = None
    pack_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class SourcesChanged:
    """Says which sources an ingest found gone or altered; `path` is the Parquet file that names them."""

    action: ClassVar[str] = "sources_changed"
    corpus: str
    path: str
    vanished: int
    changed: int


@dataclass(frozen=True, kw_only=True)
class SamplesDropped:
    """Says what an ingest left out, by the corpus's filter or its kind; `path` is the Parquet file that names it.

    `counts` are by reason. What the filter left out is not considered again. `replaces` is the path of the file whose
    rows these are but for those that were forgotten since; that file is to be deleted whatever the retention.
    """

    action: ClassVar[str] = "samples_dropped"
    corpus: str
    path: str
    rows: int
    counts: Mapping[str, int]
    replaces: str | None = None


@dataclass(frozen=True, kw_only=True)
class RecipeAdded:
    """Says that a recipe is known by its fingerprint; `document` is what the fingerprint is the hash of."""

    action: ClassVar[str] = "recipe"
    fingerprint: str
    document: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RecipeCurrent:
    """Says that a recipe is from here on the current one of a modality and form in a corpus, with `crops` crops.

    `crops` is None if the grain is sample.
    """

    action: ClassVar[str] = "current"
    corpus: str
    modality: str
    form: Form
    fingerprint: str
    crops: int | None


@dataclass(frozen=True, kw_only=True)
class TokenizerAdded:
    """Says that a tokenizer was fitted or taken in; the newest of a name is the one in use."""

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
    """Says that a shard is live; it replaces the one of the same corpus, part, crop, modality, form and fingerprint, if any.

    `crop` is None if the grain is sample. `tokens` counts all tokens of the shard (None for labels). `device`,
    `micro_batch` and `metrics` (what `engine/work/quality` measured of its values) tell what made it and how it came out;
    they are not part of its recipe.
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
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, kw_only=True)
class ShardsRetired:
    """Says that the shards of a recipe in a corpus are live no more; their files stay until they are collected."""

    action: ClassVar[str] = "shards_retired"
    corpus: str
    modality: str
    form: Form
    fingerprint: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Forgotten:
    """Says that rows of a part are taken out for good; the same entry records the part and its shards without them.

    `rows` and `keys` go side by side. `sources_sha256` are of the source bytes, which are never ingested again.
    `files` are those that hold what is forgotten, to be deleted whatever the retention.
    """

    action: ClassVar[str] = "forgotten"
    corpus: str
    part: int
    rows: Sequence[int]
    keys: Sequence[str]
    sources_sha256: Sequence[str]
    files: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class SnapshotAdded:
    """Says that a selection of rows and shards is frozen under a name, for ever (`manifests/snapshots/snapshot.py`).

    `sha256` is of the SHA256SUMS in its folder `path`, and so of all of it. `where` is the condition over `samples`
    that picked the rows, None if all were picked; `held_out` counts those of `rows` that are never trained on.
    `replaces` names the snapshot whose rows these are but for those that were forgotten since.
    """

    action: ClassVar[str] = "snapshot"
    snapshot: str
    path: str
    sha256: str
    rows: int
    held_out: int
    where: str | None
    modalities: Sequence[str]
    replaces: str | None = None


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    """Says that an execution began. `config` is the whole pipeline file, `versions` the libraries at work."""

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
    """Says that an execution ended; `status` is done, failed, over_budget or interrupted. A killed one has no such entry."""

    action: ClassVar[str] = "run_ended"
    run: str
    time: str
    status: str
    counts: Mapping[str, int] = field(default_factory=dict)


Action = (
    CorpusAdded
    | PartAdded
    | SourcesChanged
    | SamplesDropped
    | RecipeAdded
    | RecipeCurrent
    | TokenizerAdded
    | ShardAdded
    | ShardsRetired
    | Forgotten
    | SnapshotAdded
    | RunStarted
    | RunEnded
)

ACTIONS: dict[str, type[Action]] = {kind.action: kind for kind in get_args(Action)}
# The fields that hold a path of the workspace or a list of such, with the shape that they have.
PATHS: dict[type[Action], tuple[tuple[str, paths.Shape], ...]] = {
    PartAdded: (("path", paths.SAMPLES), ("pack_path", paths.PACK)),
    SourcesChanged: (("path", paths.ANY_CHANGES),),
    SamplesDropped: (("path", paths.DROPPED), ("replaces", paths.DROPPED)),
    TokenizerAdded: (("path", paths.TOKENIZER),),
    ShardAdded: (("path", paths.SHARD), ("failed_path", paths.FAILED)),
    Forgotten: (("files", paths.OF_PART),),
    SnapshotAdded: (("path", paths.SNAPSHOT),),
}
AnyAction = TypeVar("AnyAction", bound=Action)


def to_json(action: Action) -> dict[str, Any]:
    """Returns the action as it stands in the log."""
    return {"action": action.action, **vars(action)}


def read(document: Mapping[str, Any]) -> tuple[type[Action] | None, Mapping[str, Any]]:
    """Returns the kind of a log document and its fields, with defaults and unknown ones; None if the kind is not known.

    Raises LogError if a field is missing.
    """
    kind = ACTIONS.get(document.get("action", ""))
    if kind is None:
        return None, {}
    required, defaults = _fields(kind)
    if not required <= document.keys():
        missing = next(item.name for item in fields(kind) if item.name in required - document.keys())
        raise LogError(f"an action {kind.action!r} in the log has no field {missing!r}")
    return kind, document if defaults.keys() <= document.keys() else {**defaults, **document}


def from_json(document: Mapping[str, Any]) -> Action | None:
    """Returns the action of a log document, None for a kind that this code does not know.

    Raises LogError if a field is missing.
    """
    kind, values = read(document)
    return None if kind is None else kind(**{item.name: values[item.name] for item in fields(kind)})


def check_paths(kind: type[Action], values: Mapping[str, Any], *, where: str) -> None:
    """Raises LogError if a path among the fields of an action has not the shape that such paths have in a workspace."""
    for name, shape in PATHS.get(kind, ()):
        value = values[name]
        # A long log has millions of them: those that are right cost a match each and no more.
        if (isinstance(value, str) and shape.match(value)) or (value is None and name in _fields(kind)[1]):
            continue
        for path in value if isinstance(value, list | tuple) else (value,):
            paths.check(path, shape, where=f"{where}, {kind.action}.{name}", error=LogError)


@functools.cache
def _fields(kind: type[Action]) -> tuple[frozenset[str], dict[str, Any]]:
    """Returns the names of the fields that a document must have, and the values of those that it may leave out."""
    required: set[str] = set()
    defaults: dict[str, Any] = {}
    for item in fields(kind):
        if item.default is not MISSING:
            defaults[item.name] = item.default
        elif item.default_factory is not MISSING:
            defaults[item.name] = item.default_factory()
        else:
            required.add(item.name)
    return frozenset(required), defaults
