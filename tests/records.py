"""Makes records of parts and shards with what a test does not care about filled in."""

from typing import Any

from manifests.log.actions import PartAdded, ShardAdded
from manifests.store import paths

RECIPE = "a1" * 32


def part_added(number: int = 0, corpus: str = "photos", **fields: Any) -> PartAdded:
    """Returns the record of a part of 4 rows."""
    given = {"rows": 4, "sha256": "01" * 32, "size_bytes": 10, "keys_sha256": "02" * 32, "source_bytes": 100} | fields
    given.setdefault("path", paths.samples(corpus, number, given["sha256"]))
    return PartAdded(corpus=corpus, part=number, **given)


def shard_added(part: int = 0, corpus: str = "photos", modality: str = "caption", **fields: Any) -> ShardAdded:
    """Returns the record of a shard of labels, of 4 rows, all of them ok unless `failed` or others say otherwise."""
    given = {"crop": None, "form": "label", "fingerprint": RECIPE, "format": "parquet", "sha256": "03" * 32} | fields
    given = {"size_bytes": 1000, "rows": 4, "failed": 0, "absent": 0, "keys_sha256": "02" * 32} | given
    given.setdefault("ok", given["rows"] - given["failed"] - given["absent"])
    place = (corpus, modality, given["fingerprint"], part, given["crop"])
    given.setdefault("path", paths.shard(*place, given["sha256"], is_tar=given["format"] != "parquet"))
    return ShardAdded(corpus=corpus, part=part, modality=modality, **given)
