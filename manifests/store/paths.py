"""Builds, parses and checks every path of a workspace: the layout on disk stands in the templates below and nowhere else.

A path that comes from a file (an entry of the log, a sidecar, a snapshot, a checkpoint, a samples file) goes through
`check` before anything is opened: it must have one of these shapes, so it cannot lead out of the workspace.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from manifests.errors import ModmillError, ShardError

DATA = "data"
TOKENIZERS = "tokenizers"
RUNS = "runs"
META = "_meta"
FORMAT = f"{META}/format.json"
LOG = f"{META}/log"
CHECKPOINTS = f"{META}/checkpoints"
SNAPSHOTS = f"{META}/snapshots"
LEASE = f"{META}/lease.json"
LEASES = f"{META}/lease"

# Users name modalities of their own; no glob characters, which DuckDB would expand.
_NAME = r"[^/.*?\[\]{}\\\x00-\x1f][^/*?\[\]{}\\\x00-\x1f]*"


@dataclass(frozen=True)
class _Field:
    """Describes a field of a template: the texts that it matches (a pattern for Python and RE2), and how values become text."""

    pattern: str
    write: Callable[[Any], str] = str
    read: Callable[[str], Any] = str


_FIELDS = {
    "corpus": _Field("[a-z0-9_]{1,64}"),
    "modality": _Field(_NAME),
    "tokenizer": _Field(_NAME),
    "place": _Field(f"_samples|_source|{_NAME}/[0-9a-f]{{12}}"),
    "part": _Field("[0-9]{7}|[1-9][0-9]{7,}", "{:07d}".format, int),
    "crop": _Field(
        r"|\.c(?:[0-9]{2}|[1-9][0-9]{2,})",
        lambda crop: "" if crop is None else f".c{crop:02d}",
        lambda text: int(text[2:]) if text else None,
    ),
    "list": _Field("changes|dropped"),
    "changes": _Field("_samples/changes-[0-9a-f]{8}|_changes/[0-9]+"),
    "sha8": _Field("[0-9a-f]{8}"),
    "fp12": _Field("[0-9a-f]{12}"),
    "digest12": _Field("[0-9a-f]{12}"),
    "id12": _Field("[0-9a-f]{12}"),
    "format": _Field("parquet|tar"),
    "ending": _Field(r"parquet|tar|failed\.parquet|json"),
    "spilled": _Field(r"\.json|-[0-9]+(?:\.parquet|\.tar|\.failed\.parquet)"),
    "version": _Field("[0-9]{20}", "{:020d}".format, int),
    "snapshot": _Field("[A-Za-z0-9][A-Za-z0-9._-]{0,63}"),
    "run": _Field(r"[^/.\x00-\x1f][^/\x00-\x1f]*"),
    "segment": _Field("[0-9]{6}|[1-9][0-9]{6,}", "{:06d}".format, int),
    "item": _Field(r"[^/.\x00-\x1f][^/\x00-\x1f]*"),
    "step": _Field("[0-9]{8}|[1-9][0-9]{8,}", "{:08d}".format, int),
}
_IN_TEMPLATE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Shape:
    """Describes a kind of path: a template with fields in braces, from which a path is built and by which it is parsed."""

    template: str

    @cached_property
    def pattern(self) -> str:
        """Holds for whole paths of this shape only, in Python and in DuckDB (`regexp_full_match`)."""
        pieces = _IN_TEMPLATE.split(self.template)
        return "".join(
            f"(?P<{piece}>{_FIELDS[piece].pattern})" if place % 2 else re.escape(piece)
            for place, piece in enumerate(pieces)
        )

    @cached_property
    def match(self) -> Callable[[str], re.Match[str] | None]:
        """Matches a whole path."""
        return re.compile(self.pattern).fullmatch

    def path(self, **fields: Any) -> str:
        """Builds the path with these fields."""
        return self.template.format_map({name: _FIELDS[name].write(value) for name, value in fields.items()})

    def parse(self, path: str) -> dict[str, Any] | None:
        """Returns the fields of a path, None if it has another shape."""
        match = self.match(path)
        return None if match is None else {name: _FIELDS[name].read(text) for name, text in match.groupdict().items()}

    def __str__(self) -> str:
        return _IN_TEMPLATE.sub(r"<\1>", self.template)


SAMPLES = Shape("data/{corpus}/_samples/part-{part}-{sha8}.parquet")
CHANGES = Shape("data/{corpus}/_samples/changes-{sha8}.parquet")
# As the log of format 1 may name it: its first fixture, which stays readable, has a folder for them.
ANY_CHANGES = Shape("data/{corpus}/{changes}.parquet")
DROPPED = Shape("data/{corpus}/_samples/dropped-{sha8}.parquet")
PACK = Shape("data/{corpus}/_source/part-{part}-{sha8}.tar")
SHARD = Shape("data/{corpus}/{modality}/{fp12}/part-{part}{crop}-{sha8}.{format}")
FAILED = Shape("data/{corpus}/{modality}/{fp12}/part-{part}{crop}-{sha8}.failed.parquet")
SPILL = Shape("data/{corpus}/{modality}/{fp12}/.spill-part-{part}{crop}-{sha8}{spilled}.tmp")
SPILL_BEGINNING = ".spill-part-"
# Any of the files of a part, with what stands beside it under the same name: its failed file and its sidecar.
OF_PART = Shape("data/{corpus}/{place}/part-{part}{crop}-{sha8}.{ending}")
LIST = Shape("data/{corpus}/_samples/{list}-{sha8}.{ending}")
TOKENIZER = Shape("tokenizers/{tokenizer}-{digest12}")
LOG_ENTRY = Shape("_meta/log/{version}.json")
CHECKPOINT = Shape("_meta/checkpoints/{version}")
SNAPSHOT = Shape("_meta/snapshots/{snapshot}")
LEASE_EPOCH = Shape("_meta/lease/{version}.json")
RECEIPT = Shape("_meta/receipts/{run}.json")
EVENTS = Shape("runs/{run}/events.jsonl")
EVENTS_SEGMENT = Shape("runs/{run}/events-{segment}.jsonl")
MARK = Shape("runs/{run}/marks/{item}.json")
FIT = Shape("runs/fit-{tokenizer}-{id12}")
FIT_CHECKPOINT = Shape("runs/fit-{tokenizer}-{id12}/checkpoint-{step}.safetensors")


# -- checking ---------------------------------------------------------------------------------------------------------


def check(path: Any, *shapes: Shape, where: str, error: type[ModmillError] = ShardError) -> None:
    """Raises `error` if a path that a file (`where`) names has none of these shapes."""
    if isinstance(path, str) and any(shape.match(path) for shape in shapes):
        return
    if not isinstance(path, str):
        problem = "is no text"
    elif path.startswith("/") or "://" in path or "::" in path or ".." in path.split("/"):
        problem = "leads out of the workspace"
    else:
        problem = "is no such file of a workspace"
    raise error(f"{where}: the path {path!r} {problem}, expected {' or '.join(map(str, shapes))}")


# -- data -------------------------------------------------------------------------------------------------------------


def samples(corpus: str, part: int, sha256: str) -> str:
    """Returns the path of a part's samples file."""
    return SAMPLES.path(corpus=corpus, part=part, sha8=sha256[:8])


def changes(corpus: str, sha256: str) -> str:
    """Returns the path of a list of sources that are gone or altered."""
    return CHANGES.path(corpus=corpus, sha8=sha256[:8])


def dropped(corpus: str, sha256: str) -> str:
    """Returns the path of a list of samples that an ingest left out."""
    return DROPPED.path(corpus=corpus, sha8=sha256[:8])


def pack(corpus: str, part: int, sha256: str) -> str:
    """Returns the path of the tar of a part's source bytes."""
    return PACK.path(corpus=corpus, part=part, sha8=sha256[:8])


def shard(
    corpus: str, modality: str, fingerprint: str, part: int, crop: int | None, sha256: str, *, is_tar: bool
) -> str:
    """Returns the path of a shard; `sha256` is what `shards.named_by` gives."""
    return SHARD.path(
        corpus=corpus,
        modality=modality,
        fp12=fingerprint[:12],
        part=part,
        crop=crop,
        sha8=sha256[:8],
        format="tar" if is_tar else "parquet",
    )


def spill(corpus: str, modality: str, fingerprint: str, part: int, crop: int | None, identity: str) -> str:
    """Returns the path of a spill up to its ending; `identity` is the sha256 of all that decides its rows."""
    path = SPILL.path(
        corpus=corpus, modality=modality, fp12=fingerprint[:12], part=part, crop=crop, sha8=identity[:8], spilled=""
    )
    return path.removesuffix(".tmp")


def renamed(path: str, sha256: str) -> str:
    """Returns the path beside this one (of a samples file, a shard or a pack) that another content has."""
    shape, fields = next((shape, found) for shape in (SAMPLES, PACK, SHARD) if (found := shape.parse(path)))
    return shape.path(**{**fields, "sha8": sha256[:8]})


def failed(path: str) -> str:
    """Returns the path of the failed file of a shard."""
    return f"{stem(path)}.failed.parquet"


def sidecar(path: str) -> str:
    """Returns the path of the sidecar of a samples file, a shard or the folder of a tokenizer."""
    return f"{path if TOKENIZER.match(path) else stem(path)}.json"


def stem(path: str) -> str:
    """Returns the path up to its ending, which all files of one name share; as it is if modmill gives no such names."""
    found = OF_PART.match(path) or LIST.match(path)
    return path if found is None else path[: found.start("ending") - 1]


def group(path: str) -> str:
    """Returns the folder that holds a modality of a corpus: `data/<corpus>/<modality>`, or less if the path is shorter."""
    return "/".join(path.split("/")[:-1][:3])


def corpus_folder(corpus: str) -> str:
    """Returns the folder of a corpus."""
    return f"{DATA}/{corpus}"


def samples_folder(corpus: str) -> str:
    """Returns the folder of a corpus's samples files and lists."""
    return f"{DATA}/{corpus}/_samples"


def recipe_folder(corpus: str, modality: str, fingerprint: str) -> str:
    """Returns the folder of the shards of a recipe."""
    return f"{DATA}/{corpus}/{modality}/{fingerprint[:12]}"


def source_folder(corpus: str) -> str:
    """Returns the folder of a corpus's packed sources."""
    return f"{DATA}/{corpus}/_source"


def is_temporary(path: str) -> bool:
    """Tells whether a file is one that a writer makes on its way: hidden, and `.tmp` at its end."""
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(".tmp") and len(name) > len("..tmp")


# -- tokenizers, the log and what stands beside it, runs --------------------------------------------------------------


def tokenizer(name: str, digest: str) -> str:
    """Returns the folder of a tokenizer."""
    return TOKENIZER.path(tokenizer=name, digest12=digest[:12])


def log_entry(version: int) -> str:
    """Returns the path of an entry of the log."""
    return LOG_ENTRY.path(version=version)


def checkpoint(version: int) -> str:
    """Returns the folder of a checkpoint of the log."""
    return CHECKPOINT.path(version=version)


def snapshot(name: str) -> str:
    """Returns the folder of a snapshot."""
    return SNAPSHOT.path(snapshot=name)


def is_snapshot_name(name: str) -> bool:
    """Tells whether a snapshot can have this name: 1 to 64 of A-Z a-z 0-9 . _ - without . _ - first."""
    return SNAPSHOT.match(f"{SNAPSHOTS}/{name}") is not None


def lease_epoch(epoch: int) -> str:
    """Returns the path of the lease of an epoch, on an object store."""
    return LEASE_EPOCH.path(version=epoch)


def receipt(run: str) -> str:
    """Returns the path of the receipt of a forget."""
    return RECEIPT.path(run=run)


def run(name: str) -> str:
    """Returns the folder of a run."""
    return f"{RUNS}/{name}"


def events(run: str) -> str:
    """Returns the path of the events of a run in a local workspace."""
    return EVENTS.path(run=run)


def events_segment(run: str, segment: int) -> str:
    """Returns the path of one segment of the events of a run, on an object store."""
    return EVENTS_SEGMENT.path(run=run, segment=segment)


def mark(run: str, item: str) -> str:
    """Returns the path of the mark of an item: what a worker has at hand."""
    return MARK.path(run=run, item=item.replace("/", "+"))


def fit(tokenizer: str, identity: str) -> str:
    """Returns the folder of a fit's checkpoints; `identity` is the sha256 of all that decides them."""
    return FIT.path(tokenizer=tokenizer, id12=identity[:12])


def fit_checkpoint(folder: str, step: int) -> str:
    """Returns the path of a checkpoint in the folder of a fit."""
    return FIT_CHECKPOINT.path(**(FIT.parse(folder) or {}), step=step)
