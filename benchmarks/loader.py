"""Measures how fast the loader gives rows: `python -m benchmarks.loader [--quick] [--json]`.

A snapshot of 8,192 rows in parts of 2,048, with 11 modalities of fixed length (7 of 196 tokens, 2 of 256, 2 of 16) and 6
sequences (20 to 120 tokens on average): about 2,200 tokens a row, the mix of 4M-21. Rows come shuffled, as batches of
ragged arrays, from a warm cache. Prints what it does, and last one line of JSON:

    rows_per_s, tokens_per_s  of one thread
    fill_s                    making the cache, once
    resume_s                  from the state of a loader 10^12 slots on to its first batch
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from manifests.formats.shards import keys_digest, write_tokens
from manifests.recipe import sha256_hex
from manifests.snapshots.snapshot import Snapshot, SnapshotPart, SnapshotShard
from manifests.store.storage import open_storage
from train.data.mixture import MixtureEntry
from train.data.vocabulary import TokenModality, Vocabulary

ROWS, PART_ROWS, TOKENS = 8192, 2048, 16_384
FIXED = (*[196] * 7, *[256] * 2, *[16] * 2)
MEANS = (20, 40, 60, 80, 100, 120)


def make(folder: Path) -> tuple[Snapshot, Vocabulary]:
    """Writes the snapshot's shards, and returns it with what a model would know of it."""
    storage = open_storage(folder)
    rng = np.random.default_rng(0)
    parts, shards, modalities = [], [], []
    for part in range(ROWS // PART_ROWS):
        keys = [f"{part:03d}-{row:06d}" for row in range(PART_ROWS)]
        every = np.ones(PART_ROWS, dtype=bool)
        parts.append(
            SnapshotPart(
                corpus="photos",
                corpus_kind="image",
                part=part,
                rows=PART_ROWS,
                keys_sha256=keys_digest(keys),
                selected=every,
                held_out=~every,
            )
        )
        for at, size in enumerate((*FIXED, *MEANS)):
            lengths = np.full(PART_ROWS, size) if at < len(FIXED) else rng.integers(1, 2 * size, PART_ROWS)
            values = np.split(rng.integers(0, TOKENS, lengths.sum()), np.cumsum(lengths)[:-1])
            data = write_tokens(keys, [0] * PART_ROWS, values, TOKENS, {})
            path = f"{part}-{at}.parquet"
            storage.put(path, data)
            facts = {"fingerprint": "", "sha256": sha256_hex(data), "size_bytes": len(data), "format": "parquet"}
            shards.append(
                SnapshotShard(corpus="photos", part=part, modality=f"m{at:02d}", crop=None, path=path, **facts)
            )
    for at, size in enumerate((*FIXED, *MEANS)):
        modalities.append(
            TokenModality(
                name=f"m{at:02d}",
                sequence=at >= len(FIXED),
                vocabulary=TOKENS,
                tokens=256 if at >= len(FIXED) else size,
                offset=at * TOKENS,
                tokenizer=f"m{at:02d}",
                digest=str(at),
                path="",
            )
        )
    snapshot = Snapshot(
        storage=storage,
        name="loader",
        sha256="0" * 64,
        where=None,
        modalities=(),
        parts=tuple(parts),
        shards=tuple(shards),
    )
    return snapshot, Vocabulary(modalities=tuple(modalities), size=TOKENS * len(modalities))


def measure(folder: Path, *, batch: int, seconds: float) -> dict[str, float]:
    """Returns the figures, each measured for `seconds`."""
    from train.data.loader import Loader

    snapshot, vocabulary = make(folder)
    options = {"vocabulary": vocabulary, "seed": 0, "batch": batch}
    start = time.perf_counter()
    Loader([MixtureEntry(snapshot=snapshot)], **options).batch_at(0)
    fill_s = time.perf_counter() - start
    rows = tokens = 0
    with Loader([MixtureEntry(snapshot=snapshot)], **options) as loader:
        start = time.perf_counter()
        for found in loader:
            rows += len(found)
            tokens += sum(len(column.values) for column in found.columns.values())
            if time.perf_counter() - start > seconds:
                break
        taken = time.perf_counter() - start
        state = {**loader.state(), "slot": 10**12}
    start = time.perf_counter()
    with Loader([MixtureEntry(snapshot=snapshot)], **options) as loader:
        loader.load_state(state)
        next(iter(loader))
    resume_s = time.perf_counter() - start
    return {"rows_per_s": rows / taken, "tokens_per_s": tokens / taken, "fill_s": fill_s, "resume_s": resume_s}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs it in a temporary folder, cache included."""
    parser = argparse.ArgumentParser(description="Rows a second of the loader.")
    parser.add_argument("--quick", action="store_true", help="a second of measuring instead of ten")
    parser.add_argument("--json", action="store_true", help="the line of JSON alone")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="modmill-loader-") as folder:
        os.environ["MODMILL_CACHE"] = f"{folder}/cache"
        if not options.json:
            print(f"{ROWS} rows, {len(FIXED)} fixed and {len(MEANS)} ragged modalities, batches of {options.batch}")
        figures = measure(Path(folder), batch=options.batch, seconds=1.0 if options.quick else 10.0)
    if not options.json:
        print(
            f"{figures['rows_per_s']:,.0f} rows/s, {figures['tokens_per_s'] / 1e6:,.0f} million tokens/s in one thread"
        )
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
