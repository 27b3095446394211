"""Checks whether a workspace is what its log says: files, counts, hashes, rows aligned over modalities, tokens in range.

Wrong files are told apart from those that are only left over: replaced and retired files, orphans of killed runs, temporary
files, and files without a sidecar, which loses nothing as long as the log is intact.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from engine.upkeep.leftovers import Finding, leftovers
from engine.upkeep.verify_shard import CheckedPart, check_part, check_shard, check_tokenizer, read_logged
from manifests.catalog.catalog import Catalog
from manifests.errors import LogError, ModmillError, ShardError
from manifests.formats import sidecars
from manifests.log import entries as log
from manifests.log.actions import PartAdded, ShardAdded
from manifests.queries import audit, retention
from manifests.snapshots import snapshot as snapshots
from manifests.store import paths
from manifests.store.storage import Storage

if TYPE_CHECKING:
    # It loads OpenCV, and for tokens torch.
    from engine.upkeep.verify_values import DeepCheck

_THREADS = 4
_PARTS_AT_ONCE = 32
Item = TypeVar("Item")
Result = TypeVar("Result")
_WRITE_IT = "`modmill verify --recover` writes it from the log"


@dataclass(kw_only=True)
class Verified:
    """Holds what was looked at, what was found wrong, what is left over, and what could not be checked."""

    versions: int
    parts: int = 0
    shards: int = 0
    tokenizers: int = 0
    snapshots: int = 0
    rows: int = 0
    size_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    left_over: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    catalog: Catalog, on_shard: Callable[[int, int], None] = lambda done, total: None, *, deep: bool = False
) -> Verified:
    """Reads every live file of the workspace, some parts at a time; `on_shard` is told (done, total).

    With `deep`, values are decoded and compared with their modality, replaced files that snapshots name are hashed, and
    the index and the checkpoints are compared with a replay of the log.
    """
    return _Verifier(catalog, on_shard, deep=deep).all()


class _Verifier:
    def __init__(self, catalog: Catalog, on_shard: Callable[[int, int], None], *, deep: bool) -> None:
        self._catalog = catalog
        self._storage = catalog.storage
        self._on_shard = on_shard
        self._is_deep = deep
        self._deep: DeepCheck | None = None
        self._done = Verified(versions=catalog.version)
        self._frozen: set[str] = set()
        self._forgotten = retention.forgotten_rows(catalog)

    def all(self) -> Verified:
        done = self._done
        done.findings += _check_log(self._storage)
        if not self._catalog.version and self._storage.names(paths.DATA):
            self._wrong(
                paths.LOG, "the log is empty or lost, but there is data; `modmill verify --recover` rebuilds it"
            )
        counts = audit.counts(self._catalog)
        if counts["strays"]:
            self._wrong(paths.LOG, f"{counts['strays']} live shards are of parts that the log does not know")
        self._check_tokenizers()
        if self._is_deep:
            from engine.upkeep.verify_values import DeepCheck

            self._deep = DeepCheck(self._catalog)
        with ThreadPoolExecutor(_THREADS) as pool:
            for corpus in audit.corpora_with_parts(self._catalog):
                self._check_corpus(pool, corpus, counts["shards"])
            self._check_snapshots(pool)
        if self._is_deep:
            done.findings += (Finding(path=path, problem=why) for path, why in audit.check_index(self._catalog))
        if self._deep is not None:
            done.notes += sorted(self._deep.notes)
        for left in leftovers(self._catalog):
            if left.named is not None or left.file.path not in self._frozen:
                done.left_over.append(left.finding())
        done.left_over.sort(key=lambda finding: (finding.kind, finding.path))
        return done

    def _wrong(self, path: str, problem: str) -> None:
        self._done.findings.append(Finding(path=path, problem=problem))

    # -- tokenizers, parts and their shards ---------------------------------------------------------------------------

    def _check_tokenizers(self) -> None:
        for known in self._catalog.tokenizers():
            self._done.tokenizers += 1
            try:
                check_tokenizer(self._storage, known)
                self._note_sidecar(known)
            except ShardError as error:
                self._wrong(known.path, str(error))

    def _note_sidecar(self, described: sidecars.Described) -> None:
        """Lists a part or tokenizer without a sidecar as left over: early releases wrote none for these."""
        if not sidecars.check(self._storage, described):
            problem = f"has no sidecar; {_WRITE_IT}"
            self._done.left_over.append(Finding(path=described.path, problem=problem, kind="no sidecar"))

    def _check_corpus(self, pool: ThreadPoolExecutor, corpus: str, shards: int) -> None:
        parts = self._catalog.parts(corpus)
        missing = sorted(set(range(parts[-1].part + 1)) - {part.part for part in parts})
        if missing:
            self._wrong(paths.samples_folder(corpus), f"the log has {len(parts)} parts, but no part {missing[0]}")
        for first in range(0, len(parts), _PARTS_AT_ONCE):
            some = parts[first : first + _PARTS_AT_ONCE]
            rows: dict[int, CheckedPart] = {}
            checked = _ahead(pool, lambda part: self._part(part, self._forgotten.get((corpus, part.part), set())), some)
            for part, found in zip(some, checked, strict=True):
                self._done.parts += 1
                if isinstance(found, CheckedPart):
                    rows[part.part] = found
                else:
                    self._wrong(part.path, found)
            self._check_shards(pool, self._catalog.live_shards(corpus, some[0].part, some[-1].part), rows, shards)

    def _part(self, part: PartAdded, forgotten: set[int]) -> CheckedPart | str:
        try:
            found = check_part(self._storage, part, forgotten)
            self._note_sidecar(part)
            return found
        except ShardError as error:
            return str(error)

    def _check_shards(
        self, pool: ThreadPoolExecutor, shards: Sequence[ShardAdded], rows: Mapping[int, CheckedPart], total: int
    ) -> None:
        problems = _ahead(pool, lambda shard: self._shard(shard, rows.get(shard.part)), shards)
        for shard, problem in zip(shards, problems, strict=True):
            self._done.shards += 1
            self._done.rows += shard.rows
            self._done.size_bytes += shard.size_bytes
            self._on_shard(self._done.shards, total)
            if problem is not None:
                self._wrong(shard.path, problem)

    def _shard(self, shard: ShardAdded, part: CheckedPart | None) -> str | None:
        try:
            found = check_shard(self._storage, shard, part)
            if self._deep is not None:
                self._deep.check(found)
            if not sidecars.check(self._storage, shard):
                return f"its sidecar is gone; {_WRITE_IT}"
        except ShardError as error:
            return str(error)
        return None

    # -- snapshots ----------------------------------------------------------------------------------------------------

    def _check_snapshots(self, pool: ThreadPoolExecutor) -> None:
        """Checks the snapshots in the log and those that the log does not name, and that their shards are still there.

        Shards that were replaced since are not read with the live ones: only their size is checked, unless `deep` is set.
        Shards that a forget took out of a snapshot are no loss if the snapshot has a successor.
        """
        recorded = {row["snapshot"]: row for row in self._catalog.snapshots().to_pylist()}
        names = sorted({*snapshots.names(self._storage), *recorded})
        self._done.snapshots = len(names)
        for name in names:
            row = recorded.get(name, {"sha256": None, "replaced_by": None})
            folder = paths.snapshot(name)
            try:
                found = snapshots.read(self._storage, name, even_replaced=True)
            except ModmillError as error:
                self._wrong(folder, str(error))
                continue
            if row["sha256"] not in (None, found.sha256):
                self._wrong(folder, f"its sha256 is {found.sha256[:12]}, the log says {str(row['sha256'])[:12]}")
            self._check_snapshot_shards(pool, found, row["replaced_by"])

    def _check_snapshot_shards(
        self, pool: ThreadPoolExecutor, snapshot: snapshots.Snapshot, replaced_by: str | None
    ) -> None:
        self._frozen.update(shard.path for shard in snapshot.shards)
        named: dict[str, audit.Named] = {}
        for folder in {shard.path.rpartition("/")[0] for shard in snapshot.shards}:
            named |= audit.named_files(self._catalog, folder)
        live = {stem for stem, name in named.items() if name.is_live}
        others = [shard for shard in snapshot.shards if paths.stem(shard.path) not in live]

        def check(shard: snapshots.SnapshotShard) -> str | None:
            try:
                if self._is_deep:
                    read_logged(self._storage, shard.path, shard.sha256)
                elif (is_size := self._storage.size(shard.path)) != shard.size_bytes:
                    return f"it has {is_size} bytes, the snapshot {snapshot.name!r} says {shard.size_bytes}"
            except FileNotFoundError:
                return f"the file is gone, and the snapshot {snapshot.name!r} is of it"
            except ShardError as error:
                return f"{error} (the snapshot {snapshot.name!r} is of it)"
            return None

        found = list(zip(others, _ahead(pool, check, others), strict=True))
        gone = [shard for shard, problem in found if problem is not None]
        if gone and replaced_by is not None:
            problem = f"{len(gone)} of its shards are gone since rows were forgotten; {replaced_by!r} replaces it"
            path = paths.snapshot(snapshot.name)
            self._done.left_over.append(Finding(path=path, problem=problem, kind="replaced"))
            return
        known = {finding.path for finding in self._done.findings}
        for shard, problem in found:
            if problem is not None and shard.path not in known:
                self._wrong(shard.path, problem)


def _check_log(storage: Storage) -> Iterator[Finding]:
    """Yields what is wrong with the chain of entries, and the entries that stand behind a gap."""
    last = 0
    try:
        for entry in log.entries(storage):
            last = entry.version
    except LogError as error:
        yield Finding(path=paths.log_entry(last + 1), problem=str(error))
        return
    # A listing made while a driver writes may have an entry without the one before: only a look by name is sure.
    for name in storage.names(paths.LOG):
        version = int(name[:20]) if name[:20].isdecimal() else 0
        if version > last and not storage.exists(paths.log_entry(version - 1)):
            yield Finding(path=f"{paths.LOG}/{name}", problem=f"entry {version - 1} is missing before it")


def _ahead(pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields the results in order. Few items are under way at a time, as each holds a file in memory."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 2 * _THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
