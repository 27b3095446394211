"""What was, what changed, what is out of date, where a shard comes from: the workspace at every version of a long story."""

import datetime
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from manifests.catalog import content
from manifests.catalog.catalog import Catalog
from manifests.formats import shards
from manifests.log import actions
from manifests.log import entries as log
from manifests.recipe import Recipe, sha256_hex
from manifests.snapshots import snapshot
from manifests.store import paths
from manifests.store.storage import Storage, open_storage

Rows = list[dict[str, Any]]
SOURCES = {"columns": "source"}
DIGEST = "d1" * 32
REFITTED = "d2" * 32
RGB = "e3" * 32


def tokenizer(digest: str, name: str = "text") -> actions.TokenizerAdded:
    return actions.TokenizerAdded(
        name=name,
        digest=digest,
        path=paths.tokenizer(name, digest),
        family={"rgb": "grid"}.get(name, name),
        family_version=1,
        vocabulary=300,
        options={},
        rows=8,
        metrics={"bytes_a_token": 3.5},
    )


class Story:
    """A workspace that is written commit by commit, and the recipes that it goes through.

    Two parts of photographs; captions labeled, labeled by a newer version, by the first again; boxes with an area; tokens of
    captions by two fits of a tokenizer; a failed row that is done again; crops raised; a snapshot, and a run that trains on it;
    a recipe retired; a row forgotten.
    """

    label = Recipe(
        modality="caption", form="label", producer="caption", version=1, parameters={"column": "text"}, inputs=SOURCES
    )
    label_2 = Recipe(
        modality="caption", form="label", producer="caption", version=2, parameters={"column": "text"}, inputs=SOURCES
    )
    boxes = Recipe(modality="boxes", form="label", producer="segments", version=1, inputs={"image": "decoder-1"})

    def __init__(self, storage: Storage, make: Any) -> None:
        self.storage = storage
        self.make = make
        self.keys = [[f"k{part}{row}" for row in range(3)] for part in range(2)]
        log.create_workspace(storage)

    @staticmethod
    def token(label: Recipe, digest: str = DIGEST) -> Recipe:
        return Recipe(
            modality="caption",
            form="token",
            producer="text",
            version=1,
            weights=digest,
            parameters={"tokenizer": "text"},
            inputs={"caption": label.fingerprint},
        )

    @staticmethod
    def rgb(scale: float = 0.5) -> Recipe:
        crop = {"seed": 0, "scale": [scale, 1.0]}
        return Recipe(
            modality="rgb",
            form="token",
            producer="grid",
            version=1,
            weights=RGB,
            parameters={"tokenizer": "rgb"},
            crop=crop,
        )

    def recipe(self, recipe: Recipe, crops: int | None = None) -> list[actions.Action]:
        """A recipe becomes the current one."""
        current = self.make.current(
            modality=recipe.modality, form=recipe.form, fingerprint=recipe.fingerprint, crops=crops
        )
        return [actions.RecipeAdded(fingerprint=recipe.fingerprint, document=recipe.document()), current]

    def captions(self, part: int, recipe: Recipe, failed: int | None = None) -> actions.ShardAdded:
        keys = self.keys[part]
        statuses = [int(row == failed) for row in range(3)]
        values = [None if status else f"{recipe.version} of {key}" for key, status in zip(keys, statuses, strict=True)]
        fields: dict[str, Any] = {}
        if failed is not None:
            records = [{"corpus": "photos", "part": part, "row": failed, "key": keys[failed], "modality": "caption"}]
            records[0] |= {"form": "label", "crop": None, "stage": "label", "class": "E", "message": "m"}
            data = shards.write_failures(records)
            shard = self.make.shard(part=part, fingerprint=recipe.fingerprint)
            fields = {"failed_path": paths.failed(shard.path), "failed_sha256": sha256_hex(data)}
            assert self.storage.put(fields["failed_path"], data)
        return self.make.labels_file(
            self.storage, "caption", keys, statuses, values, part=part, fingerprint=recipe.fingerprint, **fields
        )

    def tokens(self, part: int, recipe: Recipe, crop: int | None = None) -> actions.ShardAdded:
        keys = self.keys[part]
        data = shards.write_tokens(keys, [0] * 3, [[1, 2, part]] * 3, 300, {"of": recipe.fingerprint, "crop": crop})
        place = ("photos", recipe.modality, recipe.fingerprint, part, crop)
        path = paths.shard(*place, sha256_hex(data), is_tar=False)
        self.storage.put(path, data)
        return self.make.shard(
            part=part,
            modality=recipe.modality,
            form="token",
            fingerprint=recipe.fingerprint,
            crop=crop,
            path=path,
            sha256=sha256_hex(data),
            size_bytes=len(data),
            rows=3,
            ok=3,
            tokens=9,
            vocabulary=300,
            keys_sha256=shards.keys_digest(keys),
        )

    def samples(self, part: int, year: int = 1990) -> actions.PartAdded:
        years = pa.array([year + row for row in range(3)])
        return self.make.samples_file(self.storage, "photos", part, {"year": years}, self.keys[part])

    def commits(self, catalog: Catalog) -> Iterator[int]:
        """Commits chapter by chapter; the version of each."""

        def commit(*new: actions.Action) -> int:
            return catalog.commit(new, run="r1")

        make, token, refitted, rgb = self.make, self.token(self.label), self.token(self.label, REFITTED), self.rgb()
        yield commit(make.run_started(), make.corpus())
        yield commit(self.samples(0), self.samples(1))
        yield commit(*self.recipe(self.label), *self.recipe(self.boxes))
        yield commit(self.captions(0, self.label, failed=1))
        boxes = [
            [{"class": "dog", "score": 0.9, "x0": 0.1, "y0": 0.1, "x1": 0.1 + 0.3 * row, "y1": 0.6}] for row in range(3)
        ]
        yield commit(
            self.captions(1, self.label),
            make.labels_file(
                self.storage, "boxes", self.keys[0], [0] * 3, boxes, part=0, fingerprint=self.boxes.fingerprint
            ),
        )
        yield commit(self.captions(0, self.label))
        yield commit(*self.recipe(self.label_2))
        yield commit(self.captions(0, self.label_2))
        yield commit(*self.recipe(self.label))
        yield commit(tokenizer(DIGEST), *self.recipe(token), self.tokens(0, token), self.tokens(1, token))
        yield commit(tokenizer(RGB, "rgb"), *self.recipe(rgb, crops=1), self.tokens(0, rgb, 0), self.tokens(1, rgb, 0))
        yield commit(*self.recipe(rgb, crops=2))
        yield commit(self.tokens(0, rgb, 1))
        snapshot.make(catalog, "small", where="key <> 'k02'", modalities=["caption"], hold_out=0.5, run="r1")
        yield catalog.version
        yield commit(self.training("small", "t1"))
        yield commit(actions.RunEnded(run="t1", time="2026-11-23T11:00:00.000000Z", status="done", counts={"steps": 3}))
        retired = actions.ShardsRetired(
            corpus="photos", modality="caption", form="label", fingerprint=self.label_2.fingerprint, reason="superseded"
        )
        yield commit(retired)
        yield commit(tokenizer(REFITTED), *self.recipe(refitted), self.tokens(0, refitted))
        changed = {"corpus": "photos", "path": paths.changes("photos", "aa" * 32), "vanished": 1, "changed": 2}
        yield commit(actions.SourcesChanged(**changed), actions.RunEnded(run="r1", time=log.now(), status="done"))
        forgotten = actions.Forgotten(
            corpus="photos",
            part=1,
            rows=[2],
            keys=["k12"],
            sources_sha256=["ab" * 32],
            files=[paths.samples("photos", 1, "aa" * 32)],
        )
        yield commit(forgotten, self.samples(1, year=2000), self.tokens(1, refitted))
        yield commit(make.corpus(source="elsewhere"))

    def training(self, name: str, run: str, corpora: list[str] | None = None) -> actions.RunStarted:
        """A run trains on a snapshot, as `modmill train` records it."""
        found = snapshot.read(self.storage, name)
        uri = f"/where/it/was#{name}"
        config = {
            "mixture": [{"snapshot": uri, "corpora": corpora}],
            "snapshots": [{"uri": uri, "sha256": found.sha256}],
        }
        return self.make.run_started(run, kind="train", time="2026-11-23T10:30:00.000000Z", config=config)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, make) -> tuple[Story, dict[int, dict[str, Rows]]]:
    """The whole story, and what every view and `modmill status` answered at each version."""
    folder = tmp_path_factory.mktemp("story")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODMILL_CACHE", str(folder / "cache"))
        story = Story(open_storage(folder / "work"), make)
        with Catalog(story.storage) as catalog:
            answered = {version: everything(catalog) for version in story.commits(catalog)}
    return story, answered


@pytest.fixture
def story(told: tuple[Story, Any], tmp_path: Path, make) -> Story:
    """A copy of the workspace of the whole story."""
    shutil.copytree(told[0].storage.root, tmp_path / "story")
    found = Story.__new__(Story)
    found.__dict__ = {**told[0].__dict__, "storage": open_storage(tmp_path / "story")}
    return found


def views(catalog: Catalog) -> list[str]:
    made = catalog.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal AND schema_name = 'main'")
    return sorted({*made["view_name"].to_pylist(), *content.CONTENT_VIEWS})


def everything(catalog: Catalog) -> dict[str, Rows]:
    """All rows of all views, and what `modmill status` shows."""
    found = {view: sorted(catalog.sql(f"FROM {view}").to_pylist(), key=repr) for view in views(catalog)}
    return {**found, "the status": catalog.status().to_pylist()}


def rows(catalog: Catalog, query: str, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[column] for column in columns or row) for row in catalog.sql(query).to_pylist()]


# -- time travel ------------------------------------------------------------------------------------------------------


def test_every_version_answers_as_it_did(told: tuple[Story, dict[int, dict[str, Rows]]], story: Story) -> None:
    """In an index that was made of the whole log, since the cache of a test is its own."""
    for version, answered in told[1].items():
        with Catalog(story.storage, as_of=version) as then:
            assert everything(then) == answered, version


def test_from_a_checkpoint_too(told: tuple[Story, dict[int, dict[str, Rows]]], story: Story, cache: Path) -> None:
    with Catalog(story.storage) as newest:
        newest._index.write_checkpoint()
    shutil.rmtree(cache)
    for version in sorted(told[1])[2::4]:
        with Catalog(story.storage, as_of=version) as then:
            assert everything(then) == told[1][version], version


def test_a_time_is_the_version_that_was_the_newest_then(told: tuple[Story, Any], story: Story) -> None:
    with Catalog(story.storage) as newest:
        times = dict(rows(newest, "SELECT version, time FROM timeline"))
    for version in (2, 9, max(times) - 1):
        time = times[version]
        there = time.replace(tzinfo=datetime.UTC).astimezone(datetime.timezone(datetime.timedelta(hours=-7)))
        between = time + (times[version + 1] - time) / 2
        for moment in (time, there, between):
            with Catalog(story.storage, as_of=moment.isoformat()) as then:
                assert then.sql("FROM timeline").to_pylist()[-1]["version"] == version
                assert then.status().to_pylist() == told[1][version]["the status"]
        with Catalog(story.storage, as_of=(time - datetime.timedelta(microseconds=1)).isoformat()) as then:
            assert then.sql("FROM timeline").num_rows == version - 1


# -- what changed -----------------------------------------------------------------------------------------------------

CHANGES = "SELECT change, kind, part, modality, form, was, now FROM diff({}, {})"


def test_diff_tells_what_came_what_went_and_what_took_the_place_of_another(story: Story) -> None:
    with Catalog(story.storage) as catalog:
        retry = rows(catalog, CHANGES.format(5, 6))
        assert [row[:5] for row in retry] == [("replaced", "shard", 0, "caption", "label")]
        assert retry[0][5] != retry[0][6]
        assert rows(catalog, CHANGES.format(6, 5)) == [(*retry[0][:5], retry[0][6], retry[0][5])]

        recipes = story.label.fingerprint[:12], story.label_2.fingerprint[:12]
        assert rows(catalog, CHANGES.format(6, 7)) == [
            ("replaced", "current", None, "caption", "label", *recipes),
            ("added", "recipe", None, "caption", "label", None, "caption 2"),
        ]
        # To the second recipe and back: only its shard stayed.
        assert [row[:5] for row in rows(catalog, CHANGES.format(6, 9))] == [
            ("added", "recipe", None, "caption", "label"),
            ("added", "shard", 0, "caption", "label"),
        ]
        rgb = story.rgb().fingerprint[:12]
        assert rows(catalog, CHANGES.format(11, 12)) == [
            ("replaced", "current", None, "rgb", "token", f"{rgb} x 1", f"{rgb} x 2")
        ]
        assert rows(catalog, "SELECT change, kind, name FROM diff(13, 14)") == [("added", "snapshot", "small")]
        assert rows(catalog, "SELECT change, kind, part, modality FROM diff(16, 17)") == [
            ("retired", "shard", 0, "caption")
        ]
        assert rows(catalog, "SELECT change, kind, name FROM diff(17, 18) WHERE kind = 'tokenizer'") == [
            ("replaced", "tokenizer", "text")
        ]
        assert [row[:3] for row in rows(catalog, CHANGES.format(19, 20))] == [
            ("replaced", "part", 1),
            ("added", "shard", 1),
        ]
        assert rows(catalog, CHANGES.format(20, 21)) == [
            ("replaced", "corpus", None, None, None, "photos", "elsewhere")
        ]


def test_diff_from_nothing_is_what_is_there_and_to_itself_nothing(story: Story) -> None:
    with Catalog(story.storage) as catalog:
        added = rows(catalog, f"SELECT change, now FROM diff(0, {catalog.version}) WHERE kind = 'shard' ORDER BY now")
        assert added == [("added", path) for (path,) in rows(catalog, "SELECT path FROM shards ORDER BY path")]
        for version in range(catalog.version + 1):
            assert rows(catalog, f"FROM diff({version}, {version})") == []
        # What is later than the version looked at is not told.
        everything_then = rows(catalog, "FROM diff(0, 6)")
    with Catalog(story.storage, as_of=6) as then:
        assert rows(then, "FROM diff(0, 20)") == everything_then


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_moments_are_versions_wherever_one_is(story: Story, zone: str) -> None:
    with Catalog(story.storage) as catalog:
        catalog._index.connection.execute(f"SET TimeZone = '{zone}'")
        times = dict(rows(catalog, "SELECT version, time FROM timeline"))
        assert rows(catalog, f"SELECT version_at(TIMESTAMP '{times[7]}')") == [(7,)]
        assert rows(catalog, f"SELECT version_at(TIMESTAMPTZ '{times[7]}+00')") == [(7,)]
        assert rows(catalog, "SELECT version_at(now()), version_at(now() - INTERVAL 1 DAY)") == [(max(times), 0)]
        since_yesterday = "SELECT count(*) AS n FROM diff(version_at(now() - INTERVAL 1 DAY), version_at(now()))"
        assert rows(catalog, since_yesterday) == rows(catalog, f"SELECT count(*) AS n FROM diff(0, {max(times)})")
        assert rows(catalog, "SELECT version_at(DATE '2020-01-01')") == [(0,)]


# -- what is out of date, and why -------------------------------------------------------------------------------------

WHY = "SELECT part, modality, form, recipe, current_recipe, cause, was, now FROM stale WHERE modality = '{}'"


def test_a_shard_is_stale_until_the_current_recipe_made_its_part(told: tuple[Story, Any]) -> None:
    story, answered = told
    old, new = story.label.fingerprint[:12], story.label_2.fingerprint[:12]
    of_part = {"corpus": "photos", "modality": "caption", "form": "label", "shards": 1, "cause": "version"}
    to_do = {**of_part, "recipe": old, "current_recipe": new, "was": "1", "now": "2"}
    assert answered[6]["stale"] == []
    assert answered[7]["stale"] == [{**to_do, "part": 0}, {**to_do, "part": 1}]
    assert answered[8]["stale"] == [{**to_do, "part": 1}]
    assert answered[9]["stale"] == []
    weights = [(row["part"], row["form"], row["cause"], row["was"], row["now"]) for row in answered[18]["stale"]]
    assert weights == [(1, "token", "weights", DIGEST, REFITTED)]


def test_the_cause_is_followed_through_the_inputs(story: Story) -> None:
    """Metadata of a caption of a newer version, with another parameter and another crop rule of its own."""

    def metadata(label: Recipe, **fields: Any) -> Recipe:
        inputs = {"caption": label.fingerprint, "image": "decoder-1"}
        return Recipe(modality="metadata", form="label", producer="metadata", version=1, inputs=inputs, **fields)

    def token(label: Recipe) -> Recipe:
        inputs = {"metadata": label.fingerprint}
        return Recipe(modality="metadata", form="token", producer="text", version=1, weights=DIGEST, inputs=inputs)

    labels = metadata(story.label, parameters={"longest": 512}), metadata(story.label_2, parameters={"longest": 256})
    old, new = token(labels[0]), token(labels[1])
    with Catalog(story.storage) as catalog:
        for label in labels:
            catalog.commit(story.recipe(label), run="r2")
        catalog.commit([*story.recipe(old), story.tokens(0, old), *story.recipe(new)], run="r2")
        found = rows(catalog, WHY.format("metadata"))
        assert [row[:5] for row in found] == [(0, "metadata", "token", old.fingerprint[:12], new.fingerprint[:12])] * 2
        assert [row[5:] for row in found] == [
            ("inputs.metadata.inputs.caption.version", "1", "2"),
            ("inputs.metadata.parameters.longest", "512", "256"),
        ]
        # An input that is no recipe of the log is a cause itself.
        unknown = Recipe(
            modality="metadata", form="token", producer="text", version=1, weights=DIGEST, inputs={"metadata": "7"}
        )
        catalog.commit(story.recipe(unknown), run="r2")
        assert [row[5:] for row in rows(catalog, WHY.format("metadata"))] == [
            ("inputs.metadata", labels[0].fingerprint, "7")
        ]
        # Of another labeler the parameters say nothing.
        other = Recipe(modality="metadata", form="token", producer="other", version=4, weights=REFITTED)
        catalog.commit(story.recipe(other), run="r2")
        assert [row[5:] for row in rows(catalog, WHY.format("metadata"))] == [("producer", "text", "other")]


def test_a_crop_rule_is_a_cause_and_more_crops_are_none(story: Story) -> None:
    with Catalog(story.storage) as catalog:
        catalog.commit(story.recipe(story.rgb(), crops=4), run="r2")
        assert rows(catalog, WHY.format("rgb")) == []
        catalog.commit(story.recipe(story.rgb(0.25), crops=2), run="r2")
        found = rows(catalog, "SELECT part, shards, cause, was, now FROM stale WHERE modality = 'rgb'")
        assert found == [
            (0, 2, "crop.scale", "[0.5,1.0]", "[0.25,1.0]"),
            (1, 1, "crop.scale", "[0.5,1.0]", "[0.25,1.0]"),
        ]
        unknown = story.make.current(modality="rgb", form="token", fingerprint="f" * 64, crops=1)
        catalog.commit([unknown], run="r2")
        assert [row[5:] for row in rows(catalog, WHY.format("rgb"))] == [("producer", "grid", None)] * 2


# -- where a shard comes from, and who trained on it ------------------------------------------------------------------


def lineage(catalog: Catalog, path: str) -> Rows:
    return catalog.sql("FROM shard_lineage(?)", [path]).to_pylist()


def test_a_shards_lineage_runs_from_its_source_to_the_runs_that_trained_on_it(story: Story) -> None:
    token = story.token(story.label)
    find = "SELECT path FROM snapshot_shards WHERE snapshot = 'small' AND part = 0"
    with Catalog(story.storage) as catalog:
        (path,) = rows(catalog, find)[0]
        steps = lineage(catalog, path)
        assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
        assert [(step["kind"], step["name"], step["digest"]) for step in steps[1:4]] == [
            ("labeler", "caption", story.label.fingerprint),
            ("tokenizer", "text", token.fingerprint),
            ("shard", "photos part 0", rows(catalog, f"SELECT sha256 FROM shards WHERE path = '{path}'")[0][0]),
        ]
        assert (steps[0]["kind"], steps[0]["name"], steps[0]["path"]) == ("source", "photos", "elsewhere")
        assert steps[1]["parameters"] == '{"column":"text"}'
        assert (steps[2]["weights"], steps[2]["path"]) == (DIGEST, f"tokenizers/text-{DIGEST[:12]}")
        assert [(step["kind"], step["name"]) for step in steps[4:]] == [("snapshot", "small"), ("run", "t1")]
        assert [step["time"] for step in steps[:5]] == sorted(step["time"] for step in steps[:5])
        assert lineage(catalog, "data/none.parquet") == []
        rgb = rows(catalog, "SELECT path FROM shards WHERE modality = 'rgb' AND crop = 1")[0][0]
        assert [step["name"] for step in lineage(catalog, rgb)] == ["photos", "grid", "photos part 0 crop 1"]
    with Catalog(story.storage, as_of=13) as then:
        assert [step["kind"] for step in lineage(then, path)] == ["source", "labeler", "tokenizer", "shard"]


def test_a_sample_knows_the_runs_that_saw_it_also_when_it_is_forgotten(story: Story) -> None:
    with Catalog(story.storage) as catalog:
        held_out = {row["key"]: row["held_out"] for row in held_out_rows(catalog)}
        assert set(held_out) == {"k00", "k01", "k10", "k11", "k12"}
        assert set(held_out.values()) == {True, False}
        for key, is_held_out in held_out.items():
            assert rows(catalog, f"SELECT snapshot, held_out, run, status FROM sample_uses('photos', '{key}')") == [
                ("small", is_held_out, "t1", "done")
            ]
        assert rows(catalog, "FROM sample_uses('photos', 'k02')") == []
        assert rows(catalog, "FROM sample_uses('other', 'k00')") == []
        parts = rows(catalog, "SELECT part, rows, selected, held_out FROM snapshot_parts")
        assert [row[:3] for row in parts] == [(0, 3, 2), (1, 3, 3)]
        assert sum(row[3] for row in parts) == sum(held_out.values())


def held_out_rows(catalog: Catalog) -> Rows:
    return catalog.sql(
        "SELECT s.key, has_row(p.held_out_bits, s.row) AS held_out FROM samples s JOIN snapshot_parts p USING (corpus, part) "
        "WHERE has_row(p.selected_bits, s.row)"
    ).to_pylist()


def test_a_run_that_took_other_corpora_did_not_see_a_sample(story: Story) -> None:
    with Catalog(story.storage) as catalog:
        catalog.commit([story.training("small", "t2", corpora=["texts"])], run="t2")
        catalog.commit([story.training("small", "t3", corpora=["texts", "photos"])], run="t3")
        other = story.make.run_started(
            "t4", kind="train", config={"snapshots": [{"uri": "/a#small", "sha256": "0" * 64}]}
        )
        catalog.commit([other], run="t4")
        assert rows(catalog, "SELECT snapshot, run, kind, status, corpora FROM snapshot_uses ORDER BY run") == [
            ("small", "t1", "train", "done", None),
            ("small", "t2", "train", "running or killed", ["texts"]),
            ("small", "t3", "train", "running or killed", ["photos", "texts"]),
        ]
        assert rows(catalog, "SELECT run FROM sample_uses('photos', 'k00') ORDER BY run") == [("t1",), ("t3",)]


# -- snapshots side by side -------------------------------------------------------------------------------------------


def test_the_page_compares_snapshots_part_by_part(story: Story) -> None:
    page = (Path(__file__).parents[3] / "docs/manifest.md").read_text()
    query = page.partition("```sql\n")[2].partition("```")[0]
    with Catalog(story.storage) as catalog:
        snapshot.make(catalog, "a", where="key <> 'k00'", modalities=["rgb"], hold_out=0, run="r2")
        assert rows(catalog, query.replace("'b'", "'a'")) == []
        # New since the view was last asked.
        snapshot.make(catalog, "b", where="part = 1", modalities=["rgb"], hold_out=0, run="r2")
        found = {part: (was, now) for _, part, was, now in rows(catalog, query)}
        assert 1 not in found
        assert found[0][1] is None


def test_a_snapshot_whose_files_are_gone_is_passed_over(story: Story) -> None:
    shutil.rmtree(Path(story.storage.root) / "_meta/snapshots/small")
    with Catalog(story.storage) as catalog:
        assert rows(catalog, "FROM snapshot_shards") == []
        assert rows(catalog, "FROM snapshot_parts") == []
        assert rows(catalog, "SELECT snapshot, run FROM snapshot_uses") == [("small", "t1")]
        assert [step["kind"] for step in lineage(catalog, catalog.live_shards()[0].path)][:2] == ["source", "labeler"]
