"""Rows that are there already: of the live shard that an item builds on, and of what a killed attempt wrote aside.

A long item spills: every now and then each shard on its way writes its rows so far beside where it will stand, as a
shard of fewer rows under a hidden name, which readers pass over and `modmill collect` takes for what it is, temporary:

    data/<corpus>/<modality>/<fp12>/.spill-part-0000001.c00-<id8>.json.tmp       names the two below, with their sha256
                                    .spill-part-0000001.c00-<id8>-<rows>.parquet.tmp  or .tar.tmp: rows 0 to rows - 1
                                    .spill-part-0000001.c00-<id8>-<rows>.failed.parquet.tmp
"""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from engine.plan.items import Failure, Target, WorkItem
from engine.work.rows import ShardRow
from manifests.errors import ShardError
from manifests.formats import shards
from manifests.formats.shards import Status
from manifests.log.actions import ShardAdded
from manifests.recipe import canonical_json, sha256_hex
from manifests.store import parquet
from manifests.store.storage import Storage

_ERRORS = (FileNotFoundError, ShardError, ValueError, KeyError, TypeError, pa.ArrowException)


def rows_of(storage: Storage, shard: ShardAdded, keys: Sequence[str]) -> list[ShardRow]:
    """All rows of a live shard. Raises ShardError where it is not what the log says, or has other rows."""
    data = storage.read(shard.path)
    if sha256_hex(data) != shard.sha256:
        raise ShardError(
            f"{storage.location(shard.path)}: its sha256 is not the one in the log; `modmill verify` says what to do"
        )
    failures = b"" if shard.failed_path is None else storage.read(shard.failed_path)
    rows = _rows(data, shard.format == "webdataset", failures, keys)
    if len(rows) != len(keys):
        raise ShardError(f"{storage.location(shard.path)} has {len(rows)} rows, its part {len(keys)}")
    return rows


def path_of(item: WorkItem, target: Target) -> str:
    """The path of a target's spill up to its ending. It names all that decides what the rows so far are."""
    base = item.base.get(target)
    identity = {
        "samples": item.part.sha256,
        "fingerprint": target.fingerprint,
        "form": target.form,
        "selected": None if item.selected is None else sha256_hex(item.selected),
        "base": None if base is None else base.sha256,
        "retry": sorted(item.retry),
    }
    folder = f"data/{item.plan.corpus}/{target.modality}/{target.fingerprint[:12]}"
    name = shards.file_stem(item.part.part, target.crop, sha256_hex(canonical_json(identity)))
    return f"{folder}/.spill-{name}"


def write(storage: Storage, path: str, rows: int, data: bytes, *, is_tar: bool, failures: bytes) -> None:
    """Writes a target's first `rows` rows aside and then lets go of those written before."""
    before = _files(_pointer(storage, path))
    files = {}
    for name, content in (("data", data), ("failures", failures)):
        ending = ".failed.parquet.tmp" if name == "failures" else ".tar.tmp" if is_tar else ".parquet.tmp"
        files[name] = {"path": f"{path}-{rows}{ending}", "sha256": sha256_hex(content)}
        storage.replace(files[name]["path"], content)
    # The pointer goes last: what it names is whole.
    storage.replace(f"{path}.json.tmp", json.dumps({"is_tar": is_tar, **files}).encode())
    for old in before - _files(files):
        storage.remove(old)


def read(storage: Storage, path: str, keys: Sequence[str]) -> list[ShardRow]:
    """The first rows of a target, as a killed attempt left them; none where it left nothing, or nothing whole."""
    pointer = _pointer(storage, path)
    if pointer is None:
        return []
    try:
        data, failures = (storage.read(pointer[name]["path"]) for name in ("data", "failures"))
        if any(
            sha256_hex(content) != pointer[name]["sha256"] for name, content in (("data", data), ("failures", failures))
        ):
            return []
        return _rows(data, pointer["is_tar"], failures, keys)
    except _ERRORS:
        return []


def remove(storage: Storage, path: str) -> None:
    """Removes a target's spill, if there is one."""
    pointer = _pointer(storage, path)
    if pointer is not None:
        storage.remove(f"{path}.json.tmp")
        for file in _files(pointer):
            storage.remove(file)


def _pointer(storage: Storage, path: str) -> dict[str, Any] | None:
    try:
        return json.loads(storage.read(f"{path}.json.tmp"))
    except (FileNotFoundError, ValueError):
        return None


def _files(pointer: Mapping[str, Any] | None) -> set[str]:
    return {pointer[name]["path"] for name in ("data", "failures")} if pointer else set()


def _rows(data: bytes, is_tar: bool, failures: bytes, keys: Sequence[str]) -> list[ShardRow]:
    """Raises ShardError where the rows are not the first ones of `keys`."""
    found = shards.read_tar(io.BytesIO(data)) if is_tar else shards.read_parquet(data)
    if found.keys != list(keys[: len(found.keys)]) or found.values is None:
        raise ShardError("the rows are not those of the part")
    reasons = {
        line["row"]: Failure(line["stage"], line["class"], line["message"])
        for line in (parquet.read(failures).to_pylist() if failures else ())
    }
    return [
        ShardRow(Status(status), value, reasons.get(row))
        for row, (status, value) in enumerate(zip(found.statuses, found.values, strict=True))
    ]
