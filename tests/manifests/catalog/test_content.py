"""Views over Parquet: samples with any source columns, failures, and what kept labels say, from the shards live now."""

import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from manifests.catalog.catalog import Catalog
from manifests.catalog.content import CONTENT_VIEWS
from manifests.errors import QueryError
from manifests.formats import shards
from manifests.log import entries as log
from manifests.modality import MODALITIES, Modality
from manifests.recipe import sha256_hex
from manifests.store import paths
from manifests.store.storage import Storage, open_storage

DOG = {"class": "dog", "score": 0.5, "x0": 0.0, "y0": 0.25, "x1": 0.5, "y1": 0.75}
CAT = {"class": "cat", "score": 1.0, "x0": 0.5, "y0": 0.5, "x1": 1.0, "y1": 1.0}
RED = {"k": 2, "rank": 0, "r": 255, "g": 0, "b": 0, "share": 0.75}
BLUE = {"k": 2, "rank": 1, "r": 0, "g": 0, "b": 255, "share": 0.25}
VECTORS = {"clip_global": 512, "dinov2_global": 768, "imagebind_global": 1280}
FACTS = {
    "original_width": 640,
    "original_height": 480,
    "caption_n_chars": 10,
    "caption_n_words": 3,
    "caption_n_sentences": 1,
    "colorfulness": 0.5,
    "brightness": 100.0,
    "contrast": 2.0,
    "saturation": 0.25,
    "entropy": 7.5,
}
POSE = {"global_orient": [1.0] * 9, "body_pose": [0.5] * 207, "betas": [0.0] * 10, "camera": [0.9, 0.0, 0.1]}
MASK = {"rle_height": 4, "rle_width": 4, "rle_counts": [3, 2**32 - 1]}


def current(make, corpus: str = "photos") -> list[Any]:
    """All structured modalities and vectors are made by recipe 1."""
    structured = ("boxes", "instances", "palette", "metadata", "caption", "poses")
    return [
        *(make.current(corpus, modality) for modality in structured),
        *(make.current(corpus, modality, crops=2) for modality in VECTORS),
    ]


def vector(name: str, *start: float) -> np.ndarray:
    """A vector of a modality that begins with these numbers; the rest is 0."""
    found = np.zeros(VECTORS[name], np.float32)
    found[: len(start)] = start
    return found


@pytest.fixture
def catalog(workspace: Storage) -> Any:
    with Catalog(workspace) as opened:
        yield opened


def ask(catalog: Catalog, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in catalog.sql(query).to_pylist()]


# -- what labels say --------------------------------------------------------------------------------------------------


def test_boxes_are_one_row_each_with_their_area(catalog: Catalog, make) -> None:
    labels = make.labels_file(catalog.storage, "boxes", list("abcd"), [0, 1, 0, 2], [[DOG, CAT], None, [], None])
    more = make.labels_file(catalog.storage, "boxes", ["e"], [0], [[DOG]], part=1)
    catalog.commit([*current(make), labels, more], run="r")
    query = "SELECT corpus, part, key, class, score, x0, y0, x1, y1, area FROM boxes ORDER BY key, class"
    assert ask(catalog, query) == [
        ("photos", 0, "a", "cat", 1.0, 0.5, 0.5, 1.0, 1.0, 0.25),
        ("photos", 0, "a", "dog", 0.5, 0.0, 0.25, 0.5, 0.75, 0.25),
        ("photos", 1, "e", "dog", 0.5, 0.0, 0.25, 0.5, 0.75, 0.25),
    ]


def test_instances_have_their_run_lengths(catalog: Catalog, make) -> None:
    labels = make.labels_file(catalog.storage, "instances", ["a"], [0], [[{**DOG, **MASK}]])
    catalog.commit([*current(make), labels], run="r")
    assert ask(catalog, "SELECT class, rle_height, rle_width, rle_counts, area FROM instances") == [
        ("dog", 4, 4, [3, 2**32 - 1], 0.25)
    ]


def test_palettes_are_one_row_a_color(catalog: Catalog, make) -> None:
    labels = make.labels_file(catalog.storage, "palette", list("ab"), [0, 1], [[RED, BLUE], None])
    catalog.commit([*current(make), labels], run="r")
    assert ask(catalog, "SELECT key, k, rank, r, g, b, share FROM palettes ORDER BY rank") == [
        ("a", 2, 0, 255, 0, 0, 0.75),
        ("a", 2, 1, 0, 0, 255, 0.25),
    ]


def test_metadata_is_one_row_a_sample(catalog: Catalog, make) -> None:
    labels = make.labels_file(catalog.storage, "metadata", list("ab"), [2, 0], [None, FACTS])
    catalog.commit([*current(make), labels], run="r")
    assert catalog.sql("SELECT * FROM metadata").to_pylist() == [{"corpus": "photos", "part": 0, "key": "b", **FACTS}]


def test_captions_are_text(catalog: Catalog, make) -> None:
    labels = make.labels_file(catalog.storage, "caption", list("abc"), [0, 1, 0], ["a dog", None, ""])
    catalog.commit([*current(make), labels], run="r")
    assert ask(catalog, "SELECT corpus, part, key, caption FROM captions ORDER BY key") == [
        ("photos", 0, "a", "a dog"),
        ("photos", 0, "c", ""),
    ]


def test_persons_have_their_pose(catalog: Catalog, make) -> None:
    labels = make.labels_file(catalog.storage, "poses", list("ab"), [0, 0], [[{**DOG, "class": "person", **POSE}], []])
    catalog.commit([*current(make), labels], run="r")
    query = "SELECT key, class, score, x1, area, camera, len(body_pose), body_pose[1], betas[10] FROM persons"
    ((*known, camera, joints, first, last),) = ask(catalog, query)
    assert known == ["a", "person", 0.5, 0.5, 0.25]
    assert camera == pytest.approx([0.9, 0.0, 0.1])
    assert (joints, first, last) == (207, 0.5, 0.0)


@pytest.mark.parametrize("name", VECTORS)
def test_embeddings_are_arrays_that_sql_compares(catalog: Catalog, make, name: str) -> None:
    crop_0 = [vector(name, 1, 0), vector(name, 0, 3), None]
    crop_1 = [vector(name, 1, 1), None, vector(name, 0, -1)]
    catalog.commit(
        [
            *current(make),
            make.labels_file(catalog.storage, name, list("abc"), [0, 0, 1], crop_0, crop=0),
            make.labels_file(catalog.storage, name, list("abc"), [0, 2, 0], crop_1, crop=1),
        ],
        run="r",
    )
    near = (
        f"SELECT b.key, b.crop, round(array_cosine_similarity(a.embedding, b.embedding)::DOUBLE, 3) FROM {name} a, {name} b "
        "WHERE a.key = 'a' AND a.crop = 0 ORDER BY array_distance(a.embedding, b.embedding) LIMIT 3"
    )
    assert ask(catalog, near) == [("a", 0, 1.0), ("a", 1, 0.707), ("c", 1, 0.0)]
    given = f"SELECT key, crop FROM {name} ORDER BY array_distance(embedding, ?::FLOAT[{VECTORS[name]}]), key LIMIT 2"
    found = catalog.sql(given, [vector(name, 0, 2).tolist()]).to_pylist()
    assert found == [{"key": "b", "crop": 0}, {"key": "a", "crop": 1}]
    assert catalog.sql(f"DESCRIBE {name}").column(1).to_pylist()[-1] == f"FLOAT[{VECTORS[name]}]"


def test_modalities_of_ones_own_have_views_too(catalog: Catalog, make, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "label_grain": "sample",
        "token_grain": "sample",
        "crop_rule": "whole",
        "labeler": "files",
        "tokenizer": "",
    }
    own = [
        Modality(name="gaze_2", kind="vector", axes="c", channels=2, dtype="float32", **facts),  # type: ignore[arg-type]
        Modality(name="weather", kind="structured", fields={"sky": "string"}, **facts),  # type: ignore[arg-type]
        Modality(name="haiku", kind="text", **facts),  # type: ignore[arg-type]
        Modality(name="select", kind="text", **facts),  # type: ignore[arg-type]
        Modality(name="parts", kind="text", **facts),  # type: ignore[arg-type]
    ]
    values: list[Any] = [np.array([0, 0.5], np.float32), {"sky": "blue"}, "old pond", "x", "y"]
    for modality, value in zip(own, values, strict=True):
        monkeypatch.setitem(MODALITIES, modality.name, modality)
        labels = make.labels_file(catalog.storage, modality.name, list("ab"), [1, 0], [None, value])
        monkeypatch.delitem(MODALITIES, modality.name)
        catalog.commit([make.current(modality=modality.name), labels], run="r")
    row = {"corpus": "photos", "part": 0, "key": "b"}
    assert catalog.sql("SELECT * FROM gaze_2").to_pylist() == [{**row, "crop": None, "embedding": [0, 0.5]}]
    assert catalog.sql("SELECT * FROM weather").to_pylist() == [{**row, "sky": "blue"}]
    assert catalog.sql("SELECT * FROM haiku").to_pylist() == [{**row, "haiku": "old pond"}]
    assert ask(catalog, 'SELECT "select" FROM "select"') == [("x",)]
    assert ask(catalog, "SELECT * FROM parts") == []


def test_only_current_label_shards_count(catalog: Catalog, make) -> None:
    storage = catalog.storage
    first = make.labels_file(storage, "caption", ["a"], [0], ["first"])
    retried = make.labels_file(storage, "caption", ["a"], [0], ["retried"])
    better = make.labels_file(storage, "caption", ["a"], [0], ["better"], fingerprint=make.recipe_2)
    tokens = make.shard(form="token")
    catalog.commit([make.current(), make.current(form="token"), first, better, tokens], run="r")
    assert ask(catalog, "SELECT caption FROM captions") == [("first",)]
    catalog.commit([retried], run="r")
    assert ask(catalog, "SELECT caption FROM captions") == [("retried",)]
    catalog.commit([make.current(fingerprint=make.recipe_2)], run="r")
    assert ask(catalog, "SELECT caption FROM captions") == [("better",)]


def test_what_another_process_commits_is_seen_after_a_refresh(catalog: Catalog, make) -> None:
    assert ask(catalog, "SELECT caption FROM captions") == []
    with Catalog(catalog.storage) as other:
        labels = make.labels_file(catalog.storage, "caption", ["a"], [0], ["a dog"])
        other.commit([make.current(), labels], run="r")
    assert ask(catalog, "SELECT caption FROM captions") == []
    catalog.refresh()
    assert ask(catalog, "SELECT caption FROM captions") == [("a dog",)]


def test_failures_are_those_of_current_shards(catalog: Catalog, make) -> None:
    def failed(recipe: str, message: str) -> Any:
        record = {"corpus": "photos", "part": 0, "row": 1, "key": "b", "modality": "caption", "form": "label"}
        record |= {"crop": None, "stage": "label", "class": "LabelError", "message": message}
        path = paths.failed(make.shard(fingerprint=recipe, sha256=sha256_hex(message.encode())).path)
        assert catalog.storage.put(path, shards.write_failures([record]))
        return make.shard(ok=3, failed=1, failed_path=path, failed_sha256="05" * 32, fingerprint=recipe)

    catalog.commit([make.current(), failed(make.recipe_1, "old"), failed(make.recipe_2, "other")], run="r")
    assert ask(catalog, "SELECT * FROM failures") == [
        ("photos", 0, 1, "b", "caption", "label", None, "label", "LabelError", "old")
    ]
    catalog.commit([failed(make.recipe_1, "new")], run="r")
    assert ask(catalog, "SELECT message FROM failures") == [("new",)]
    catalog.commit([make.shard()], run="r")
    assert ask(catalog, "SELECT * FROM failures") == []


# -- columns ----------------------------------------------------------------------------------------------------------


def test_empty_views_have_the_columns_and_types_of_full_ones(catalog: Catalog, make) -> None:
    empty = {name: catalog.sql(f"DESCRIBE {name}").select([0, 1]).to_pylist() for name in CONTENT_VIEWS}
    storage = catalog.storage
    failed_path = paths.failed(make.shard(modality="rgb", crop=0).path)
    storage.put(failed_path, shards.write_failures([]))
    catalog.commit(
        [
            *current(make),
            make.current(modality="rgb", crops=1),
            make.samples_file(storage, "photos", 0, {}, ["a"]),
            make.labels_file(storage, "boxes", ["a"], [0], [[DOG]]),
            make.labels_file(storage, "instances", ["a"], [0], [[{**DOG, **MASK}]]),
            make.labels_file(storage, "palette", ["a"], [0], [[RED]]),
            make.labels_file(storage, "metadata", ["a"], [0], [FACTS]),
            make.labels_file(storage, "caption", ["a"], [0], ["a dog"]),
            make.labels_file(storage, "poses", ["a"], [0], [[{**DOG, **POSE}]]),
            *(make.labels_file(storage, name, ["a"], [0], [vector(name)], crop=0) for name in VECTORS),
            make.shard(modality="rgb", crop=0, format="tar", failed_path=failed_path, failed_sha256="05" * 32),
        ],
        run="r",
    )
    full = {name: catalog.sql(f"DESCRIBE {name}").select([0, 1]).to_pylist() for name in CONTENT_VIEWS}
    assert full == empty


# -- samples ----------------------------------------------------------------------------------------------------------


def test_samples_of_corpora_with_different_columns(catalog: Catalog, make) -> None:
    storage = catalog.storage
    catalog.commit(
        [
            make.corpus("photos"),
            make.corpus("texts"),
            make.samples_file(storage, "photos", 0, {"caption": pa.array(["a dog", None])}, ["a", "b"]),
            make.samples_file(storage, "photos", 1, {"year": pa.array([1999])}, ["c"]),
            make.samples_file(storage, "texts", 0, {"author": pa.array(["Ada"])}, ["a"]),
        ],
        run="r",
    )
    query = "SELECT corpus, part, row, key, source, size_bytes, caption, year, author FROM samples ORDER BY ALL"
    assert ask(catalog, query) == [
        ("photos", 0, 0, "a", "a.jpg", 100, "a dog", None, None),
        ("photos", 0, 1, "b", "b.jpg", 101, None, None, None),
        ("photos", 1, 0, "c", "c.jpg", 100, None, 1999, None),
        ("texts", 0, 0, "a", "a.jpg", 100, None, None, "Ada"),
    ]
    digest = catalog.sql("SELECT sha256 FROM samples WHERE key = ? LIMIT 1", ["c"]).to_pylist()[0]["sha256"]
    assert digest == sha256_hex(b"c")


TYPED = {
    "int": (pa.array([7]), "7"),
    "float": (pa.array([1.5]), "1.5"),
    "bool": (pa.array([True]), "true"),
    "text": (pa.array(["seven"]), "seven"),
    "list": (pa.array([[1, 2]]), "[1, 2]"),
    "record": (pa.array([{"q": 1}]), "{'q': 1}"),
    "time": (pa.array([0], pa.timestamp("us")), "1970-01-01 00:00:00"),
}


def test_a_column_that_corpora_type_differently_is_text(catalog: Catalog, make) -> None:
    storage = catalog.storage
    for number, (name, (values, _)) in enumerate(TYPED.items()):
        columns = {"mixed": values, f"own_{name}": values, 'the "same" one': pa.array([number])}
        catalog.commit([make.corpus(name), make.samples_file(storage, name, 0, columns, ["k"])], run="r")
    found = catalog.sql('SELECT corpus, mixed, own_list, "the ""same"" one" AS same FROM samples').to_pylist()
    assert {row["corpus"]: row["mixed"] for row in found} == {name: text for name, (_, text) in TYPED.items()}
    assert [row["own_list"] for row in found if row["own_list"]] == [[1, 2]]
    assert sorted(row["same"] for row in found) == list(range(len(TYPED)))


@pytest.mark.parametrize(
    ("first", "second"), [("int", "int"), ("float", "int"), ("time", "int"), ("bool", "list"), ("text", "record")]
)
def test_two_corpora_with_one_column_of_any_two_types(catalog: Catalog, make, first: str, second: str) -> None:
    storage = catalog.storage
    for corpus, kind in (("one", first), ("two", second)):
        part = make.samples_file(storage, corpus, 0, {"Mixed" if corpus == "one" else "mixed": TYPED[kind][0]}, ["k"])
        catalog.commit([make.corpus(corpus), part], run="r")
    found = catalog.sql("SELECT mixed FROM samples ORDER BY corpus").column(0)
    if first == second:
        assert found.to_pylist() == TYPED[first][0].to_pylist() * 2
    elif {first, second} == {"int", "float"}:
        assert found.to_pylist() == [TYPED[first][0][0].as_py(), TYPED[second][0][0].as_py()]
    else:
        assert found.to_pylist() == [TYPED[first][1], TYPED[second][1]]


@example(name="À")
@example(name="Caption")
@example(name='a "quoted" name')
@given(name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_source_column_of_any_name(name: str, make) -> None:
    storage = open_storage(f"memory://{secrets.token_hex(8)}")
    log.create_workspace(storage)
    assume(name.lower() not in shards.SAMPLE_COLUMNS)
    with Catalog(storage) as catalog:
        for corpus, values in (("one", pa.array([1])), ("two", pa.array(["x"]))):
            part = make.samples_file(storage, corpus, 0, {name: values}, ["k"])
            catalog.commit([make.corpus(corpus), part], run="r")
        table = catalog.sql("SELECT * FROM samples ORDER BY corpus")
    assert table.column_names == [*shards.SAMPLE_COLUMNS, name]
    assert table.column(name).to_pylist() == ["1", "x"]


# -- where the files are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_content_on_an_object_store(store: str, make, request: pytest.FixtureRequest) -> None:
    place = secrets.token_hex(8)
    uri = f"memory://{place}/work" if store == "memory" else f"{request.getfixturevalue('s3_bucket')}/{place}"
    storage = open_storage(uri)
    log.create_workspace(storage)
    with Catalog(storage) as catalog:
        catalog.commit(
            [
                make.corpus(),
                *current(make),
                make.samples_file(storage, "photos", 0, {"caption": pa.array(["x"])}, ["a"]),
                make.labels_file(storage, "boxes", ["a"], [0], [[DOG]]),
            ],
            run="r",
        )
        query = "SELECT s.source, b.class FROM boxes b JOIN samples s USING (corpus, key)"
        assert ask(catalog, query) == [("a.jpg", "dog")]
        # Again over new files: the store is made known to DuckDB once.
        catalog.commit([make.labels_file(storage, "boxes", ["b"], [0], [[CAT]], part=1)], run="r")
        assert ask(catalog, "SELECT key, class FROM boxes ORDER BY key") == [("a", "dog"), ("b", "cat")]
    with Catalog.open(uri) as catalog:
        assert catalog.version == 2
        assert ask(catalog, query) == [("a.jpg", "dog")]


def test_a_workspace_in_a_folder_whose_name_is_a_pattern(tmp_path: Path, make) -> None:
    for name, text in (("work 1", "decoy"), ("work *", "star"), ("work [1]", "set"), ("work it's", "quote")):
        storage = open_storage(tmp_path / name)
        log.create_workspace(storage)
        with Catalog(storage) as catalog:
            labels = make.labels_file(storage, "caption", ["a"], [0], [text])
            samples = make.samples_file(storage, "photos", 0, {}, ["a"])
            catalog.commit([make.corpus(), make.current(), labels, samples], run="r")
            assert ask(catalog, "SELECT caption, source FROM captions JOIN samples USING (key)") == [(text, "a.jpg")]


def test_files_are_only_looked_at_where_a_view_needs_them(catalog: Catalog, make) -> None:
    catalog.commit([make.corpus(), make.part(), make.current(), make.shard()], run="r")
    assert ask(catalog, "SELECT samples FROM corpora") == [(4,)]
    assert ask(catalog, "SELECT 'captions' AS captions, count(*) FROM shards") == [("captions", 1)]
    with pytest.raises(QueryError, match="part-0000000-01010101"):
        catalog.sql("SELECT * FROM samples")
    assert ask(catalog, "SELECT samples FROM corpora") == [(4,)]
