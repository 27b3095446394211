"""What tests of the manifest share: a workspace, and actions with their fields filled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from manifests.catalog.catalog import Catalog
from manifests.formats import shards
from manifests.log import actions
from manifests.log import entries as log
from manifests.modality import MODALITIES, Form
from manifests.recipe import sha256_hex
from manifests.store import paths
from manifests.store.storage import Storage, open_storage
from tests.records import RECIPE, part_added, shard_added


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own: workspaces of one id, copies of each other, stand in several tests."""
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def workspace(tmp_path: Path) -> Storage:
    """An empty workspace on the local disk."""
    storage = open_storage(tmp_path / "work")
    log.create_workspace(storage)
    return storage


class Make:
    """Actions with what a test does not care about filled in, and files that are what their actions say."""

    recipe_1 = RECIPE
    recipe_2 = "b2" * 32

    @staticmethod
    def corpus(corpus: str = "photos", **fields: Any) -> actions.CorpusAdded:
        given = {"kind": "image", "source": "photos", "seed": 0, "part_rows": 4, "config": {"kind": "image"}}
        return actions.CorpusAdded(corpus=corpus, **{**given, **fields})

    @staticmethod
    def part(corpus: str = "photos", part: int = 0, **fields: Any) -> actions.PartAdded:
        return part_added(part, corpus, **fields)

    @staticmethod
    def current(
        corpus: str = "photos",
        modality: str = "caption",
        form: Form = "label",
        fingerprint: str = RECIPE,
        crops: int | None = None,
    ) -> actions.RecipeCurrent:
        return actions.RecipeCurrent(corpus=corpus, modality=modality, form=form, fingerprint=fingerprint, crops=crops)

    @staticmethod
    def shard(corpus: str = "photos", part: int = 0, modality: str = "caption", **fields: Any) -> actions.ShardAdded:
        return shard_added(part, corpus, modality, **fields)

    @staticmethod
    def run_started(run: str = "r1", **fields: Any) -> actions.RunStarted:
        given = {"kind": "run", "time": "2026-11-23T10:00:00.000000Z", "host": "h", "commit": None, "versions": {}}
        return actions.RunStarted(run=run, **{**given, "config": {}, **fields})

    @classmethod
    def samples_file(
        cls, storage: Storage, corpus: str, part: int, columns: dict[str, pa.Array], keys: list[str]
    ) -> actions.PartAdded:
        """Writes a part's samples with their source columns; the action that says so."""
        rows = [
            {
                "corpus": corpus,
                "part": part,
                "row": row,
                "key": key,
                "source": f"{key}.jpg",
                "size_bytes": 100 + row,
                "sha256": bytes.fromhex(sha256_hex(key.encode())),
                **{name: values[row].as_py() for name, values in columns.items()},
            }
            for row, key in enumerate(keys)
        ]
        data = shards.write_samples(rows, pa.schema([(name, values.type) for name, values in columns.items()]))
        path = paths.samples(corpus, part, sha256_hex(data))
        assert storage.put(path, data)
        return cls.part(
            corpus, part, rows=len(keys), path=path, sha256=sha256_hex(data), keys_sha256=shards.keys_digest(keys)
        )

    @classmethod
    def labels_file(
        cls,
        storage: Storage,
        modality: str,
        keys: list[str],
        statuses: list[int],
        values: list[Any],
        **fields: Any,
    ) -> actions.ShardAdded:
        """Writes a shard of structured labels; the action that says so."""
        data = shards.write_labels(keys, statuses, values, MODALITIES[modality], {"modality": modality})
        action = cls.shard(
            modality=modality,
            rows=len(keys),
            ok=statuses.count(0),
            failed=statuses.count(1),
            absent=statuses.count(2),
            sha256=sha256_hex(data),
            size_bytes=len(data),
            keys_sha256=shards.keys_digest(keys),
            **fields,
        )
        place = action.corpus, modality, action.fingerprint, action.part, action.crop
        path = paths.shard(*place, action.sha256, is_tar=False)
        assert storage.put(path, data)
        return actions.from_json({**actions.to_json(action), "path": path})  # type: ignore[return-value]


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make


VIEWS = ("corpora", "parts", "samples", "shards", "recipes", "coverage", "failures", "runs", "captions", "palettes")
VIEWS += ("metadata", "boxes", "instances", "tokenizers", "lineage", "timeline")


@pytest.fixture(scope="session")
def answers() -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """All rows of the views of a catalog, in an order of their own."""

    def ask(catalog: Catalog, views: tuple[str, ...] = VIEWS) -> dict[str, list[dict[str, Any]]]:
        return {view: sorted(catalog.sql(f"SELECT * FROM {view}").to_pylist(), key=repr) for view in views}

    return ask
