"""Everything of one sample, from its current shards."""

from typing import Any

import pyarrow as pa
import pytest

from manifests.catalog.catalog import Catalog
from manifests.errors import UserError
from manifests.formats import shards
from manifests.queries import lookup
from manifests.store import paths
from manifests.store.storage import Storage


@pytest.fixture
def catalog(workspace: Storage, make) -> Any:
    """A corpus of two samples: a caption, pixels of two crops and their tokens; the second sample failed."""

    def put(ending: str, data: bytes, crop: int = 0) -> str:
        path = f"{paths.stem(make.shard(modality='rgb', crop=crop).path)}.{ending}"
        assert workspace.put(path, data)
        return path

    def pixels(crop: int) -> bytes:
        writer = shards.TarWriter("png")
        writer.add("a", 0, b"pixels %d" % crop)
        writer.add("b", 1, None)
        with writer.finish() as stream:
            return stream.read()

    failure = {"corpus": "photos", "part": 0, "row": 1, "key": "b", "modality": "rgb", "form": "label", "crop": 0}
    failure |= {"stage": "decode", "class": "DecodeError", "message": "cut short"}
    with Catalog(workspace) as opened:
        opened.commit(
            [
                make.corpus(),
                make.samples_file(workspace, "photos", 0, {"caption": pa.array(["x", "y"])}, ["a", "b"]),
                make.current(),
                make.current(modality="rgb", crops=2),
                make.current(modality="rgb", form="token", crops=1),
                make.labels_file(workspace, "caption", ["a", "b"], [0, 2], ["a dog", None]),
                make.shard(
                    modality="rgb",
                    crop=0,
                    format="tar",
                    path=put("tar", pixels(0)),
                    failed_path=put("failed.parquet", shards.write_failures([failure])),
                    failed_sha256="05" * 32,
                ),
                make.shard(modality="rgb", crop=1, format="tar", path=put("tar", pixels(1), 1)),
                make.shard(
                    modality="rgb",
                    form="token",
                    crop=0,
                    path=put("parquet", shards.write_tokens(["a", "b"], [0, 1], [[5, 6], None], 1024, {})),
                ),
                # Of another recipe, and of a crop that is no more asked for: not current.
                make.shard(fingerprint=make.recipe_2),
                make.shard(modality="rgb", form="token", crop=1),
            ],
            run="r",
        )
        yield opened


def test_a_whole_sample(catalog: Catalog) -> None:
    found = lookup.show(catalog, "photos", "a")
    assert found["sample"]["source"] == "a.jpg"
    assert found["sample"]["caption"] == "x"
    assert found["label"] == {"caption": {None: "a dog"}, "rgb": {0: b"pixels 0", 1: b"pixels 1"}}
    assert found["token"] == {"rgb": {0: [5, 6]}}
    assert found["failures"] == []


def test_a_sample_that_failed(catalog: Catalog) -> None:
    found = lookup.show(catalog, "photos", "b")
    assert found["label"] == {"caption": {None: None}, "rgb": {0: None, 1: None}}
    assert found["token"] == {"rgb": {0: None}}
    assert [(row["stage"], row["class"], row["message"]) for row in found["failures"]] == [
        ("decode", "DecodeError", "cut short")
    ]


@pytest.mark.parametrize(("corpus", "key"), [("photos", "zzz"), ("nowhere", "a")])
def test_a_sample_that_is_not_there(catalog: Catalog, corpus: str, key: str) -> None:
    with pytest.raises(UserError, match=f"no sample '{key}' in the corpus '{corpus}'; corpora here: photos"):
        lookup.show(catalog, corpus, key)
