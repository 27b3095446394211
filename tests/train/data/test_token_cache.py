"""The cache of token shards: exact, checked, safe to fill from anywhere."""

import errno
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.errors import ConfigError, ShardError
from manifests.formats import shards
from manifests.recipe import sha256_hex
from manifests.snapshots.snapshot import Snapshot, SnapshotPart, SnapshotShard
from manifests.store.storage import open_storage
from train.data import token_cache
from train.data.token_cache import open_column

ROOT = Path(__file__).parents[3]
ROWS: list[list[int] | None] = [[1, 2, 3], None, [], [250], None, [7] * 40]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def frozen(folder: Path, data: bytes, keys: list[str], *, format: str = "parquet") -> tuple[Snapshot, SnapshotShard]:
    """A snapshot of one part and one shard with these bytes."""
    storage = open_storage(folder)
    path = f"data/c/m/f/part-{sha256_hex(data)[:8]}.parquet"
    storage.put(path, data)
    every = np.ones(len(keys), dtype=bool)
    digest = shards.keys_digest(keys)
    parts = [
        SnapshotPart(
            corpus=corpus,
            corpus_kind="image",
            part=part,
            rows=len(keys),
            keys_sha256=digest if (corpus, part) == ("c", 1) else "0" * 64,
            selected=every,
            held_out=~every,
        )
        for corpus in "bcd"
        for part in range(3)
    ]
    shard = SnapshotShard(
        corpus="c",
        part=1,
        modality="m",
        crop=None,
        fingerprint="f",
        path=path,
        sha256=sha256_hex(data),
        size_bytes=len(data),
        format=format,
    )
    return Snapshot(
        storage=storage, name="s", sha256="0", where=None, modalities=(), parts=tuple(parts), shards=(shard,)
    ), shard


def written(rows: list[list[int] | None], vocabulary: int) -> tuple[bytes, list[str]]:
    keys = [f"key-{row}" for row in range(len(rows))]
    statuses = [shards.Status.ABSENT if row is None else shards.Status.OK for row in rows]
    return shards.write_tokens(keys, statuses, rows, vocabulary, {}), keys


def content(column: token_cache.TokenColumn) -> list[list[int] | None]:
    pairs = zip(column.offsets[:-1], column.offsets[1:], column.present, strict=True)
    return [column.values[first:last].tolist() if present else None for first, last, present in pairs]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([(256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.uint32)]),
    st.lists(st.none() | st.lists(st.floats(0, 1, exclude_max=True), max_size=30), min_size=1, max_size=40),
)
def test_a_column_holds_what_was_written(tmp_path: Path, vocabulary, fractions) -> None:
    size, kind = vocabulary
    rows = [None if row is None else [int(fraction * size) for fraction in row] for row in fractions]
    snapshot, shard = frozen(tmp_path / "work", *written(rows, size))
    for _ in range(2):
        column = open_column(snapshot, shard)
        assert content(column) == rows
        assert column.values.dtype == kind
        assert column.offsets.dtype == np.int64


def test_rows_over_many_row_groups_are_one_column(tmp_path: Path) -> None:
    rows = [[row % 200] * (row % 5) if row % 7 else None for row in range(3000)]
    data, keys = written(rows, 256)
    assert pq.ParquetFile(io.BytesIO(data)).num_row_groups == 3
    assert content(open_column(*frozen(tmp_path, data, keys))) == rows


def test_the_file_is_made_once_and_mapped_without_staying_open(tmp_path: Path, cache: Path) -> None:
    snapshot, shard = frozen(tmp_path / "work", *written(ROWS, 256))
    column = open_column(snapshot, shard)
    assert [path.name for path in cache.iterdir()] == [f"{shard.sha256}.arrow"]
    Path(snapshot.storage.full(shard.path)).unlink()
    opened = [os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd") if _is_open(number)]
    assert not [path for path in opened if path.endswith(".arrow")]
    # Another process would have the bytes from the cache, and so has this one.
    assert content(open_column(snapshot, shard)) == ROWS
    (cache / f"{shard.sha256}.arrow").unlink()
    assert content(column) == ROWS
    with pytest.raises(ValueError, match="read-only"):
        column.values[0] = 1


def _is_open(number: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{number}")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_a_torn_file_is_made_anew(tmp_path: Path, cache: Path, keep: float) -> None:
    snapshot, shard = frozen(tmp_path / "work", *written(ROWS, 256))
    open_column(snapshot, shard)
    path = cache / f"{shard.sha256}.arrow"
    whole = path.read_bytes()
    torn = whole[: int(len(whole) * keep) if isinstance(keep, float) else keep]
    path.write_bytes(torn)
    assert content(open_column(snapshot, shard)) == ROWS
    assert path.read_bytes() == whole


def test_a_flipped_bit_anywhere_is_found_and_the_file_made_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache.os, "fsync", lambda _: None)
    snapshot, shard = frozen(tmp_path / "work", *written(ROWS, 256))
    open_column(snapshot, shard)
    path = cache / f"{shard.sha256}.arrow"
    whole = path.read_bytes()
    tokens = whole.index(bytes([1, 2, 3, 250]))
    for place in {*range(0, len(whole), 7), *range(tokens, tokens + 44)}:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert content(open_column(snapshot, shard)) == ROWS
        assert path.read_bytes() == whole


def test_a_file_of_another_format_is_made_anew(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, shard = frozen(tmp_path / "work", *written(ROWS, 256))
    monkeypatch.setattr(token_cache, "_FORMAT", b"0")
    open_column(snapshot, shard)
    old = (cache / f"{shard.sha256}.arrow").read_bytes()
    monkeypatch.undo()
    monkeypatch.setenv("MODMILL_CACHE", str(cache.parent))
    assert content(open_column(snapshot, shard)) == ROWS
    assert (cache / f"{shard.sha256}.arrow").read_bytes() != old


def test_an_altered_shard_is_refused_with_its_place(tmp_path: Path) -> None:
    snapshot, shard = frozen(tmp_path, *written(ROWS, 256))
    path = Path(snapshot.storage.full(shard.path))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=rf"{shard.path} has sha256 .*expected {shard.sha256[:12]}.*modmill verify"):
        open_column(snapshot, shard)


def test_a_missing_shard_is_refused_with_its_place(tmp_path: Path) -> None:
    snapshot, shard = frozen(tmp_path, *written(ROWS, 256))
    Path(snapshot.storage.full(shard.path)).unlink()
    with pytest.raises(ShardError, match=rf"{shard.path} is missing; snapshot 's' needs it"):
        open_column(snapshot, shard)


def test_a_shard_of_other_rows_is_refused_whether_it_is_cached_or_not(tmp_path: Path) -> None:
    data, keys = written(ROWS, 256)
    snapshot, shard = frozen(tmp_path, data, keys[::-1])
    for _ in range(2):
        with pytest.raises(ShardError, match=r"its keys have sha256 .* part 1 of 'c'"):
            open_column(snapshot, shard)


def test_a_tar_of_tokens_is_refused(tmp_path: Path) -> None:
    snapshot, shard = frozen(tmp_path, *written(ROWS, 256), format="webdataset")
    with pytest.raises(ShardError, match="from Parquet, this one is 'webdataset'"):
        open_column(snapshot, shard)


def parquet(**columns: pa.Array) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


KEYS, OK = pa.array(["a", "b"]), pa.array([0, 0], pa.uint8())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not Parquet at all", "no shard of tokens"),
        (parquet(key=KEYS, status=OK), "no shard of tokens"),
        (parquet(key=KEYS, status=OK, tokens=pa.array([1, 2])), "tokens are int64, expected lists"),
        (parquet(key=KEYS, status=OK, tokens=pa.array([[1], [2]], pa.list_(pa.int64()))), "expected lists of uint8"),
        (parquet(key=KEYS, status=OK, tokens=pa.array([[1], [None]], pa.list_(pa.uint8()))), "without nulls"),
        (parquet(key=KEYS, status=OK, tokens=pa.array([[1], None], pa.list_(pa.uint8()))), "ok and has no tokens"),
        (
            parquet(key=KEYS, status=pa.array([0, 1], pa.uint8()), tokens=pa.array([[1], [2]], pa.list_(pa.uint8()))),
            "is not ok and has some",
        ),
    ],
)
def test_what_is_no_shard_of_tokens_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    snapshot, shard = frozen(tmp_path, data, ["a", "b"])
    with pytest.raises(ShardError, match=message):
        open_column(snapshot, shard)


def test_a_full_disk_names_the_cache_and_how_to_move_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, shard = frozen(tmp_path / "work", *written(ROWS, 256))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_cache.os, "fsync", full)
    with pytest.raises(ConfigError, match=rf"{cache}: .*No space left.*MODMILL_CACHE"):
        open_column(snapshot, shard)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written .*MODMILL_CACHE"):
        open_column(*frozen(tmp_path / "work", *written(ROWS, 256)))


def test_threads_that_fill_at_once_all_get_the_tokens(tmp_path: Path, cache: Path) -> None:
    snapshot, shard = frozen(tmp_path / "work", *written(ROWS * 500, 256))
    with ThreadPoolExecutor(8) as pool:
        columns = list(pool.map(lambda _: open_column(snapshot, shard), range(16)))
    assert all(content(column) == ROWS * 500 for column in columns)
    assert [path.name for path in cache.iterdir()] == [f"{shard.sha256}.arrow"]


FILL = """
import sys
import numpy as np
from manifests.snapshots.snapshot import Snapshot, SnapshotPart, SnapshotShard
from manifests.store.storage import open_storage
from train.data.token_cache import open_column
root, path, sha256, keys, rows = sys.argv[1:]
every = np.ones(int(rows), dtype=bool)
part = SnapshotPart(corpus="c", corpus_kind="image", part=1, rows=int(rows), keys_sha256=keys, selected=every, held_out=~every)
shard = SnapshotShard(
    corpus="c", part=1, modality="m", crop=None, fingerprint="f", path=path, sha256=sha256, size_bytes=1, format="parquet"
)
snapshot = Snapshot(
    storage=open_storage(root), name="s", sha256="0", where=None, modalities=(), parts=(part,), shards=(shard,)
)
for _ in range(50):
    print(int(open_column(snapshot, shard).values.sum(dtype=np.int64)))
"""


def test_processes_that_fill_at_once_all_get_the_tokens(tmp_path: Path, cache: Path) -> None:
    rows = ROWS * 500
    data, keys = written(rows, 256)
    snapshot, shard = frozen(tmp_path / "work", data, keys)
    arguments = [snapshot.storage.uri, shard.path, shard.sha256, shards.keys_digest(keys), str(len(keys))]
    command = [sys.executable, "-c", FILL, *arguments]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    expected = str(sum(sum(row) for row in rows if row))
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0
        assert output.split() == [expected] * 50
    assert [path.name for path in cache.iterdir()] == [f"{shard.sha256}.arrow"]


def test_equal_shards_of_two_snapshots_share_a_file(tmp_path: Path, cache: Path) -> None:
    data, keys = written(ROWS, 256)
    for name in ("one", "other"):
        snapshot, shard = frozen(tmp_path / name, data, keys)
        assert content(open_column(replace(snapshot, name=name), shard)) == ROWS
    assert len(list(cache.iterdir())) == 1
