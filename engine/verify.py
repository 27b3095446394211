"""Whether a workspace is what its log says: files, counts, hashes, rows aligned over modalities, tokens in range."""

import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifests import log, shards, snapshot_files
from manifests import snapshot as snapshots
from manifests.actions import PartAdded, ShardAdded, TokenizerAdded
from manifests.catalog import Catalog
from manifests.errors import LogError, ShardError, WorkspaceError
from manifests.recipe import canonical_json, sha256_hex
from manifests.shards import Status
from manifests.storage import Storage

_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is not as the log says: where, and what is wrong."""

    path: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was looked at, and what was found wrong."""

    versions: int
    parts: int
    shards: int
    tokenizers: int
    snapshots: int
    rows: int
    size_bytes: int
    findings: list[Finding]


def verify(catalog: Catalog, on_shard: Callable[[int, int], None] = lambda done, total: None) -> Verified:
    """Reads every live file of the workspace; `on_shard` is told (done, total)."""
    storage = catalog.storage
    findings = list(_check_log(storage, catalog.version))
    parts = [part for corpus in catalog.corpora() for part in catalog.parts(corpus["corpus"])]
    keys: dict[tuple[str, int], list[str]] = {}
    for part in parts:
        try:
            keys[part.corpus, part.part] = _check_part(storage, part)
        except ShardError as error:
            findings.append(Finding(path=part.path, problem=str(error)))
    tokenizers = catalog.tokenizers()
    for known in tokenizers:
        findings += _check_tokenizer(storage, known)
    live = catalog.live_shards()

    def check(shard: ShardAdded) -> list[Finding]:
        try:
            _check_shard(storage, shard, keys.get((shard.corpus, shard.part)))
        except ShardError as error:
            return [Finding(path=shard.path, problem=str(error))]
        return []

    with ThreadPoolExecutor(_THREADS) as pool:
        for done, found in enumerate(pool.map(check, live), start=1):
            findings += found
            on_shard(done, len(live))
    frozen = _snapshots(catalog)
    findings += _check_snapshots(storage, frozen, {shard.path for shard in live})
    return Verified(
        versions=catalog.version,
        parts=len(parts),
        shards=len(live),
        tokenizers=len(tokenizers),
        snapshots=len(frozen),
        rows=sum(shard.rows for shard in live),
        size_bytes=sum(shard.size_bytes for shard in live),
        findings=findings,
    )


def _check_log(storage: Storage, newest: int) -> Iterator[Finding]:
    """The whole chain of entries, and that no entry stands behind a gap."""
    last = 0
    try:
        for entry in log.entries(storage):
            last = entry.version
    except LogError as error:
        yield Finding(path=log.entry_path(last + 1), problem=str(error))
        return
    found = [name for name in storage.names(log.LOG_FOLDER) if name.endswith(".json")]
    beyond = [name for name in found if int(name.removesuffix(".json")) > max(last, newest)]
    if beyond:
        yield Finding(path=f"{log.LOG_FOLDER}/{beyond[0]}", problem=f"entry {last + 1} is missing before it")


def _check_part(storage: Storage, part: PartAdded) -> list[str]:
    data = _read(storage, part.path, part.sha256)
    rows = shards.read_samples(data)
    keys = [row["key"] for row in rows]
    if len(rows) != part.rows or shards.keys_digest(keys) != part.keys_sha256:
        raise ShardError(f"{len(rows)} rows, the log says {part.rows}; or other keys than the log says")
    if len(set(keys)) != len(keys):
        raise ShardError("a key stands in two rows")
    return keys


def _check_tokenizer(storage: Storage, known: TokenizerAdded) -> list[Finding]:
    files = {name: sha256_hex(storage.read(f"{known.path}/{name}")) for name in storage.names(known.path)}
    if sha256_hex(canonical_json(files)) == known.digest:
        return []
    return [Finding(path=known.path, problem="its files are not those that were committed, or are gone")]


def _snapshots(catalog: Catalog) -> dict[str, str | None]:
    """The snapshots in the log and those that stand without being in it, with the sha256 that the log says."""
    recorded = {row["snapshot"]: row["sha256"] for row in catalog.snapshots().to_pylist()}
    return {**dict.fromkeys(snapshots.names(catalog.storage)), **recorded}


def _check_snapshots(
    storage: Storage, known: Mapping[str, str | None], looked_at: Collection[str]
) -> Iterator[Finding]:
    """Snapshots that are not as they were made, and shards of theirs that are gone or cut.

    Of shards that were replaced since, and so not read whole with the live ones, only the size is asked.
    """
    replaced: dict[str, tuple[str, int]] = {}
    for name, sha256 in known.items():
        folder = snapshot_files.folder_of(name)
        try:
            found = snapshots.read(storage, name)
        except (ShardError, WorkspaceError) as error:
            yield Finding(path=folder, problem=str(error))
            continue
        if sha256 not in (None, found.sha256):
            yield Finding(path=folder, problem=f"its sha256 is {found.sha256[:12]}, the log says {str(sha256)[:12]}")
        others = (shard for shard in found.shards if shard.path not in looked_at)
        replaced |= {shard.path: (name, shard.size_bytes) for shard in others}

    def check(path: str) -> Finding | None:
        name, size_bytes = replaced[path]
        try:
            is_size = storage.size(path)
        except FileNotFoundError:
            return Finding(path=path, problem=f"the file is gone, and the snapshot {name!r} is of it")
        if is_size == size_bytes:
            return None
        return Finding(path=path, problem=f"it has {is_size} bytes, the snapshot {name!r} says {size_bytes}")

    with ThreadPoolExecutor(_THREADS) as pool:
        yield from (finding for finding in pool.map(check, replaced) if finding is not None)


def _check_shard(storage: Storage, shard: ShardAdded, keys: Sequence[str] | None) -> None:
    """Raises ShardError with what is wrong first."""
    data = _read(storage, shard.path, shard.sha256)
    if shard.failed_path is not None and shard.failed_sha256 is not None:
        failed = pq.read_table(io.BytesIO(_read(storage, shard.failed_path, shard.failed_sha256)))
        if failed.num_rows != shard.failed:
            raise ShardError(f"its failed file has {failed.num_rows} rows, the log says {shard.failed}")
    elif shard.failed:
        raise ShardError(f"{shard.failed} rows failed, but there is no failed file")
    if shard.format == "parquet":
        found = _read_table(data, shard)
    else:
        found = shards.read_tar(io.BytesIO(data))
        present = [value is not None for value in found.values or []]
        if present != [status == Status.OK for status in found.statuses]:
            raise ShardError("a row that is ok has no value, or one that is not has one")
    if keys is not None and found.keys != list(keys):
        raise ShardError("its rows are not the rows of its part, in the part's order")
    counts = (shard.ok, shard.failed, shard.absent, shard.not_selected, shard.forgotten)
    if len(found.keys) != shard.rows or counts != tuple(found.statuses.count(status) for status in Status):
        raise ShardError(f"its rows by status are not the {counts} of the log")
    if sum(counts) != shard.rows:
        raise ShardError(f"ok + failed + absent + not selected + forgotten is {sum(counts)}, its rows are {shard.rows}")


def _read_table(data: bytes, shard: ShardAdded) -> shards.ShardRows:
    """A Parquet shard, its tokens checked column-wise."""
    found = shards.read_parquet(io.BytesIO(data), values=False)
    column = "tokens" if shard.form == "token" else "label"
    values = pq.read_table(io.BytesIO(data), columns=[column])[column].combine_chunks()
    is_value = values.is_valid().to_pylist()
    if is_value != [status == Status.OK for status in found.statuses]:
        raise ShardError("a row that is ok has no value, or one that is not has one")
    if shard.form == "token":
        flat = values.flatten()
        if shard.tokens is not None and len(flat) != shard.tokens:
            raise ShardError(f"it holds {len(flat)} tokens, the log says {shard.tokens}")
        largest = pc.call_function("max", [flat]).as_py()
        if largest is not None and shard.vocabulary is not None and largest >= shard.vocabulary:
            raise ShardError(f"it holds the token {largest}, its vocabulary has {shard.vocabulary}")
    return found


def _read(storage: Storage, path: str, sha256: str) -> bytes:
    try:
        data = storage.read(path)
    except FileNotFoundError:
        raise ShardError("the file is gone") from None
    found = sha256_hex(data)
    if found != sha256:
        raise ShardError(f"its sha256 is {found[:12]}, the log says {sha256[:12]}: altered or truncated")
    return data


def as_rows(verified: Verified) -> list[dict[str, Any]]:
    """The findings as rows of a table."""
    return [{"path": finding.path, "problem": finding.problem} for finding in verified.findings]
