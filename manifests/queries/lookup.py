"""Tells everything that a workspace knows of one sample."""

from typing import Any

from manifests.catalog.catalog import Catalog
from manifests.errors import UserError
from manifests.formats import shards


def show(catalog: Catalog, corpus: str, key: str) -> dict[str, Any]:
    """Returns the sample's row, its labels and tokens by modality and crop, and its failures; see `modmill.Workspace.show`.

    Raises UserError if the corpus has no such key.
    """
    rows = catalog.sql("SELECT * FROM samples WHERE corpus = ? AND key = ?", [corpus, key]).to_pylist()
    if not rows:
        known = ", ".join(row["corpus"] for row in catalog.corpora()) or "none"
        raise UserError(f"no sample {key!r} in the corpus {corpus!r}; corpora here: {known}")
    sample = rows[0]
    found: dict[str, Any] = {"sample": sample, "label": {}, "token": {}}
    current = catalog.sql(
        "SELECT path, format, modality, form, crop FROM shards WHERE is_current AND corpus = ? AND part = ? "
        "ORDER BY modality, crop",
        [corpus, sample["part"]],
    )
    for shard in current.to_pylist():
        with catalog.storage.open(shard["path"]) as file:
            rows_of = shards.read_rows(shard["format"], file)
        value = None if rows_of.values is None else rows_of.values[sample["row"]]
        found[shard["form"]].setdefault(shard["modality"], {})[shard["crop"]] = value
    failures = "SELECT * FROM failures WHERE corpus = ? AND key = ? ORDER BY modality, form, crop"
    found["failures"] = catalog.sql(failures, [corpus, key]).to_pylist()
    return found
