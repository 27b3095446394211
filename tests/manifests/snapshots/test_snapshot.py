"""Snapshots: what they pick, the bytes they are, who can read them, and what is refused."""

import dataclasses
import hashlib
import json
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, LogError, ModmillError, QueryError, ShardError, UserError, WorkspaceError
from manifests.formats import shards
from manifests.formats import snapshots as snapshot_files
from manifests.formats.shards import Status
from manifests.log import actions
from manifests.log import entries as log
from manifests.modality import MODALITIES
from manifests.recipe import Recipe, sha256_hex
from manifests.snapshots import snapshot, splits, with_tokens
from manifests.snapshots.snapshot import Snapshot
from manifests.store import paths
from manifests.store.storage import Storage, open_storage

ROOT = Path(__file__).parents[3]
PART_ROWS = 4
OK, FAILED, ABSENT = Status.OK, Status.FAILED, Status.ABSENT


def keys_of(corpus: str, rows: int) -> list[str]:
    return [sha256_hex(f"{corpus}/{row}".encode())[:16] for row in range(rows)]


def is_held_out(key: str, hold_out: float) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < hold_out * 2**64


def tokenizer(name: str, *, digest: str = "d1" * 32, vocabulary: int = 300) -> actions.TokenizerAdded:
    return actions.TokenizerAdded(
        name=name,
        digest=digest,
        path=paths.tokenizer(name, digest),
        family="text" if name == "text" else "grid",
        family_version=1,
        vocabulary=vocabulary,
        options={},
        rows=8,
        metrics={},
    )


class Workspace:
    """A workspace that tests put corpora and tokens into."""

    def __init__(self, storage: Storage, make: Any) -> None:
        self.storage = storage
        self._make = make
        log.create_workspace(storage)
        self.keys: dict[str, list[str]] = {}

    def commit(self, *new: actions.Action) -> None:
        with Catalog(self.storage) as catalog:
            catalog.commit(new, run="test")

    def add_corpus(self, corpus: str, rows: int, *, kind: str = "image", config: Any = None) -> None:
        self.keys[corpus] = keys_of(corpus, rows)
        new = [self._make.corpus(corpus, kind=kind, config=config or {})]
        for part, first in enumerate(range(0, rows, PART_ROWS)):
            keys = self.keys[corpus][first : first + PART_ROWS]
            years = pa.array([1990 + first + row for row in range(len(keys))])
            new.append(self._make.samples_file(self.storage, corpus, part, {"year": years}, keys))
        self.commit(*new)

    def add_tokens(
        self,
        corpus: str,
        modality: str,
        *,
        statuses: Sequence[int] | None = None,
        crops: int | None = None,
        fitted: actions.TokenizerAdded | None = None,
        parameters: Any = None,
        parts: Sequence[int] | None = None,
        form: str = "parquet",
        declared: Any = None,
    ) -> Recipe:
        """Tokens of a modality in a corpus; `crops` makes shards of so many crops, and asks for as many."""
        known = declared or MODALITIES[modality]
        fitted = fitted or tokenizer("text" if known.tokenizer == "text" else modality)
        keys = self.keys[corpus]
        recipe = Recipe(
            modality=modality,
            form="token",
            producer=fitted.family,
            version=1,
            weights=fitted.digest,
            parameters={"tokenizer": fitted.name},
            crop=parameters,
            inputs={modality: "0" * 64},
        )
        new: list[actions.Action] = [
            fitted,
            actions.RecipeAdded(fingerprint=recipe.fingerprint, document=recipe.document()),
            actions.RecipeCurrent(
                corpus=corpus, modality=modality, form="token", fingerprint=recipe.fingerprint, crops=crops
            ),
        ]
        of_rows = list(statuses or [OK] * len(keys))
        for part, first in enumerate(range(0, len(keys), PART_ROWS)):
            if parts is not None and part not in parts:
                continue
            rows = slice(first, first + PART_ROWS)
            for crop in [None] if crops is None else range(crops):
                new.append(self._shard(corpus, part, crop, recipe, keys[rows], of_rows[rows], known, fitted, form))
        self.commit(*new)
        return recipe

    def _shard(self, corpus, part, crop, recipe, keys, statuses, known, fitted, form) -> actions.ShardAdded:
        length = 4 if known.kind == "image" else 3
        values = [[1] * length if status == OK else None for status in statuses]
        if form == "parquet":
            data = shards.write_tokens(keys, statuses, values, fitted.vocabulary, {})
        else:
            tar = shards.TarWriter("npy")
            for key, status, value in zip(keys, statuses, values, strict=True):
                tar.add(key, status, None if value is None else bytes(value))
            data = tar.finish().read()
        place = (corpus, known.name, recipe.fingerprint, part, crop)
        path = paths.shard(*place, sha256_hex(data), is_tar=form == "tar")
        self.storage.put(path, data)
        return actions.ShardAdded(
            corpus=corpus,
            part=part,
            crop=crop,
            modality=known.name,
            form="token",
            fingerprint=recipe.fingerprint,
            path=path,
            format=form,
            sha256=sha256_hex(data),
            size_bytes=len(data),
            rows=len(keys),
            ok=statuses.count(OK),
            failed=statuses.count(FAILED),
            absent=statuses.count(ABSENT),
            keys_sha256=shards.keys_digest(keys),
            tokens=length * statuses.count(OK),
            vocabulary=fitted.vocabulary,
        )

    def snapshot(self, name: str = "s", **options: Any) -> Snapshot:
        with Catalog(self.storage) as catalog:
            return snapshot.make(catalog, name, **{"hold_out": 0.0, "run": "test", **options})

    def rows(self, found: Snapshot, field: str = "selected") -> set[tuple[str, int]]:
        """The rows of a snapshot, numbered through each corpus."""
        return {
            (part.corpus, part.part * PART_ROWS + int(row))
            for part in found.parts
            for row in np.flatnonzero(getattr(part, field))
        }

    def version(self) -> int:
        with Catalog(self.storage) as catalog:
            return catalog.version


@pytest.fixture
def empty(tmp_path: Path, make) -> Workspace:
    return Workspace(open_storage(tmp_path / "work"), make)


def fill(workspace: Workspace) -> Workspace:
    """Photographs of two parts with two modalities, the second of two crops; notes of one."""
    workspace.add_corpus("photos", 6)
    workspace.add_corpus("notes", 3, kind="text")
    workspace.add_tokens("photos", "caption", statuses=[OK, ABSENT, OK, FAILED, OK, ABSENT])
    workspace.add_tokens("photos", "rgb", crops=2, statuses=[OK, ABSENT, OK, OK, OK, FAILED])
    workspace.add_tokens("notes", "text")
    return workspace


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, make) -> Workspace:
    return fill(Workspace(open_storage(tmp_path_factory.mktemp("template") / "work"), make))


@pytest.fixture
def filled(template: Workspace, tmp_path: Path, make) -> Workspace:
    shutil.copytree(template.storage.root, tmp_path / "work")
    workspace = Workspace(open_storage(tmp_path / "work"), make)
    workspace.keys.update(template.keys)
    return workspace


# -- what is picked ---------------------------------------------------------------------------------------------------


def test_everything_with_a_token_is_picked_and_told(filled: Workspace) -> None:
    found = filled.snapshot()
    assert filled.rows(found) == {("photos", row) for row in (0, 2, 3, 4)} | {("notes", row) for row in range(3)}
    assert (found.rows, found.held_out_rows, found.where, found.hold_out) == (7, 0, None, 0.0)
    by_name = {modality.modality: modality for modality in found.modalities}
    assert list(by_name) == ["caption", "rgb", "text"]
    rgb, text = by_name["rgb"], by_name["text"]
    assert (rgb.kind, rgb.grain, rgb.vocabulary, rgb.tokens, rgb.is_sequence) == ("image", "crop", 300, 4, False)
    assert (text.tokens, text.is_sequence, by_name["caption"].tokens) == (None, True, 256)
    assert (rgb.tokenizer, rgb.tokenizer_family, rgb.tokenizer_digest) == ("rgb", "grid", "d1" * 32)
    assert rgb.tokenizer_path == "tokenizers/rgb-d1d1d1d1d1d1"
    assert [(part.corpus, part.corpus_kind, part.part, part.rows) for part in found.parts] == [
        ("notes", "text", 0, 3),
        ("photos", "image", 0, 4),
        ("photos", "image", 1, 2),
    ]
    assert found.parts[1].keys_sha256 == shards.keys_digest(filled.keys["photos"][:4])
    assert [(shard.corpus, shard.part, shard.modality, shard.crop) for shard in found.shards] == [
        ("notes", 0, "text", None),
        *(
            ("photos", part, name, crop)
            for part in (0, 1)
            for name, crop in (("caption", None), ("rgb", 0), ("rgb", 1))
        ),
    ]
    for shard in found.shards:
        assert sha256_hex(filled.storage.read(shard.path)) == shard.sha256
        assert filled.storage.size(shard.path) == shard.size_bytes


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("corpus = 'photos' AND row = 0", {("photos", 0), ("photos", 4)}),
        ("year >= 1994", {("photos", 4)}),
        ("key IN (SELECT key FROM samples WHERE corpus = 'notes' AND year = 1992)", {("notes", 2)}),
        ("year = 1990 -- the first", {("photos", 0), ("notes", 0)}),
        ("corpus = 'photos' AND part IN (SELECT part FROM parts WHERE part = 1)", {("photos", 4)}),
    ],
)
def test_a_condition_picks_rows(filled: Workspace, where: str, rows: set[tuple[str, int]]) -> None:
    found = filled.snapshot(where=where)
    assert filled.rows(found) == rows
    assert found.where == where
    assert {(shard.corpus, shard.part) for shard in found.shards} == {(part.corpus, part.part) for part in found.parts}


def test_a_condition_may_ask_what_labels_say(filled: Workspace, make) -> None:
    keys = filled.keys["photos"][:4]
    boxes = [
        [{"class": name, "score": 1.0, "x0": 0.0, "y0": 0.0, "x1": 1.0, "y1": 1.0}]
        for name in ("cat", "dog", "cat", "cat")
    ]
    shard = make.labels_file(filled.storage, "boxes", keys, [0] * 4, boxes)
    filled.commit(make.current("photos", "boxes"), shard)
    found = filled.snapshot(where="key IN (SELECT key FROM boxes WHERE class = 'cat')")
    assert filled.rows(found) == {("photos", 0), ("photos", 2), ("photos", 3)}


def test_rows_without_any_chosen_modality_are_left_out(filled: Workspace) -> None:
    found = filled.snapshot(modalities=["caption"])
    assert filled.rows(found) == {("photos", 0), ("photos", 2), ("photos", 4)}
    assert {shard.modality for shard in found.shards} == {"caption"}


def test_complete_rows_have_every_modality_in_each_crop(filled: Workspace) -> None:
    both = filled.snapshot("both", modalities=["caption", "rgb"], complete=True)
    assert filled.rows(both) == {("photos", row) for row in (0, 2, 4)}
    assert (both.complete, filled.snapshot("any", modalities=["caption", "rgb"]).complete) == (True, False)
    with Catalog(filled.storage) as catalog:
        assert with_tokens.counts(catalog, both) == {("photos", "caption"): 3, ("photos", "rgb"): 3}
        found = snapshot.read(filled.storage, "any")
        assert with_tokens.counts(catalog, found) == {("photos", "caption"): 3, ("photos", "rgb"): 4}
    assert b"complete" not in filled.storage.read("_meta/snapshots/any/snapshot.json")
    # A row of notes has no rgb, and a row of photos no text.
    with pytest.raises(ConfigError, match="has tokens of each of caption, rgb, text"):
        filled.snapshot("all", complete=True)
    with pytest.raises(WorkspaceError, match="'both'"):
        filled.snapshot("both", modalities=["caption", "rgb"])


def test_a_part_without_shards_of_a_modality_is_not_complete(empty: Workspace) -> None:
    empty.add_corpus("photos", 8)
    empty.add_tokens("photos", "caption")
    empty.add_tokens("photos", "rgb", parts=[1])
    assert empty.rows(empty.snapshot(complete=True)) == {("photos", row) for row in range(4, 8)}


def test_default_modalities_are_those_of_the_corpora_that_are_picked(filled: Workspace) -> None:
    found = filled.snapshot(where="corpus = 'photos'")
    assert [modality.modality for modality in found.modalities] == ["caption", "rgb"]


def test_statuses_are_read_only_where_the_records_leave_a_doubt(empty: Workspace) -> None:
    empty.add_corpus("photos", 8)
    empty.add_tokens("photos", "caption", statuses=[OK] * 4 + [OK, ABSENT, ABSENT, OK])
    empty.add_tokens("photos", "palette", statuses=[ABSENT] * 4 + [ABSENT] * 2 + [OK] * 2)
    first = next(Path(empty.storage.root).glob("data/photos/caption/*/part-0000000*"))
    first.unlink()
    found = empty.snapshot()
    assert empty.rows(found) == {("photos", row) for row in (0, 1, 2, 3, 4, 6, 7)}
    second = next(Path(empty.storage.root).glob("data/photos/caption/*/part-0000001*"))
    second.unlink()
    with pytest.raises(ShardError, match=r"part-0000001.*cannot be read.*modmill verify"):
        empty.snapshot("other")


def test_tokens_that_training_does_not_read_are_left_out_and_refused_by_name(empty: Workspace) -> None:
    empty.add_corpus("photos", 8)
    empty.add_tokens("photos", "caption")
    empty.add_tokens("photos", "palette", form="webdataset")
    assert [modality.modality for modality in empty.snapshot().modalities] == ["caption"]
    with pytest.raises(ConfigError, match=r"tokens of palette are webdataset shards, training reads Parquet"):
        empty.snapshot("other", modalities=["caption", "palette"])


def test_a_modality_may_have_shards_of_some_parts_only(empty: Workspace) -> None:
    empty.add_corpus("photos", 8)
    empty.add_tokens("photos", "caption")
    empty.add_tokens("photos", "palette", parts=[1])
    found = empty.snapshot()
    assert found.rows == 8
    assert [(shard.part, shard.modality) for shard in found.shards] == [(0, "caption"), (1, "caption"), (1, "palette")]
    with pytest.raises(ConfigError, match="'palette' has no token shards of the parts that are picked"):
        empty.snapshot("first", where="part = 0", modalities=["caption", "palette"])
    assert [m.modality for m in empty.snapshot("first", where="part = 0").modalities] == ["caption"]


def test_held_out_rows_are_those_whose_key_hashes_low(empty: Workspace) -> None:
    empty.add_corpus("photos", 200)
    empty.add_tokens("photos", "caption")
    found = empty.snapshot(hold_out=0.2)
    expected = {("photos", row) for row, key in enumerate(empty.keys["photos"]) if is_held_out(key, 0.2)}
    assert 20 < len(expected) < 60
    assert empty.rows(found, "held_out") == expected
    assert found.held_out_rows == len(expected)
    some = empty.snapshot("some", hold_out=0.2, where="row < 2")
    assert empty.rows(some, "held_out") == {(corpus, row) for corpus, row in expected if row % PART_ROWS < 2}


def test_only_crops_that_are_asked_for_are_taken(filled: Workspace) -> None:
    with Catalog(filled.storage) as catalog:
        current = catalog.current_recipes("photos")["rgb", "token"]
    filled.commit(dataclasses.replace(current, crops=1))
    assert {shard.crop for shard in filled.snapshot().shards if shard.modality == "rgb"} == {0}


def test_another_live_recipe_is_named_by_its_first_digits(filled: Workspace) -> None:
    new = filled.add_tokens("photos", "rgb", crops=1, fitted=tokenizer("rgb", digest="e2" * 32, vocabulary=99))
    with Catalog(filled.storage) as catalog:
        recipes = [recipe for recipe in catalog.token_recipes() if recipe["modality"] == "rgb"]
    old = next(recipe["fingerprint"] for recipe in recipes if not recipe["is_current"])
    assert {shard.fingerprint for shard in filled.snapshot("new", modalities=["rgb"]).shards} == {new.fingerprint}
    found = filled.snapshot("old", modalities=[f"rgb={old[:8]}"])
    assert {shard.fingerprint for shard in found.shards} == {old}
    assert [shard.crop for shard in found.shards] == [0, 1, 0, 1]
    assert (found.modalities[0].vocabulary, found.modalities[0].tokenizer_digest) == (300, "d1" * 32)
    with pytest.raises(ConfigError, match=r"rgb=.*recipes begin so|rgb=.*no recipe"):
        filled.snapshot("none", modalities=["rgb=zz"])
    with pytest.raises(ConfigError, match="two recipes of rgb are named, and photos has both"):
        filled.snapshot("both", modalities=[f"rgb={old[:8]}", f"rgb={new.fingerprint[:8]}"])


def test_an_ambiguous_recipe_is_refused_with_the_choices(empty: Workspace) -> None:
    empty.add_corpus("photos", 4)
    recipes = [empty.add_tokens("photos", "rgb", crops=1, parameters={"seed": seed}) for seed in range(17)]
    digits = [recipe.fingerprint[0] for recipe in recipes]
    shared = next(digit for digit in digits if digits.count(digit) > 1)
    with pytest.raises(ConfigError, match=rf"rgb={shared}: {digits.count(shared)} recipes begin so; .*\(current\)"):
        empty.snapshot(modalities=[f"rgb={shared}"])


def test_a_modality_of_a_pipeline_file_is_known(empty: Workspace, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "heat_module.py").write_text(
        "from modmill import Modality\n"
        "HEAT = Modality(name='heat', kind='image', label_grain='crop', token_grain='crop', crop_rule='linear',\n"
        "                labeler='files', tokenizer='grid', axes='h w', dtype='uint16')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    empty.add_corpus("photos", 4, config={"modalities": {"heat_module:HEAT": {}}})
    import heat_module  # type: ignore[import-not-found]

    empty.add_tokens("photos", "heat", crops=1, declared=heat_module.HEAT)
    found = empty.snapshot(modalities=["heat_module:HEAT"])
    assert [(m.modality, m.kind, m.tokens) for m in found.modalities] == [("heat", "image", 4)]
    assert found.sha256 == empty.snapshot().sha256


# -- the same bytes, and who reads them -------------------------------------------------------------------------------


def files_of(workspace: Workspace, name: str = "s") -> dict[str, bytes]:
    folder = paths.snapshot(name)
    return {file: workspace.storage.read(f"{folder}/{file}") for file in workspace.storage.names(folder)}


def test_equal_workspaces_give_equal_bytes_from_any_catalog(filled: Workspace, tmp_path: Path, make) -> None:
    shutil.copytree(filled.storage.root, tmp_path / "copy")
    first = filled.snapshot(hold_out=0.3, where="year < 2000")
    filled.snapshot("after", hold_out=0.3)
    shutil.rmtree(tmp_path / "cache")
    copy = Workspace(open_storage(tmp_path / "copy"), make)
    copy.commit(make.run_started())
    second = copy.snapshot(hold_out=0.3, where="year < 2000")
    assert files_of(filled) == files_of(copy)
    assert first.sha256 == second.sha256 == sha256_hex(files_of(filled)["SHA256SUMS"])
    assert str(tmp_path).encode() not in b"".join(files_of(filled).values())


def test_sha256sum_checks_a_snapshot(filled: Workspace) -> None:
    filled.snapshot()
    folder = Path(filled.storage.full(paths.snapshot("s")))
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 4


def test_the_log_records_it_and_the_view_shows_it(filled: Workspace) -> None:
    found = filled.snapshot("demo", hold_out=0.5, where="corpus = 'photos'", run="run-7")
    with Catalog(filled.storage) as catalog:
        row = catalog.sql("SELECT * FROM snapshots").to_pylist()[0]
        version = catalog.version
    assert row.pop("time") is not None
    assert row == {
        "snapshot": "demo",
        "rows": found.rows,
        "held_out": found.held_out_rows,
        "where": "corpus = 'photos'",
        "modalities": ["caption", "rgb"],
        "sha256": found.sha256,
        "replaces": None,
        "replaced_by": None,
        "run": "run-7",
        "version": version,
    }


WITHOUT_DUCKDB = """
import sys
for name in ("duckdb", "ray", "pydantic", "torch", "click"):
    sys.modules[name] = None
from manifests.snapshots import snapshot
found = snapshot.open_snapshot(sys.argv[1])
print(found.rows, found.sha256, sorted(name for name in ("pandas",) if name in sys.modules))
"""


def test_it_is_read_without_duckdb(filled: Workspace) -> None:
    made = filled.snapshot()
    command = [sys.executable, "-c", WITHOUT_DUCKDB, made.uri]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["7", made.sha256, "[]"]


@pytest.mark.parametrize("store", ["memory", "s3"])
def test_it_lives_on_every_store(store: str, request: pytest.FixtureRequest, make) -> None:
    root = f"memory://{secrets.token_hex(8)}" if store == "memory" else request.getfixturevalue("s3_bucket")
    workspace = fill(Workspace(open_storage(f"{root}/{secrets.token_hex(8)}"), make))
    assert snapshot.names(workspace.storage) == []
    made = workspace.snapshot(hold_out=0.3)
    version = workspace.version()
    assert workspace.snapshot(hold_out=0.3).sha256 == made.sha256
    assert workspace.version() == version
    assert snapshot.names(workspace.storage) == ["s"]
    opened = snapshot.open_snapshot(f"{workspace.storage.uri}#s")
    assert (opened.sha256, opened.shards, opened.modalities) == (made.sha256, made.shards, made.modalities)
    assert workspace.rows(opened, "held_out") == workspace.rows(made, "held_out")
    with Catalog(workspace.storage) as catalog:
        held = catalog.sql("SELECT path, sha256 FROM snapshot_shards").to_pylist()
        held_out = catalog.sql("SELECT sum(held_out)::INTEGER AS n FROM snapshot_parts")["n"].to_pylist()
    assert {(row["path"], row["sha256"]) for row in held} == {(shard.path, shard.sha256) for shard in made.shards}
    assert held_out == [made.held_out_rows]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.lists(st.lists(st.booleans(), min_size=1, max_size=19).filter(any), min_size=1, max_size=4),
    share=st.floats(0, 0.99),
)
def test_bitmaps_come_back_as_they_went(tmp_path: Path, bits: list[list[bool]], share: float) -> None:
    storage = open_storage(tmp_path / secrets.token_hex(8))
    selected = [np.array(part) for part in bits]
    held_out = [part & (np.arange(len(part)) < share * len(part)) for part in selected]
    rows = [
        {
            "corpus": "photos",
            "corpus_kind": "image",
            "part": number,
            "rows": len(part),
            "keys_sha256": "0" * 64,
            "selected": np.packbits(part, bitorder="little").tobytes(),
            "held_out": np.packbits(held, bitorder="little").tobytes(),
        }
        for number, (part, held) in enumerate(zip(selected, held_out, strict=True))
    ]
    tables = {
        "modalities": snapshot_files.MODALITIES.empty_table(),
        "parts": pa.Table.from_pylist(rows, snapshot_files.PARTS),
        "shards": snapshot_files.SHARDS.empty_table(),
    }
    counts = {"rows": int(sum(map(sum, selected))), "held_out": int(sum(map(sum, held_out)))}
    document = {"workspace": "w", "where": None, "modalities": [], "hold_out": share, **counts}
    snapshot_files.write(storage, "s", snapshot_files.encode(document, tables))
    found = snapshot.read(storage, "s")
    for part, want, held in zip(found.parts, selected, held_out, strict=True):
        np.testing.assert_array_equal(part.selected, want)
        np.testing.assert_array_equal(part.held_out, held)
        assert part.selected.dtype == part.held_out.dtype == bool
    assert (found.rows, found.held_out_rows) == (counts["rows"], counts["held_out"])


# -- a name that stands -----------------------------------------------------------------------------------------------


def test_equal_content_is_returned_and_nothing_committed(filled: Workspace) -> None:
    made = filled.snapshot(hold_out=0.1)
    before = filled.version()
    assert filled.snapshot(hold_out=0.1).sha256 == made.sha256
    assert filled.version() == before


def test_other_content_is_refused_by_what_differs(filled: Workspace) -> None:
    made = filled.snapshot(hold_out=0.1)
    before = filled.version(), files_of(filled)
    with pytest.raises(WorkspaceError, match=r"'s'.*frozen.*hold_out 0.1 there, 0.5 here.*another name"):
        filled.snapshot(hold_out=0.5)
    with pytest.raises(WorkspaceError, match=r"where None there, \"corpus = 'photos'\" here"):
        filled.snapshot(hold_out=0.1, where="corpus = 'photos'")
    assert (filled.version(), files_of(filled)) == before
    filled.add_tokens("photos", "rgb", crops=2, parameters={"seed": 9}, statuses=[OK, ABSENT, OK, OK, OK, FAILED])
    with pytest.raises(WorkspaceError, match=r"frozen.*\(other shards\)"):
        filled.snapshot(hold_out=0.1)
    assert snapshot.read(filled.storage, "s").sha256 == made.sha256


def test_tables_of_another_writer_count_as_equal(filled: Workspace) -> None:
    """A newer pyarrow writes other bytes for the same table: the snapshot that stands is taken for what it says."""
    filled.snapshot()
    folder = Path(filled.storage.full(paths.snapshot("s")))
    pq.write_table(pq.read_table(folder / "parts.parquet"), folder / "parts.parquet", compression="snappy")
    sums = [f"{sha256_hex(p.read_bytes())}  {p.name}\n" for p in sorted(folder.iterdir()) if p.name != "SHA256SUMS"]
    (folder / "SHA256SUMS").write_text("".join(sums))
    assert filled.snapshot().sha256 == sha256_hex("".join(sums).encode())


def test_a_crash_between_the_files_is_mended(filled: Workspace, tmp_path: Path, make) -> None:
    shutil.copytree(filled.storage.root, tmp_path / "copy")
    other = Workspace(open_storage(tmp_path / "copy"), make)
    made = other.snapshot("demo")
    for file in ("modalities.parquet", "snapshot.json"):
        path = f"{paths.snapshot('demo')}/{file}"
        filled.storage.put(path, other.storage.read(path))
    assert snapshot.names(filled.storage) == []
    with pytest.raises(WorkspaceError, match=r"no snapshot 'demo' \(one was begun and not finished\); known: none"):
        snapshot.read(filled.storage, "demo")
    with pytest.raises(WorkspaceError, match=r"left by another writer that did not finish.*delete that folder"):
        filled.snapshot("demo", hold_out=0.5)
    assert filled.snapshot("demo").sha256 == made.sha256
    assert snapshot.names(filled.storage) == ["demo"]


def test_a_crash_between_the_files_and_the_log_is_mended(filled: Workspace, tmp_path: Path, make) -> None:
    shutil.copytree(filled.storage.root, tmp_path / "copy")
    other = Workspace(open_storage(tmp_path / "copy"), make)
    made = other.snapshot("demo")
    shutil.copytree(Path(other.storage.root) / "_meta/snapshots", Path(filled.storage.root) / "_meta/snapshots")
    with Catalog(filled.storage) as catalog:
        assert catalog.snapshots().num_rows == 0
    assert filled.snapshot("demo").sha256 == made.sha256
    with Catalog(filled.storage) as catalog:
        assert catalog.snapshots()["sha256"].to_pylist() == [made.sha256]


def test_a_name_whose_files_are_gone_takes_only_the_same_content(filled: Workspace) -> None:
    made = filled.snapshot("demo")
    shutil.rmtree(filled.storage.full(paths.snapshot("demo")))
    with pytest.raises(WorkspaceError, match="of another content, whose files are gone"):
        filled.snapshot("demo", hold_out=0.5)
    before = filled.version()
    assert filled.snapshot("demo").sha256 == made.sha256
    assert filled.version() == before


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"where": "false"}, ConfigError, "the condition 'false' picks no row; the workspace has 9 samples"),
        ({"where": "row = 1 AND corpus = 'photos'"}, ConfigError, "no row that is picked has a token in caption, rgb"),
        ({"where": "yeer = 1"}, QueryError, "condition 'yeer = 1' is refused.*yeer"),
        ({"where": "key"}, QueryError, "condition 'key' is refused"),
        ({"where": "true) OR (true"}, QueryError, "is refused.*syntax error"),
        ({"where": "true) UNION ALL SELECT 1, 2, 3 WHERE (true"}, QueryError, "is refused"),
        ({"where": "true; DROP VIEW parts"}, QueryError, "one query is expected"),
        (
            {"where": "key IN (WITH w AS (COPY parts TO 'x.csv') SELECT 'a')"},
            QueryError,
            "COPY is refused|syntax error",
        ),
        ({"where": "true ORDER BY key LIMIT 1"}, QueryError, "is refused"),
        ({"where": ""}, QueryError, "condition '' is refused"),
        ({"modalities": ["captoin"]}, ConfigError, "did you mean 'caption'"),
        ({"modalities": ["boxes"]}, ConfigError, "'boxes' is kept as labels only.*caption, rgb, text"),
        (
            {"modalities": ["caption"], "where": "corpus = 'notes'"},
            ConfigError,
            "has token shards in photos, but.*notes",
        ),
        (
            {"modalities": ["rgb=ffffffffffffffff"]},
            ConfigError,
            "no recipe with token shards begins so; recipes of rgb",
        ),
        ({"modalities": ["rgb="]}, ConfigError, "expected the first digits of a recipe"),
        ({"modalities": ["rgb", "rgb"]}, ConfigError, "'rgb' is named twice"),
        ({"modalities": []}, ConfigError, "no modalities are named"),
        ({"hold_out": 1.0}, ConfigError, "hold_out is 1.0; expected"),
        ({"hold_out": -0.1}, ConfigError, "hold_out is -0.1"),
        ({"hold_out": float("nan")}, ConfigError, "hold_out is nan"),
        ({"name": "../x"}, ConfigError, "the name '../x'"),
        ({"name": ".x"}, ConfigError, "the name"),
        ({"name": "x" * 65}, ConfigError, "1 to 64"),
    ],
)
def test_what_cannot_be_made(filled: Workspace, make, options: Any, error: type[ModmillError], message: str) -> None:
    filled.commit(make.current("photos", "boxes"))
    before = filled.version()
    with pytest.raises(error, match=message) as caught:
        filled.snapshot(**options)
    assert isinstance(caught.value, UserError)
    assert filled.version() == before
    assert filled.storage.names(paths.SNAPSHOTS) == []


def test_a_workspace_without_tokens_says_what_to_do(empty: Workspace) -> None:
    with pytest.raises(ConfigError, match="no row; the workspace has 0 samples"):
        empty.snapshot()
    empty.add_corpus("photos", 4)
    with pytest.raises(ConfigError, match=r"no token shards of photos yet; `modmill run FILE`"):
        empty.snapshot()


def test_a_modality_has_one_tokenizer_over_all_corpora(empty: Workspace) -> None:
    for corpus, digest in (("one", "d1" * 32), ("two", "e2" * 32)):
        empty.add_corpus(corpus, 4)
        empty.add_tokens(corpus, "rgb", crops=1, fitted=tokenizer("rgb", digest=digest))
    with pytest.raises(ConfigError, match=r"rgb has one tokenizer in one .* and another in two .* rgb=DIGITS"):
        empty.snapshot()
    assert empty.snapshot(where="corpus = 'two'").modalities[0].tokenizer_digest == "e2" * 32


def test_a_log_that_does_not_fit_is_told(empty: Workspace) -> None:
    empty.add_corpus("photos", 4)
    recipe = empty.add_tokens("photos", "caption")
    with Catalog(empty.storage) as catalog:
        shard = catalog.live_shards()[0]
    empty.commit(dataclasses.replace(shard, keys_sha256="00" * 32))
    with pytest.raises(ShardError, match="its rows are not those of its part"):
        empty.snapshot()
    lost = Recipe(modality="caption", form="token", producer="text", version=9, weights="ff" * 32)
    empty.commit(
        actions.RecipeAdded(fingerprint=lost.fingerprint, document=lost.document()),
        actions.RecipeCurrent(
            corpus="photos", modality="caption", form="token", fingerprint=lost.fingerprint, crops=None
        ),
        dataclasses.replace(shard, fingerprint=lost.fingerprint),
    )
    assert lost.fingerprint != recipe.fingerprint
    with pytest.raises(LogError, match="has a tokenizer that is missing in the log"):
        empty.snapshot()


def test_missing_samples_are_no_fault_of_the_condition(filled: Workspace) -> None:
    next(Path(filled.storage.root).glob("data/photos/_samples/*")).unlink()
    with pytest.raises(ShardError, match="modmill verify"):
        filled.snapshot(hold_out=0.5)


def test_where_none_without_held_out_rows_touches_no_samples(empty: Workspace) -> None:
    empty.add_corpus("photos", 8)
    empty.add_tokens("photos", "caption")
    for path in Path(empty.storage.root).glob("data/photos/*/**/*.parquet"):
        path.unlink()
    assert empty.snapshot().rows == 8


# -- what was altered -------------------------------------------------------------------------------------------------


def alter(change: Callable[[Path], object], *, sums: bool = True) -> Callable[[Path], object]:
    """A change of a snapshot's folder, with SHA256SUMS written anew unless it is the thing that was changed."""

    def apply(folder: Path) -> None:
        change(folder)
        if sums:
            names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
            lines = [f"{sha256_hex((folder / name).read_bytes())}  {name}\n" for name in names]
            (folder / "SHA256SUMS").write_text("".join(lines))

    return apply


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-3])


def rewrite(**fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "snapshot.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def edit_sums(edit: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / "SHA256SUMS").write_text(edit((folder / "SHA256SUMS").read_text()))


def drop_column(folder: Path) -> None:
    table = pq.read_table(folder / "shards.parquet")
    pq.write_table(table.drop_columns(["crop"]), folder / "shards.parquet")


def without_parts(folder: Path) -> None:
    table = pq.read_table(folder / "parts.parquet")
    pq.write_table(table.slice(1), folder / "parts.parquet")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (alter(cut("parts.parquet"), sums=False), ShardError, "parts.parquet has sha256 .* altered or truncated"),
        (alter(cut("snapshot.json"), sums=False), ShardError, "snapshot.json has sha256"),
        (
            alter(lambda f: (f / "shards.parquet").unlink(), sums=False),
            ShardError,
            "shards.parquet is missing; restore",
        ),
        (
            alter(lambda f: (f / "shards.parquet").unlink()),
            ShardError,
            "shards.parquet is a file that .* does not list",
        ),
        (
            alter(lambda f: (f / "more.parquet").write_bytes(b"x")),
            ShardError,
            "more.parquet .* no snapshot has",
        ),
        (alter(edit_sums(lambda text: text + text), sums=False), ShardError, "SHA256SUMS: the line .* stands twice"),
        (alter(edit_sums(lambda text: text + "x\n"), sums=False), ShardError, "the line 'x'"),
        (alter(edit_sums(lambda text: text[:70]), sums=False), ShardError, "the line"),
        (alter(cut("modalities.parquet")), ShardError, "modalities.parquet is no Parquet"),
        (alter(drop_column), ShardError, "shards.parquet has the columns"),
        (alter(without_parts), ShardError, "rows is 7 in snapshot.json, but"),
        (alter(rewrite(rows=8)), ShardError, "rows is 8 in snapshot.json, but 7"),
        (alter(rewrite(modalities=["rgb"])), ShardError, "modalities is"),
        (alter(rewrite(format=2)), WorkspaceError, "has format 2, this modmill reads up to 1; install a newer"),
        (alter(lambda f: (f / "snapshot.json").write_text("[]")), ShardError, "is no snapshot's document"),
        (alter(lambda f: (f / "SHA256SUMS").unlink(), sums=False), WorkspaceError, "begun and not finished"),
    ],
)
def test_an_altered_snapshot_is_refused(filled: Workspace, damage, error: type[ModmillError], message: str) -> None:
    made = filled.snapshot()
    damage(Path(filled.storage.full(paths.snapshot("s"))))
    with pytest.raises(error, match=message):
        snapshot.open_snapshot(made.uri)


def test_a_newer_format_is_told_before_its_other_files(filled: Workspace) -> None:
    made = filled.snapshot()
    folder = Path(filled.storage.full(paths.snapshot("s")))
    alter(lambda f: (f / "more.parquet").write_bytes(b"x"))(folder)
    alter(rewrite(format=2))(folder)
    with pytest.raises(WorkspaceError, match="install a newer modmill"):
        snapshot.open_snapshot(made.uri)


def test_a_uri_names_a_workspace_and_a_snapshot(filled: Workspace, tmp_path: Path) -> None:
    made = filled.snapshot("demo-1")
    assert snapshot.open_snapshot(made.uri).sha256 == made.sha256
    for uri in (filled.storage.uri, f"{filled.storage.uri}#"):
        with pytest.raises(WorkspaceError, match="expected WORKSPACE#NAME; snapshots there: demo-1"):
            snapshot.open_snapshot(uri)
    with pytest.raises(WorkspaceError, match=r"has no snapshot 'demo1'; did you mean 'demo-1'\?"):
        snapshot.open_snapshot(f"{filled.storage.uri}#demo1")
    with pytest.raises(WorkspaceError, match=r"has no snapshot '\.\./demo-1'"):
        snapshot.read(filled.storage, "../demo-1")
    with pytest.raises(WorkspaceError, match="is no modmill workspace"):
        snapshot.open_snapshot(f"{tmp_path / 'nowhere'}#demo")


def test_an_old_log_without_snapshots_is_read(filled: Workspace) -> None:
    with Catalog(filled.storage) as catalog:
        assert catalog.snapshots().num_rows == 0
        assert catalog.sql('SELECT snapshot, "where" FROM snapshots').num_rows == 0


# -- by what is in the pictures ---------------------------------------------------------------------------------------


def add_boxes(workspace: Workspace, make: Any, corpus: str, per_row: Sequence[list[tuple[str, float]]]) -> None:
    """Labels of the first part: the class and the width of the boxes of each row, all of height 0.5."""
    values = [
        [{"class": name, "score": 0.9, "x0": 0.0, "y0": 0.0, "x1": width, "y1": 0.5} for name, width in boxes]
        for boxes in per_row
    ]
    keys = workspace.keys[corpus][:PART_ROWS]
    labels = make.labels_file(workspace.storage, "boxes", keys, [OK] * len(keys), values, corpus=corpus)
    workspace.commit(make.current(corpus, "boxes"), labels)


DOGS = "SELECT key FROM boxes WHERE class = 'dog' AND area > 0.1"


def test_rows_are_selected_by_what_their_labels_say(empty: Workspace, make) -> None:
    empty.add_corpus("photos", 6)
    empty.add_tokens("photos", "caption")
    add_boxes(empty, make, "photos", [[("dog", 0.9)], [("cat", 0.9)], [("cat", 0.9), ("dog", 0.3)], [("dog", 0.1)]])
    found = empty.snapshot("dogs", where=f"key IN ({DOGS})")
    assert empty.rows(found) == {("photos", 0), ("photos", 2)}
    none = empty.snapshot("others", where=f"key NOT IN ({DOGS}) AND year < 1995")
    assert empty.rows(none) == {("photos", 1), ("photos", 3), ("photos", 4)}


def test_a_key_alone_is_of_any_corpus_and_with_its_corpus_of_one(empty: Workspace, make) -> None:
    for corpus in ("photos", "scans"):
        empty.add_corpus(corpus, 4)
        empty.add_tokens(corpus, "caption")
    empty.keys["twins"] = empty.keys["photos"]
    columns = {"year": pa.array([1, 2, 3, 4])}
    empty.commit(make.corpus("twins"), make.samples_file(empty.storage, "twins", 0, columns, empty.keys["twins"]))
    empty.add_tokens("twins", "caption")
    add_boxes(empty, make, "photos", [[("dog", 0.9)], [], [], []])
    add_boxes(empty, make, "twins", [[], [("dog", 0.9)], [], []])
    both = {(corpus, row) for corpus in ("photos", "twins") for row in (0, 1)}
    assert empty.rows(empty.snapshot("keys", where=f"key IN ({DOGS})")) == both
    pairs = DOGS.replace("SELECT key", "SELECT (corpus, key)")
    assert empty.rows(empty.snapshot("pairs", where=f"(corpus, key) IN ({pairs})")) == {("photos", 0), ("twins", 1)}
    narrow = f"corpus = 'twins' AND key IN ({DOGS} AND corpus = 'twins')"
    assert empty.rows(empty.snapshot("narrow", where=narrow)) == {("twins", 1)}


# -- splits -----------------------------------------------------------------------------------------------------------


def share_of(key: str) -> float:
    return int(hashlib.sha256(f"split/{key}".encode()).hexdigest()[:13], 16) / 2**52


def shares(**given: str) -> dict[str, Decimal]:
    return {name: Decimal(share) for name, share in given.items()}


def split(workspace: Workspace, name: str, where: str | None = None, **given: str) -> dict[str, Snapshot]:
    with Catalog(workspace.storage) as catalog:
        conditions = splits.conditions(catalog, name, where, shares(**given))
    return {one: workspace.snapshot(one, where=condition) for one, condition in conditions.items()}


@pytest.fixture
def many(empty: Workspace) -> Workspace:
    empty.add_corpus("photos", 60)
    empty.add_tokens("photos", "caption")
    return empty


def test_the_share_of_a_key_is_a_promise(many: Workspace) -> None:
    with Catalog(many.storage) as catalog:
        found = catalog.sql("SELECT key, split_share(key) AS share FROM samples").to_pylist()
        assert {row["key"]: row["share"] for row in found} == {key: share_of(key) for key in many.keys["photos"]}
        assert catalog.sql("SELECT split_share('a') AS share")["share"].to_pylist() == [0.01210655588209697]
        assert catalog.sql("SELECT split_share(NULL) AS share")["share"].to_pylist() == [None]


def test_splits_have_no_row_in_common_and_all_rows_together(many: Workspace) -> None:
    found = split(many, "all", train="0.7", val="0.2", test="0.1")
    assert list(found) == ["all-train", "all-val", "all-test"]
    rows = [many.rows(one) for one in found.values()]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 60
    bounds = [0, 0.7, 0.9, 1]
    for low, high, of_split in zip(bounds, bounds[1:], rows, strict=False):
        assert of_split == {
            ("photos", row) for row, key in enumerate(many.keys["photos"]) if low <= share_of(key) < high
        }
    assert [one.where for one in found.values()] == [
        "split_share(key) < 0.7",
        "split_share(key) >= 0.7 AND split_share(key) < 0.9",
        "split_share(key) >= 0.9",
    ]


def test_a_split_keeps_its_rows_when_there_are_more(many: Workspace) -> None:
    before = split(many, "before", train="0.5", val="0.5")
    many.add_corpus("scans", 20)
    many.add_tokens("scans", "caption")
    after = split(many, "after", train="0.5", val="0.5")
    for name in ("train", "val"):
        assert many.rows(before[f"before-{name}"]) < many.rows(after[f"after-{name}"])


def test_what_is_held_out_says_nothing_of_the_split(many: Workspace) -> None:
    with Catalog(many.storage) as catalog:
        picked = snapshot.make(catalog, "s", where="split_share(key) < 0.5", hold_out=0.5, run="test")
    assert 0 < picked.held_out_rows < picked.rows < 60


def test_splits_are_of_the_rows_that_a_condition_picks(many: Workspace) -> None:
    found = split(many, "old", "year < 2010 -- the old ones", train="0.5", val="0.25")
    picked = set.union(*(many.rows(one) for one in found.values()))
    assert picked == {("photos", row) for row, key in enumerate(many.keys["photos"][:20]) if share_of(key) < 0.75}
    found = split(many, "either", "year = 1990 OR year = 1991 OR year = 1999", whole="1")
    assert many.rows(found["either-whole"]) == {("photos", row) for row in (0, 1, 9)}


def test_a_split_by_a_column_keeps_its_groups_together(many: Workspace) -> None:
    many.add_corpus("scans", 60)
    many.add_tokens("scans", "caption")
    with Catalog(many.storage) as catalog:
        conditions = splits.conditions(catalog, "s", None, shares(train="0.7", val="0.3"), "year")
        made = [
            snapshot.make(catalog, name, where=where, hold_out=0.3, split_by="year", run="test")
            for name, where in conditions.items()
        ]
        with pytest.raises(ConfigError, match=r"--split-by yaer: `samples` has no such column; .*year"):
            snapshot.make(catalog, "t", split_by="yaer", run="test")
    # A photograph and a scan of one year have other keys, and are on one side.
    for one in made:
        for field in ("selected", "held_out"):
            found = many.rows(one, field)
            assert {row for corpus, row in found if corpus == "photos"} == {
                row for corpus, row in found if corpus == "scans"
            }
        assert 0 < one.held_out_rows < one.rows
        assert one.split_by == "year"
        assert all((share_of(str(1990 + row)) < 0.7) == (one is made[0]) for _, row in many.rows(one))
    assert sum(one.rows for one in made) == 120


@pytest.mark.parametrize(
    ("where", "given", "message"),
    [
        (None, {"train": "0.9", "val": "0.2"}, "train=0.9, val=0.2; expected shares over 0"),
        (None, {"train": "0"}, "train=0; expected"),
        (None, {"train": "-1", "val": "1"}, "expected shares over 0"),
        (None, {"train": "NaN"}, "train=NaN"),
        (None, {"train": "Infinity"}, "expected shares over 0"),
        (None, {}, "are none"),
        (None, {"train": "0.5", "v/al": "0.5"}, "the name 's-v/al'"),
        ("true) OR (true", {"train": "0.5", "val": "0.5"}, "is refused"),
        ("yaer = 1990", {"train": "1"}, "the condition 'yaer = 1990' is refused"),
        ("year = 1800", {"train": "1"}, "picks no row"),
        (None, {"train": "0.9999", "val": "0.0001"}, "no row falls into s-val"),
    ],
)
def test_splits_that_are_none_are_refused(
    filled: Workspace, where: str | None, given: dict[str, str], message: str
) -> None:
    before = filled.version()
    with Catalog(filled.storage) as catalog, pytest.raises(UserError, match=re.escape(message)):
        splits.conditions(catalog, "s", where, shares(**given))
    assert filled.version() == before
