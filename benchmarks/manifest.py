"""Measures how fast the manifest answers and commits: `python -m benchmarks.manifest [--quick] [--json]`.

A log of 1,200,000 shards (a billion images in parts of 10,000, with 12 modalities), and apart from it 20,000,000 rows of
samples in 2,000 parts, at these sizes under --quick too. Prints what it does, and last one line of JSON:

    shard_rows, index_mb      what the index holds, and its file
    rebuild_s                 an index from the log alone, without a checkpoint of it
    open_ms                   a workspace opened in a new process that has imported modmill, index at hand
    point_ms                  path and counts of one shard, by corpus, part and modality
    coverage_ms               the view `coverage`: parts done and missing of every modality, over all parts
    missing_ms                which parts are missing depth by its current recipe
    shards_per_s_batch        commits of 100 shards each, with a reader at work in another process
    single_commit_over_duckdb commits of one shard a second, over one-row inserts a second of bare DuckDB, both with that reader
    reader_lag_s              the longest that the reader was behind a commit
    sample_rows               rows of samples
    sample_filter_s           a filter with two conditions over all of them
    sample_key_ms             one of them by its key
    cli_sql_s                 `modmill sql` on a small workspace, from start to end of the process

Commits are measured with what they leave waiting for the index. Query times are medians of warm repeats.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from manifests.catalog.catalog import Catalog
from manifests.formats import shards
from manifests.log import actions
from manifests.log import entries as log
from manifests.store import paths
from manifests.store.storage import Storage, cache_folder, open_storage

PARTS, PART_ROWS, COMMIT = 100_200, 10_000, 100
SAMPLE_PARTS = 2_000
MODALITIES = (
    *("rgb", "depth", "normals", "segmentation", "edges", "clip"),
    *("dinov2", "imagebind", "boxes", "palette", "metadata", "caption"),
)
_LACK_DEPTH = 50  # one part in so many has no depth
_CORPUS = actions.CorpusAdded(corpus="web", kind="image", source="web", seed=0, part_rows=PART_ROWS, config={})

_READER = """
import sys, time
from manifests.catalog.catalog import Catalog
with Catalog.open(sys.argv[1]) as catalog:
    print("ready", flush=True)
    seen = catalog.version
    while True:
        catalog.refresh()
        if catalog.version > seen:
            catalog.sql("SELECT count(*) FROM shards WHERE part = 7")
            print(catalog.version, time.time(), flush=True)
            seen = catalog.version
        time.sleep(0.02)
"""
_OPENER = """
import sys, time
from manifests.catalog.catalog import Catalog
start = time.perf_counter()
with Catalog.open(sys.argv[1]) as catalog:
    catalog.sql("SELECT count(*) FROM corpora")
    print(time.perf_counter() - start)
"""


def _digest(*what: object) -> str:
    return hashlib.sha256("/".join(map(str, what)).encode()).hexdigest()


def _shard(part: int, modality: str) -> actions.ShardAdded:
    sha256, recipe = _digest(part, modality), _digest(modality)
    return actions.ShardAdded(
        corpus="web",
        part=part,
        crop=None,
        modality=modality,
        form="token",
        fingerprint=recipe,
        path=paths.shard("web", modality, recipe, part, None, sha256, is_tar=False),
        format="parquet",
        sha256=sha256,
        size_bytes=3_900_000 + part * 37 % 10_007,
        rows=PART_ROWS,
        ok=9_950,
        failed=40,
        absent=10,
        keys_sha256=_digest("keys", part),
        tokens=1_950_200,
        vocabulary=16_384,
        device="NVIDIA H200",
        micro_batch=64,
    )


def _part(part: int, *, path: str, sha256: str, keys: tuple[str, str] | None = None, size_bytes: int = 600_000) -> Any:
    return actions.PartAdded(
        corpus="web",
        part=part,
        rows=PART_ROWS,
        path=path,
        sha256=sha256,
        size_bytes=size_bytes,
        keys_sha256=_digest("keys", part),
        source_bytes=PART_ROWS * 120_000,
        key_min=keys[0] if keys else None,
        key_max=keys[1] if keys else None,
    )


class _Log:
    """Grows a log entry by entry, without an index."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        log.create_workspace(storage)
        self._entry: log.Entry | None = None

    def add(self, new: Sequence[actions.Action]) -> None:
        after, previous = (self._entry.version, self._entry.sha256) if self._entry else (0, None)
        documents = [actions.to_json(action) for action in new]
        self._entry = log.append(self._storage, documents, run="bench", after=after, previous=previous)


def make_log(storage: Storage) -> None:
    """Makes a workspace of PARTS parts with a shard of each modality, without depth in some parts; no files."""
    grown = _Log(storage)
    document = {"form": "token", "producer": "grid", "version": 1, "weights": None}
    rest = {"parameters": {}, "crop": None, "inputs": {}}
    begun: list[actions.Action] = [_CORPUS]
    for modality in MODALITIES:
        recipe = {"modality": modality, **document, **rest}
        begun.append(actions.RecipeAdded(fingerprint=_digest(modality), document=recipe))
        current = {"corpus": "web", "modality": modality, "fingerprint": _digest(modality), "crops": None}
        begun.append(actions.RecipeCurrent(form="token", **current))
    grown.add(begun)
    for first in range(0, PARTS, 1000):
        numbers = range(first, min(first + 1000, PARTS))
        grown.add(
            [_part(part, path=paths.samples("web", part, _digest(part)), sha256=_digest(part)) for part in numbers]
        )
    waiting: list[actions.Action] = []
    for part in range(PARTS):
        waiting += [_shard(part, name) for name in MODALITIES if name != "depth" or part % _LACK_DEPTH]
        while len(waiting) >= COMMIT:
            grown.add(waiting[:COMMIT])
            waiting = waiting[COMMIT:]
    if waiting:
        grown.add(waiting)


def make_samples(storage: Storage) -> list[str]:
    """Makes a workspace with SAMPLE_PARTS parts of samples, sorted by key, and returns the first key of each part."""
    grown = _Log(storage)
    parts: list[actions.Action] = [_CORPUS]
    firsts = []
    rng = np.random.default_rng(0)
    span = 2**64 // SAMPLE_PARTS
    for part in range(SAMPLE_PARTS):
        numbers = np.sort(rng.integers(part * span, (part + 1) * span, PART_ROWS, dtype=np.uint64))
        keys = _hex_keys(numbers)
        table = pa.table(
            {
                "corpus": pa.array(["web"] * PART_ROWS),
                "part": pa.array(np.full(PART_ROWS, part, np.int32)),
                "row": pa.array(np.arange(PART_ROWS, dtype=np.int32)),
                "key": keys,
                "source": pa.array([f"images/{key}.jpg" for key in keys.to_pylist()]),
                "size_bytes": pa.array(rng.integers(20_000, 400_000, PART_ROWS)),
                "sha256": pa.array(np.frombuffer(rng.bytes(32 * PART_ROWS), "S32").tolist(), pa.binary()).cast(
                    pa.binary()
                ),
                "width": pa.array(rng.integers(200, 4000, PART_ROWS, dtype=np.int32)),
                "height": pa.array(rng.integers(200, 4000, PART_ROWS, dtype=np.int32)),
            }
        )
        path = paths.samples("web", part, _digest(part))
        target = Path(storage.full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(shards.encode_samples(table))
        ends = (keys[0].as_py(), keys[-1].as_py())
        parts.append(_part(part, path=path, sha256=_digest(part), keys=ends, size_bytes=target.stat().st_size))
        firsts.append(ends[0])
    grown.add(parts)
    return firsts


def _hex_keys(numbers: np.ndarray) -> pa.Array:
    """Formats uint64 (n,) as 16 hex digits each."""
    digits = pa.py_buffer(numbers.astype(">u8").tobytes().hex().encode())
    offsets = pa.py_buffer(np.arange(0, 16 * (len(numbers) + 1), 16, dtype=np.int32).tobytes())
    return pa.StringArray.from_buffers(len(numbers), offsets, digits)


def measure_catalog(storage: Storage, repeats: int, say: Callable[[str], None]) -> dict[str, float]:
    """Measures rebuild, size, opening, and the three questions."""
    say("an index from the log alone")
    start = time.perf_counter()
    with Catalog(storage) as catalog:
        rebuild_s = time.perf_counter() - start
        rows = catalog.sql("SELECT count(*) AS n FROM shards")["n"][0].as_py()
        lacking = catalog.sql("SELECT count(*) AS n FROM missing WHERE modality = 'depth'")["n"][0].as_py()
        assert lacking == PARTS // _LACK_DEPTH, lacking
        parts = iter(range(5001, PARTS, 977))
        figures = {
            "shard_rows": rows,
            "rebuild_s": rebuild_s,
            "point_ms": 1e3
            * _median(
                repeats * 10,
                lambda: catalog.sql(
                    "SELECT path, rows, ok, failed FROM shards WHERE corpus = 'web' AND part = ? AND modality = 'rgb'",
                    [next(parts)],
                ),
            ),
            "coverage_ms": 1e3 * _median(repeats, lambda: catalog.sql("SELECT * FROM coverage")),
            "missing_ms": 1e3
            * _median(repeats, lambda: catalog.sql("SELECT corpus, part FROM missing WHERE modality = 'depth'")),
        }
    index = next((cache_folder() / log.workspace_id(storage)).glob("index-*.duckdb"))
    figures["index_mb"] = index.stat().st_size / 1e6
    figures["open_ms"] = 1e3 * statistics.median(
        float(_python(_OPENER, storage.uri, stdout=subprocess.PIPE).communicate()[0]) for _ in range(3)
    )
    return figures


def measure_commits(storage: Storage, scratch: Path, repeats: int, say: Callable[[str], None]) -> dict[str, float]:
    """Commits of many and of one, against bare DuckDB, while a reader in another process follows."""
    say("commits, with a reader at work")
    reader = _python(_READER, storage.uri, stdout=subprocess.PIPE)
    assert reader.stdout is not None
    reader.stdout.readline()
    acknowledged: dict[int, float] = {}
    with Catalog(storage) as catalog:

        def commit(new: Sequence[actions.ShardAdded]) -> None:
            version = catalog.commit(new, run="bench")
            acknowledged[version] = time.time()

        # Shards of a second recipe's worth: parts that are there, made again.
        many = [[_shard(part, "rgb") for part in range(n * 100, n * 100 + 100)] for n in range(25 * repeats)]
        start = time.perf_counter()
        for block in many:
            commit(block)
        catalog.corpora()
        batch_s = time.perf_counter() - start
        bare = duckdb.connect(str(scratch / "bare.duckdb"))
        columns = actions.to_json(_shard(0, "rgb"))
        bare.execute(
            f"CREATE TABLE shard AS SELECT {', '.join(f'? AS {name}' for name in columns)}", [*columns.values()]
        )
        marks = ", ".join("?" * len(columns))
        ours_s = theirs_s = 0.0
        for part in range(10 * repeats):
            block = [_shard(part * 20 + n, "edges") for n in range(20)]
            start = time.perf_counter()
            for shard in block:
                commit([shard])
            catalog.corpora()
            ours_s += time.perf_counter() - start
            start = time.perf_counter()
            for shard in block:
                bare.execute(f"INSERT INTO shard VALUES ({marks})", [*actions.to_json(shard).values()])
            theirs_s += time.perf_counter() - start
        bare.close()
        time.sleep(2)
    reader.terminate()
    seen = [(int(version), float(at)) for version, at in map(str.split, reader.stdout.read().decode().splitlines())]
    lags = [
        min(at for reached, at in seen if reached >= version) - at_ours for version, at_ours in acknowledged.items()
    ]
    return {
        "shards_per_s_batch": sum(map(len, many)) / batch_s,
        "single_commit_over_duckdb": theirs_s / ours_s,
        "reader_lag_s": max(lags),
    }


def measure_samples(storage: Storage, firsts: Sequence[str], repeats: int) -> dict[str, float]:
    """Measures a filter over all samples, and look-ups by key."""
    with Catalog(storage) as catalog:
        rows = catalog.sql("SELECT count(*) AS n FROM samples")["n"][0].as_py()
        query = "SELECT count(*) AS n, avg(height) FROM samples WHERE width > 3000 AND size_bytes < 100000"
        keys = iter(firsts)

        def one() -> None:
            found = catalog.sql("SELECT * FROM samples WHERE corpus = 'web' AND key = ?", [next(keys)])
            assert found.num_rows == 1

        one()
        return {
            "sample_rows": rows,
            "sample_filter_s": _median(repeats, lambda: catalog.sql(query)),
            "sample_key_ms": 1e3 * _median(repeats * 10, one),
        }


def measure_command(folder: Path, repeats: int) -> dict[str, float]:
    """Measures `modmill sql` on a workspace with a corpus and ten shards."""
    storage = open_storage(folder)
    grown = _Log(storage)
    parts = [_part(part, path=str(part), sha256=_digest(part)) for part in range(10)]
    grown.add([_CORPUS, *parts, *(_shard(part, "rgb") for part in range(10))])
    command = [str(Path(sys.executable).with_name("modmill")), "sql", str(folder), "SELECT count(*) FROM shards"]

    def ask() -> None:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    ask()
    return {"cli_sql_s": _median(max(5, repeats), ask)}


def _median(repeats: int, work: Callable[[], Any]) -> float:
    """Returns the median seconds of the work, after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _python(script: str, *arguments: str, stdout: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it in a temporary folder (about 4 GB), cache included."""
    parser = argparse.ArgumentParser(description="Times of the manifest.")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, the same sizes")
    parser.add_argument("--json", action="store_true", help="the line of JSON alone")
    options = parser.parse_args(arguments)
    repeats = 4 if options.quick else 12

    def say(text: str) -> None:
        if not options.json:
            print(text, flush=True)

    with tempfile.TemporaryDirectory(prefix="modmill-manifest-") as folder:
        scratch = Path(folder)
        os.environ["MODMILL_CACHE"] = str(scratch / "cache")
        say(f"a log of {PARTS:,} parts x {len(MODALITIES)} modalities")
        big = open_storage(scratch / "log")
        make_log(big)
        figures = measure_catalog(big, repeats, say)
        figures |= measure_commits(big, scratch, repeats, say)
        shutil.rmtree(scratch / "log")
        say(f"samples of {SAMPLE_PARTS:,} parts")
        samples = open_storage(scratch / "samples")
        figures |= measure_samples(samples, make_samples(samples), repeats)
        figures |= measure_command(scratch / "small", repeats)
    order = __doc__.split("JSON:\n\n")[1] if __doc__ else ""
    if not options.json:
        for line in order.split("\n\n")[0].splitlines():
            for name in (word.strip(",") for word in line[:30].split()):
                if name in figures:
                    print(f"{name:28} {figures[name]:,.3f}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
