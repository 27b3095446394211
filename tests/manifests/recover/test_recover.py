"""A log that was lost is rebuilt from the sidecars: nothing whole is lost, nothing wrong comes in."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from manifests.catalog.catalog import Catalog
from manifests.errors import WorkspaceError
from manifests.formats import shards, sidecars
from manifests.log import entries as log
from manifests.log.actions import CorpusAdded, Forgotten, PartAdded, RecipeAdded, ShardAdded, TokenizerAdded
from manifests.recipe import Recipe, canonical_json, sha256_hex
from manifests.recover import recover as recovery
from manifests.recover.recover import recover
from manifests.store import parquet, paths
from manifests.store.storage import Storage, open_storage

# What the recovery itself decides: the versions, times and runs of the old log are gone.
OWN = {"version", "run", "time"}
VIEWS = (
    "corpora",
    "parts",
    "samples",
    "shards",
    "recipes",
    "coverage",
    "failures",
    "captions",
    "palettes",
    "tokenizers",
)
VIEWS += ("lineage", "forgotten")


@pytest.fixture
def recipes() -> dict[str, Recipe]:
    return {
        name: Recipe(
            modality=name, form="label", producer=name, version=1, parameters={"x": 0.5}, inputs={"image": "1"}
        )
        for name in ("caption", "palette")
    }


@pytest.fixture
def full(workspace: Storage, make, recipes: dict[str, Recipe]) -> Storage:
    """Two parts of four samples with captions and palettes, each file with its sidecar, and a tokenizer."""
    with Catalog(workspace) as catalog:
        corpus = make.corpus(config={"kind": "image", "crops": 1})
        known = [RecipeAdded(fingerprint=recipe.fingerprint, document=recipe.document()) for recipe in recipes.values()]
        catalog.commit([corpus, *known], run="r")
        for number in range(2):
            keys = [f"k{number}{row}" for row in range(4)]
            part = make.samples_file(workspace, "photos", number, {"width": pa.array([1, 2, 3, 4])}, keys)
            part = dataclasses.replace(part, size_bytes=workspace.size(part.path))
            workspace.put(sidecars.path_of(part), sidecars.of_part(part, corpus))
            made = [part]
            for name, values in (("caption", [f"caption of {key}" for key in keys]), ("palette", [[]] * 4)):
                fingerprint = recipes[name].fingerprint
                shard = make.labels_file(workspace, name, keys, [0] * 4, values, part=number, fingerprint=fingerprint)
                workspace.put(sidecars.path_of(shard), sidecars.of_shard(shard, recipes[name].document()))
                made.append(shard)
            catalog.commit(made, run="r")
        currents = (make.current(modality=name, fingerprint=recipe.fingerprint) for name, recipe in recipes.items())
        catalog.commit([*currents, put_tokenizer(workspace)], run="r")
    return workspace


def put_tokenizer(storage: Storage, text: str = "{}", name: str = "rgb") -> TokenizerAdded:
    data = text.encode()
    digest = sha256_hex(canonical_json({"config.json": sha256_hex(data)}))
    path = paths.tokenizer(name, digest)
    storage.put(f"{path}/config.json", data)
    added = TokenizerAdded(
        name=name,
        digest=digest,
        path=path,
        family="grid",
        family_version=1,
        vocabulary=64,
        options={"steps": 5},
        rows=7,
        metrics={"psnr_db": 20.5},
    )
    storage.put(sidecars.path_of(added), sidecars.of_tokenizer(added))
    return added


def lose_log(storage: Storage) -> None:
    shutil.rmtree(storage.full(paths.LOG))


def asked(storage: Storage) -> dict[str, list[dict[str, Any]]]:
    with Catalog(storage) as catalog:
        rows = {view: catalog.sql(f"SELECT * FROM {view}").to_pylist() for view in VIEWS}
    return {
        view: sorted(({k: v for k, v in row.items() if k not in OWN} for row in found), key=repr)
        for view, found in rows.items()
    }


def shard_in(storage: Storage, pattern: str) -> Path:
    return sorted(Path(storage.root).glob(pattern))[0]


def test_everything_but_runs_comes_back(full: Storage) -> None:
    before = asked(full)
    lose_log(full)
    found = recover(full)
    assert asked(full) == before
    counts = (found.corpora, found.parts, found.recipes, found.shards, found.tokenizers, found.snapshots)
    assert counts == (1, 2, 2, 4, 1, 0)
    assert (found.left_out, found.notes) == ({}, [])
    with Catalog(full) as catalog:
        assert catalog.sql("SELECT kind, status FROM runs").to_pylist() == [{"kind": "recover", "status": "done"}]
        assert catalog.version == 1


def test_a_log_that_stands_is_not_touched(full: Storage) -> None:
    before = {path: path.read_bytes() for path in Path(full.root).rglob("*") if path.is_file()}
    with pytest.raises(WorkspaceError, match=r"has a log .*move the folder _meta/log"):
        recover(full)
    assert {path: path.read_bytes() for path in Path(full.root).rglob("*") if path.is_file()} == before


def test_an_empty_place_is_no_workspace_to_recover(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match="no folder data"):
        recover(open_storage(tmp_path / "nothing"))


def test_the_workspace_file_is_made_where_it_is_lost(full: Storage) -> None:
    before = asked(full)
    shutil.rmtree(full.full("_meta"))
    recover(full)
    assert asked(full) == before


def test_an_interrupted_recovery_goes_on(full: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after any entry, the same command does the rest, and nothing stands twice."""
    before = asked(full)
    monkeypatch.setattr(recovery, "_BATCH", 2)
    commit, after = Catalog.commit, 0
    for after in range(1, 20):
        lose_log(full)
        left = after

        def until_killed(catalog: Catalog, new: Any, *, run: str) -> int:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return commit(catalog, new, run=run)

        monkeypatch.setattr(Catalog, "commit", until_killed)
        try:
            recover(full)
            break
        except KeyboardInterrupt:
            monkeypatch.setattr(Catalog, "commit", commit)
        recover(full)
        assert asked(full) == before
        documents = [action for entry in log.entries(full) for action in entry.actions]
        named = [action["path"] for action in documents if "path" in action]
        assert len(named) == len(set(named))
        with pytest.raises(WorkspaceError, match="has a log"):
            recover(full)
    assert after > 5


def test_damaged_and_lonely_files_are_left_out(full: Storage) -> None:
    lose_log(full)
    cut = shard_in(full, "data/photos/caption/*/part-0000000-*.parquet")
    cut.write_bytes(cut.read_bytes()[:-1])
    flipped = shard_in(full, "data/photos/caption/*/part-0000001-*.parquet")
    data = bytearray(flipped.read_bytes())
    data[9] ^= 1
    flipped.write_bytes(data)
    gone = shard_in(full, "data/photos/palette/*/part-0000000-*.parquet")
    gone.unlink()
    lonely = shard_in(full, "data/photos/palette/*/part-0000001-*.parquet")
    lonely.with_suffix(".json").unlink()
    (cut.parent / "notes.txt").write_text("nobody's")
    (cut.parent / ".part-0000003-00000000.parquet.1-a.tmp").write_bytes(b"half")
    config = shard_in(full, "tokenizers/rgb-*/config.json")
    config.write_text("{} ")
    found = recover(full)
    assert (found.parts, found.shards, found.tokenizers) == (2, 0, 0)
    relative = {Path(path).name.partition(".")[0]: why.partition(";")[0] for path, why in found.left_out.items()}
    assert relative == {
        cut.stem: f"it has {cut.stat().st_size} bytes, its sidecar says {cut.stat().st_size + 1}",
        flipped.stem: relative[flipped.stem],
        gone.stem: "its sidecar stands, the file is gone",
        lonely.stem: "it has no sidecar",
        config.parent.name: "its files are not those that its name says: altered, or some are gone",
    }
    assert "altered or truncated" in relative[flipped.stem]


def test_a_sidecar_of_another_file_is_left_out(full: Storage) -> None:
    lose_log(full)
    one = shard_in(full, "data/photos/caption/*/part-0000000-*.json")
    other = shard_in(full, "data/photos/caption/*/part-0000001-*.json")
    other.write_bytes(one.read_bytes())
    one.write_bytes(one.read_bytes().replace(b'"x":0.5', b'"x":0.6'))
    found = recover(full)
    assert sorted(found.left_out.values()) == [
        "the recipe in its sidecar does not have its fingerprint",
        "the sidecar is of another file, or without a recipe",
    ]
    assert found.shards == 2


def test_of_two_shards_of_one_place_the_better_one_wins(full: Storage, make, recipes: dict[str, Recipe]) -> None:
    """A retry replaced a shard: the one with fewer failed rows is the later one, whatever the clocks say."""
    recipe = recipes["caption"]
    keys = [f"k0{row}" for row in range(4)]
    failed = make.labels_file(
        full, "caption", keys, [0, 1, 1, 0], ["a", None, None, "b"], fingerprint=recipe.fingerprint
    )
    records = [
        {
            "corpus": "photos",
            "part": 0,
            "row": row,
            "key": keys[row],
            "modality": "caption",
            "form": "label",
            "crop": None,
        }
        | {"stage": "label", "class": "LabelError", "message": "no"}
        for row in (1, 2)
    ]
    data = shards.write_failures(records)
    failed_path = failed.path.replace(".parquet", ".failed.parquet")
    full.put(failed_path, data)
    failed = dataclasses.replace(failed, failed_path=failed_path, failed_sha256=sha256_hex(data))
    full.put(sidecars.path_of(failed), sidecars.of_shard(failed, recipe.document()))
    before = asked(full)
    lose_log(full)
    recover(full)
    assert asked(full) == before
    # And where the better one is damaged, the other is what is left.
    lose_log(full)
    folder = Path(full.full(failed.path)).parent
    (better,) = set(folder.glob("part-0000000-????????.parquet")) - {Path(full.full(failed.path))}
    better.write_bytes(b"x" * better.stat().st_size)
    found = recover(full)
    assert found.shards == 4
    with Catalog(full) as catalog:
        paths = [shard.path for shard in catalog.live_shards() if shard.modality == "caption" and shard.part == 0]
        assert paths == [failed.path]
        assert catalog.sql("SELECT count(*) AS n FROM failures").to_pylist() == [{"n": 2}]


def test_two_recipes_of_a_modality_are_left_open(full: Storage, make) -> None:
    newer = Recipe(modality="caption", form="label", producer="caption", version=2)
    keys = [f"k0{row}" for row in range(4)]
    shard = make.labels_file(full, "caption", keys, [0] * 4, list("abcd"), fingerprint=newer.fingerprint)
    full.put(sidecars.path_of(shard), sidecars.of_shard(shard, newer.document()))
    lose_log(full)
    found = recover(full)
    assert found.notes == [
        "photos: caption has 2 recipes of labels, ambiguous: run your pipeline file, it says which is current"
    ]
    with Catalog(full) as catalog:
        assert [row["modality"] for row in catalog.coverage()] == ["palette"]
        assert len(catalog.live_shards()) == 5


def test_a_workspace_without_sidecars_of_samples(full: Storage) -> None:
    """As they were made before samples and tokenizers had sidecars."""
    before = asked(full)
    lose_log(full)
    for path in (*Path(full.root).glob("data/photos/_samples/*.json"), *Path(full.root).glob("tokenizers/*.json")):
        path.unlink()
    found = recover(full)
    assert (found.corpora, found.parts, found.shards) == (0, 2, 4)
    assert found.notes == [
        "photos: no sidecar tells its configuration; `modmill run FILE` with its pipeline file records it"
    ]
    # No tokens tell what its vocabulary is.
    assert list(found.left_out.values()) == [
        "it has no sidecar and made no tokens that are here: nothing tells its vocabulary"
    ]
    after = asked(full)
    assert after["corpora"] == after["tokenizers"] == []
    assert after["samples"] == before["samples"]
    assert after["captions"] == before["captions"]


def test_what_was_forgotten_stays_forgotten(full: Storage, make, recipes: dict[str, Recipe]) -> None:
    """Of a part before and after a forget the later one comes back, with its tombstone; earlier shards do not."""
    with Catalog(full) as catalog:
        part = catalog.parts("photos")[0]
        corpus = CorpusAdded(**{**vars(make.corpus()), "config": {"kind": "image", "crops": 1}})
        rows = parquet.read(full.read(part.path)).to_pylist()
        known = rows[1]["sha256"].hex()
        rows[1] |= {"source": None, "size_bytes": None, "sha256": None, "width": None}
        data = shards.write_samples(rows, pa.schema([("width", pa.int64())]))
        path = paths.samples("photos", 0, sha256_hex(data))
        new = dataclasses.replace(part, path=path, sha256=sha256_hex(data), size_bytes=len(data))
        gone = Forgotten(corpus="photos", part=0, rows=[1], keys=["k01"], sources_sha256=[known], files=[part.path])
        full.put(path, data)
        full.put(sidecars.path_of(new), sidecars.of_part(new, corpus, [gone]))
        keys, recipe = [f"k0{row}" for row in range(4)], recipes["caption"]
        shard = make.labels_file(
            full, "caption", keys, [0, 4, 0, 0], ["a", None, "c", "d"], fingerprint=recipe.fingerprint
        )
        shard = dataclasses.replace(shard, forgotten=1)
        full.put(sidecars.path_of(shard), sidecars.of_shard(shard, recipe.document()))
        palette = next(s for s in catalog.live_shards() if s.modality == "palette" and s.part == 0)
        catalog.commit([new, shard, gone], run="forget")
    before = asked(full)
    lose_log(full)
    found = recover(full)
    # The forget was cut short: the palette of that part has the row still, and is not taken.
    assert "it holds rows that were forgotten since" in found.left_out[sidecars.path_of(palette)]
    after = asked(full)
    assert after["forgotten"] == before["forgotten"]
    assert after["samples"] == before["samples"]
    assert after["captions"] == before["captions"]
    # Without that sidecar the row is known still, its bytes no more.
    lose_log(full)
    full.remove(sidecars.path_of(new))
    full.remove(part.path)
    recover(full)
    (row,) = asked(full)["forgotten"]
    assert (row["key"], row["sha256"]) == ("k01", sha256_hex(b""))


def test_a_part_that_is_gone_is_told(full: Storage) -> None:
    lose_log(full)
    shard_in(full, "data/photos/_samples/part-0000000-*.parquet").unlink()
    found = recover(full)
    assert (found.parts, found.shards) == (1, 2)
    assert found.notes[0].startswith("photos: part 0 is missing (1 in all): restore its samples file")


def test_the_newest_tokenizer_of_a_name_is_in_use(full: Storage) -> None:
    newer = put_tokenizer(full, '{"newer": 1}')
    lose_log(full)
    configs = sorted(Path(full.root).glob("tokenizers/*/config.json"), key=lambda path: "newer" in path.read_text())
    for number, path in enumerate(configs):
        os.utime(path, (1_000_000 + number, 1_000_000 + number))
    found = recover(full)
    with Catalog(full) as catalog:
        assert [tokenizer.path for tokenizer in catalog.tokenizers()] == [newer.path]
    assert found.notes == [f"tokenizer rgb: 2 were found; the newest by the store's clock, {newer.path}, is in use"]


def test_an_object_store(s3_bucket: str, full: Storage) -> None:
    target = open_storage(f"{s3_bucket}/recovered")
    before = asked(full)
    for file in full.walk(""):
        if not file.path.startswith("_meta/log"):
            target.put(file.path, full.read(file.path))
    found = recover(target)
    assert (found.parts, found.shards, found.left_out) == (2, 4, {})
    assert asked(target) == before


def test_sidecars_round_trip(full: Storage) -> None:
    with Catalog(full) as catalog:
        for described in (*catalog.parts("photos"), *catalog.live_shards(), *catalog.tokenizers()):
            assert sidecars.read(full, sidecars.path_of(described)).of == described
            assert isinstance(described, PartAdded | ShardAdded | TokenizerAdded)
