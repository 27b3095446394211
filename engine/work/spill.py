"""Reads rows that are there already: of the live shard that an item builds on, and of what a killed attempt wrote aside.

A long item spills: every now and then each shard on its way writes its rows so far beside where it will stand, as a
shard of fewer rows under a hidden name, which readers pass over and `modmill forget --collect` takes as temporary:

    data/<corpus>/<modality>/<fp12>/.spill-part-0000001.c00-<id8>.json.tmp       names the two below, with their sha256
                                    .spill-part-0000001.c00-<id8>-<rows>.parquet.tmp  or .tar.tmp: rows 0 to rows - 1
                                    .spill-part-0000001.c00-<id8>-<rows>.failed.parquet.tmp
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from engine.plan.items import Failure, Target, WorkItem
from engine.plan.where import unpacked
from engine.work.rows import FORGOTTEN, NOT_SELECTED, Outcome
from manifests.errors import ShardError
from manifests.formats import shards
from manifests.formats.shards import Sample, Status
from manifests.log.actions import ShardAdded
from manifests.recipe import canonical_json, sha256_hex
from manifests.store import parquet, paths
from manifests.store.storage import Storage

_FILES = ("data", "failures")
_ERRORS = (FileNotFoundError, ShardError, ValueError, KeyError, TypeError, pa.ArrowException)


def rows_of(storage: Storage, shard: ShardAdded, keys: Sequence[str]) -> list[Outcome]:
    """Returns all rows of a live shard. Raises ShardError if it is not what the log says, or has other rows."""
    data = storage.read(shard.path)
    if sha256_hex(data) != shard.sha256:
        raise ShardError(
            f"{storage.location(shard.path)}: its sha256 is not the one in the log; `modmill verify` says what to do"
        )
    failures = b"" if shard.failed_path is None else storage.read(shard.failed_path)
    rows = _rows(data, shard.format, failures, keys)
    if len(rows) != len(keys):
        raise ShardError(f"{storage.location(shard.path)} has {len(rows)} rows, its part {len(keys)}")
    return rows


def known_rows(
    item: WorkItem, target: Target, samples: Sequence[Sample], storage: Storage
) -> tuple[dict[int, Outcome], dict[int, Outcome]]:
    """Returns the rows of a target that are not made: those that the item itself settles, and those of earlier attempts.

    Only the first decide which rows share a batch, so that another attempt finds each row in its old place.
    """
    keys = [sample.key for sample in samples]
    selected = None if item.selected is None else unpacked(item.selected, len(samples))
    fixed: dict[int, Outcome] = {}
    base = item.base.get(target)
    before = [None] * len(samples) if base is None else rows_of(storage, base, keys)
    for number, (sample, row) in enumerate(zip(samples, before, strict=True)):
        is_selected = selected is None or bool(selected[number])
        if sample.is_forgotten:
            fixed[number] = FORGOTTEN
        elif row is None or row.status is Status.NOT_SELECTED:
            if not is_selected:
                fixed[number] = NOT_SELECTED
        elif row.status is not Status.FAILED or not is_selected or not _is_retried(item, row.failure):
            fixed[number] = row
    given = {
        number: Outcome(Status.FAILED, None, failure)
        for number, failure in item.attempt.killers.items()
        if number not in fixed
    }
    for number, row in enumerate(read(storage, path_of(item, target), keys) if item.attempt.resumes else ()):
        if number not in fixed:
            given[number] = row
    return fixed, given


def _is_retried(item: WorkItem, failure: Failure | None) -> bool:
    return not item.retry or failure is None or failure.class_name in item.retry


def path_of(item: WorkItem, target: Target) -> str:
    """Returns the path of a target's spill up to its ending. It names all that decides what the rows so far are."""
    base = item.base.get(target)
    identity = {
        "samples": item.part.sha256,
        "fingerprint": target.fingerprint,
        "form": target.form,
        "selected": None if item.selected is None else sha256_hex(item.selected),
        "base": None if base is None else base.sha256,
        "retry": sorted(item.retry),
    }
    place = (item.plan.corpus, target.modality, target.fingerprint, item.part.part, target.crop)
    return paths.spill(*place, sha256_hex(canonical_json(identity)))


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


def read(storage: Storage, path: str, keys: Sequence[str]) -> list[Outcome]:
    """Returns the first rows of a target, as a killed attempt left them; none if it left nothing whole."""
    pointer = _pointer(storage, path)
    if pointer is None:
        return []
    try:
        contents = {name: storage.read(pointer[name]["path"]) for name in _FILES}
        if any(sha256_hex(contents[name]) != pointer[name]["sha256"] for name in _FILES):
            return []
        return _rows(contents["data"], "webdataset" if pointer["is_tar"] else "parquet", contents["failures"], keys)
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
        pointer = json.loads(storage.read(f"{path}.json.tmp"))
        for name in _FILES:
            paths.check(pointer[name]["path"], paths.SPILL, where=f"{path}.json.tmp")
    except (FileNotFoundError, ShardError, ValueError, KeyError, TypeError):
        return None
    return pointer


def _files(pointer: Mapping[str, Any] | None) -> set[str]:
    return {pointer[name]["path"] for name in _FILES} if pointer else set()


def _rows(data: bytes, format: str, failures: bytes, keys: Sequence[str]) -> list[Outcome]:
    """Raises ShardError if the rows are not the first ones of `keys`."""
    found = shards.read_rows(format, data)
    if found.keys != list(keys[: len(found.keys)]) or found.values is None:
        raise ShardError("the rows are not those of the part")
    reasons = {
        line["row"]: Failure(line["stage"], line["class"], line["message"])
        for line in (parquet.read(failures).to_pylist() if failures else ())
    }
    return [
        Outcome(Status(status), value, reasons.get(row))
        for row, (status, value) in enumerate(zip(found.statuses, found.values, strict=True))
    ]
