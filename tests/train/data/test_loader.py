"""Batches: the right tokens, in an order that nothing but the seed decides."""

import itertools
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import modmill
from manifests.errors import ConfigError, ShardError
from manifests.snapshots.snapshot import Snapshot
from train.data import loader as loader_module
from train.data.batch import Batch
from train.data.loader import Loader
from train.data.mixture import WINDOW_SLOTS, MixtureEntry
from train.data.vocabulary import Vocabulary, of_snapshots

ROOT = Path(__file__).parents[3]
IMAGES = ("rgb", "depth", "caption", "metadata", "palette", "boxes")
CORPORA = {"photos": (70, IMAGES), "scenes": (40, ("rgb", "edges", "caption")), "documents": (50, ("text",))}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, token_workspace: Callable[..., Any]):
    made = token_workspace(tmp_path_factory.mktemp("loader") / "work", CORPORA, crops=3)
    made.snapshot("all", hold_out=0.2)
    made.snapshot("scenes", where="corpus = 'scenes'", hold_out=0.0)
    return made


@pytest.fixture(scope="module")
def frozen(workspace) -> Snapshot:
    from manifests.snapshots.snapshot import read

    return read(workspace.storage, "all")


@pytest.fixture(scope="module")
def scenes(workspace) -> Snapshot:
    from manifests.snapshots.snapshot import read

    return read(workspace.storage, "scenes")


def loader_of(*snapshots: Snapshot, **options: Any) -> Loader:
    entries = options.pop("entries", [MixtureEntry(snapshot=snapshot) for snapshot in snapshots])
    vocabulary = options.pop("vocabulary", None) or of_snapshots([entry.snapshot for entry in entries])
    return Loader(entries, **{"vocabulary": vocabulary, "seed": 0, "batch": 16, **options})


def rows_of(batch: Batch) -> list[tuple[str, int, int]]:
    corpora = [batch.corpora[number] for number in batch.corpus]
    return list(zip(corpora, batch.parts.tolist(), batch.rows.tolist(), strict=True))


def tokens_of(batch: Batch, modality: str) -> list[list[int]]:
    column = batch.columns[modality]
    pairs = zip(column.offsets[:-1], column.offsets[1:], strict=True)
    return [column.values[first:last].tolist() for first, last in pairs]


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.corpora == other.corpora
    for name in ("slots", "sources", "corpus", "parts", "rows", "crops", "epochs", "keys"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert list(one.columns) == list(other.columns)
    for name, column in one.columns.items():
        np.testing.assert_array_equal(column.values, other.columns[name].values, err_msg=name)
        np.testing.assert_array_equal(column.offsets, other.columns[name].offsets, err_msg=name)
        assert column.values.dtype == other.columns[name].values.dtype


def joined(batches: list[Batch]) -> dict[str, Any]:
    """All that a run sees, without where its batches end."""
    found: dict[str, Any] = {"rows": [row for batch in batches for row in rows_of(batch)]}
    for name in ("slots", "sources", "crops", "epochs", "keys"):
        found[name] = np.concatenate([getattr(batch, name) for batch in batches]).tolist()
    for name in batches[0].columns:
        found[name] = [row for batch in batches for row in tokens_of(batch, name)]
    return found


# -- content ----------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_shards(workspace, frozen: Snapshot) -> None:
    batches = [loader_of(frozen).batch_at(step) for step in range(20)]
    absent: Counter[str] = Counter()
    for batch in batches:
        for modality in ("rgb", "depth", "edges", "caption", "metadata", "palette", "boxes", "text"):
            found = tokens_of(batch, modality)
            for (corpus, part, row), crop, tokens in zip(rows_of(batch), batch.crops.tolist(), found, strict=True):
                grain = crop if (corpus, modality, crop) in workspace.values else None
                values = workspace.values.get((corpus, modality, grain))
                expected = None if values is None else values[part * 16 + row]
                assert tokens == ([] if expected is None else expected.tolist())
                absent[modality] += expected is None
    assert 0 < absent["rgb"] < absent["edges"] < 320


def test_tokens_are_those_that_pyarrow_reads(frozen: Snapshot) -> None:
    tables = {
        (shard.corpus, shard.part, shard.modality, shard.crop): pq.read_table(frozen.storage.full(shard.path))
        for shard in frozen.shards
    }
    batch = loader_of(frozen, batch=200).batch_at(0)
    columns = {name: tokens_of(batch, name) for name in batch.columns}
    for at, (corpus, part, row) in enumerate(rows_of(batch)):
        for name, rows in columns.items():
            table = tables.get((corpus, part, name, int(batch.crops[at]))) or tables.get((corpus, part, name, None))
            expected = None if table is None else table["tokens"][row].as_py()
            assert rows[at] == (expected or [])


def test_columns_have_the_narrow_type_of_the_shards(frozen: Snapshot) -> None:
    batch = loader_of(frozen).batch_at(0)
    assert batch.columns["rgb"].values.dtype == np.uint8
    assert batch.columns["caption"].values.dtype == np.uint16


def test_every_training_row_comes_once_an_epoch_and_held_out_ones_never(frozen: Snapshot) -> None:
    held = {(part.corpus, part.part, row) for part in frozen.parts for row in np.flatnonzero(part.held_out).tolist()}
    loader = loader_of(frozen, batch=frozen.rows - frozen.held_out_rows)
    assert loader.rows == (frozen.rows - frozen.held_out_rows,)
    for epoch in range(2):
        found = Counter(rows_of(loader.batch_at(epoch)))
        assert set(found.values()) == {1}
        assert len(found) == frozen.rows - frozen.held_out_rows
        assert not held & set(found)
    validating = loader_of(frozen, batch=frozen.held_out_rows, held_out=True)
    assert set(rows_of(validating.batch_at(0))) == held


def test_a_mixture_has_its_shares_exactly(frozen: Snapshot, scenes: Snapshot) -> None:
    entries = [
        MixtureEntry(snapshot=frozen, corpora=("documents",), weight=1.0),
        MixtureEntry(snapshot=frozen, corpora=("photos",), weight=2.0),
        MixtureEntry(snapshot=scenes, weight=5.0),
    ]
    loader = loader_of(entries=entries, batch=WINDOW_SLOTS, vocabulary=of_snapshots([frozen, scenes]))
    batch = loader.batch_at(1)
    assert np.bincount(batch.sources).tolist() == [512, 1024, 2560]
    rows = rows_of(batch)
    for source, corpus in enumerate(("documents", "photos", "scenes")):
        own = Counter((int(batch.epochs[at]), *rows[at]) for at in np.flatnonzero(batch.sources == source))
        assert {name for _, name, _, _ in own} == {corpus}
        assert set(own.values()) == {1}


def test_a_modality_without_a_row_s_crop_is_absent_there(tmp_path: Path, token_workspace: Callable[..., Any]) -> None:
    made = token_workspace(tmp_path / "work", {"photos": (30, ("rgb",))}, crops=3, absent={"rgb": 0.0})
    made.add_tokens("photos", "edges", part_rows=16, crops=1)
    made.add_tokens("photos", "palette", part_rows=16)
    snapshot = made.snapshot("s", hold_out=0.0)
    batches = [loader_of(snapshot, batch=30).batch_at(step) for step in range(3)]
    for batch in batches:
        assert (np.diff(batch.columns["rgb"].offsets) == 196).all()
        assert (np.diff(batch.columns["edges"].offsets)[batch.crops > 0] == 0).all()
        assert (np.diff(batch.columns["palette"].offsets) > 0).mean() > 0.7
    assert {crop for batch in batches for crop in batch.crops.tolist()} == {0, 1, 2}
    # Over as many epochs as there are crops a row has had each of them.
    seen = Counter(
        (*row, crop) for batch in batches for row, crop in zip(rows_of(batch), batch.crops.tolist(), strict=True)
    )
    assert len(seen) == 90


def test_long_sequences_are_cut_to_a_window_that_belongs_to_the_row(workspace, frozen: Snapshot) -> None:
    short = of_snapshots([frozen], most_tokens=8)
    loader = loader_of(frozen, vocabulary=short, batch=100)
    whole = loader_of(frozen, batch=100)
    starts = set()
    for step in range(3):
        batch, full = loader.batch_at(step), whole.batch_at(step)
        for tokens, expected in zip(tokens_of(batch, "caption"), tokens_of(full, "caption"), strict=True):
            assert len(tokens) == min(len(expected), 8)
            found = [at for at in range(len(expected) - len(tokens) + 1) if expected[at : at + len(tokens)] == tokens]
            assert found
            starts.update(found if len(expected) > 8 else ())
        assert_equal(batch, loader_of(frozen, vocabulary=short, batch=100).batch_at(step))
    assert len(starts) > 10


# -- order ------------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 40),
    workers=st.integers(0, 3),
    prefetch=st.integers(1, 4),
    stop=st.integers(1, 8),
    other=st.integers(1, 40),
)
def test_the_order_is_the_same_with_any_threads_and_through_any_resume(
    frozen: Snapshot, scenes: Snapshot, batch: int, workers: int, prefetch: int, stop: int, other: int
) -> None:
    snapshots = (frozen, scenes)
    expected = joined([loader_of(*snapshots, batch=400).batch_at(0)])
    with loader_of(*snapshots, batch=batch, workers=workers, prefetch=prefetch) as first:
        batches = list(itertools.islice(first, stop))
        state = json.loads(json.dumps(first.state()))
    assert state["slot"] == batch * stop
    # What resumes may have other threads and batches of another size.
    with loader_of(*snapshots, batch=other, workers=1 if workers == 0 else 0) as second:
        second.load_state(state)
        batches += itertools.islice(second, 3)
    found = joined(batches)
    for name, values in found.items():
        assert values == expected[name][: len(values)]


def test_steps_are_the_batches_of_the_iteration(frozen: Snapshot) -> None:
    with loader_of(frozen, workers=2) as loader:
        for step, batch in enumerate(itertools.islice(loader, 40)):
            assert_equal(batch, loader.batch_at(step))


def test_two_steps_of_four_rows_are_one_of_eight(frozen: Snapshot) -> None:
    small, large = loader_of(frozen, batch=4), loader_of(frozen, batch=8)
    for step in range(5):
        two = [small.batch_at(2 * step), small.batch_at(2 * step + 1)]
        assert joined(two) == joined([large.batch_at(step)])


def test_snapshots_that_differ_in_one_labeler_see_the_same_rows(workspace, frozen: Snapshot) -> None:
    workspace.add_tokens("photos", "depth", part_rows=16, crops=3, seed=1)
    other = workspace.snapshot("better-depth", hold_out=0.2)
    fewer = workspace.snapshot(
        "no-palette", hold_out=0.2, modalities=[m.modality for m in frozen.modalities if m.modality != "palette"]
    )
    assert other.sha256 != frozen.sha256
    for step in range(5):
        batch, with_other, with_fewer = (loader_of(s).batch_at(step) for s in (frozen, other, fewer))
        for found in (with_other, with_fewer):
            assert rows_of(found) == rows_of(batch)
            assert tokens_of(found, "rgb") == tokens_of(batch, "rgb")
            np.testing.assert_array_equal(found.keys, batch.keys)
        assert tokens_of(with_other, "depth") != tokens_of(batch, "depth")
        assert "palette" not in with_fewer.columns


def test_seeds_have_orders_of_their_own(frozen: Snapshot) -> None:
    assert rows_of(loader_of(frozen, seed=1).batch_at(0)) != rows_of(loader_of(frozen).batch_at(0))


def test_an_iteration_that_begins_ends_the_one_before(frozen: Snapshot) -> None:
    loader = loader_of(frozen, workers=1)
    first = iter(loader)
    one = next(first)
    second = iter(loader)
    assert next(second).slots[0] == one.slots[-1] + 1
    with pytest.raises(StopIteration):
        next(first)
    loader.close()


# -- state ------------------------------------------------------------------------------------------------------------


def test_the_state_is_a_few_plain_values(frozen: Snapshot, scenes: Snapshot) -> None:
    entries = [MixtureEntry(snapshot=frozen, corpora=("photos",), weight=2), MixtureEntry(snapshot=scenes)]
    loader = loader_of(entries=entries, seed=7)
    next(iter(loader))
    assert loader.state() == {
        "seed": 7,
        "batch": 16,
        "slot": 16,
        "snapshots": [frozen.sha256, scenes.sha256],
        "corpora": [["photos"], None],
        "weights": [2.0, 1.0],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 1, this run has 0"),
        ({"snapshots": ["0" * 64]}, "snapshots"),
        ({"weights": [2.0]}, r"weights \[2.0\]"),
        ({"corpora": [["scenes"]]}, "corpora"),
        ({"slot": -1}, "slot -1"),
        ({"slot": None}, "slot None"),
    ],
)
def test_a_state_of_another_run_is_refused(frozen: Snapshot, change: dict[str, Any], message: str) -> None:
    loader = loader_of(frozen)
    with pytest.raises(ConfigError, match=message):
        loader.load_state({**loader.state(), **change})
    assert loader.state()["slot"] == 0


# -- held out ---------------------------------------------------------------------------------------------------------


def test_held_out_rows_come_once_in_a_fixed_order(frozen: Snapshot) -> None:
    batches = list(loader_of(frozen).held_out_batches(10**9))
    assert [len(batch) for batch in batches[:-1]] == [16] * (len(batches) - 1)
    assert 0 < len(batches[-1]) <= 16
    found = Counter(row for batch in batches for row in rows_of(batch))
    expected = {(p.corpus, p.part, row) for p in frozen.parts for row in np.flatnonzero(p.held_out).tolist()}
    assert found == dict.fromkeys(expected, 1)
    for batch in batches:
        assert not batch.crops.any()
        assert not batch.epochs.any()
    assert np.concatenate([batch.slots for batch in batches]).tolist() == list(range(len(expected)))
    # The order is of the rows alone: not of the run's seed, its batches, or the rows that the loader itself is for.
    for options in ({"seed": 5}, {"batch": 7}, {"held_out": True}):
        assert joined(list(loader_of(frozen, **options).held_out_batches(10**9))) == joined(batches)
    assert list(loader_of(frozen).held_out_batches(0)) == []
    some = list(loader_of(frozen).held_out_batches(20))
    assert [len(batch) for batch in some] == [16, 4]
    assert joined(some)["keys"] == joined(batches)["keys"][:20]


def test_held_out_rows_of_two_entries_of_a_snapshot_come_once(frozen: Snapshot) -> None:
    entries = [MixtureEntry(snapshot=frozen, corpora=("scenes", "photos")), MixtureEntry(snapshot=frozen, weight=3.0)]
    batches = list(loader_of(entries=entries).held_out_batches(10**9))
    found = Counter(row for batch in batches for row in rows_of(batch))
    assert set(found.values()) == {1}
    assert len(found) == frozen.held_out_rows
    sources = np.concatenate([batch.sources for batch in batches])
    names = np.array([corpus for batch in batches for corpus, _, _ in rows_of(batch)])
    assert set(names[sources == 1]) == {"documents"}
    # Interleaved: both are among the first.
    assert set(sources[: len(sources) // 2].tolist()) == {0, 1}


def test_without_held_out_rows_there_is_nothing_to_validate_with(scenes: Snapshot) -> None:
    with pytest.raises(ConfigError, match=r"#scenes: no row is held out .* --hold-out 0.02"):
        loader_of(scenes).held_out_batches(10)
    with pytest.raises(ConfigError, match=r"#scenes has no rows held out; .* --hold-out 0.02"):
        loader_of(scenes, held_out=True)


def test_without_rows_to_train_on_there_is_no_loader(workspace, frozen: Snapshot) -> None:
    held = workspace.snapshot("nearly-all-held-out", where="corpus = 'scenes'", hold_out=1 - 1e-9)
    with pytest.raises(ConfigError, match=r"held-out has no rows to train on in scenes; .* smaller --hold-out"):
        loader_of(entries=[MixtureEntry(snapshot=held, corpora=("scenes",))])


# -- errors and threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["batch", "workers", "prefetch"])
def test_numbers_that_cannot_be_are_refused(frozen: Snapshot, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is -1"):
        loader_of(frozen, **{option: -1})


def test_a_vocabulary_of_another_tokenizer_is_refused(frozen: Snapshot) -> None:
    document = of_snapshots([frozen]).document()
    document["modalities"][0]["digest"] = "f" * 64
    name = document["modalities"][0]["name"]
    with pytest.raises(ConfigError, match=rf"modality '{name}' of .*#all .*-ffffffffffff"):
        loader_of(frozen, vocabulary=Vocabulary.from_document(document))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_shard_is_raised_at_its_own_batch(
    tmp_path: Path, token_workspace: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))
    made = token_workspace(tmp_path / "work", {"photos": (64, ("rgb", "caption"))}, crops=1)
    snapshot = made.snapshot("s", hold_out=0.0)
    broken = next(shard for shard in snapshot.shards if shard.part == 2 and shard.modality == "rgb")
    whole = Path(snapshot.storage.full(broken.path)).read_bytes()
    Path(snapshot.storage.full(broken.path)).write_bytes(b"gone bad")
    loader = loader_of(snapshot, batch=2, workers=workers)
    good = 0

    def consume() -> None:
        nonlocal good
        for batch in loader:
            assert 2 not in batch.parts
            good += 1

    with pytest.raises(ShardError, match=broken.path):
        consume()
    assert loader.state()["slot"] == 2 * good
    with pytest.raises(ShardError, match=broken.path):
        loader.batch_at(good)
    # Mended, the run goes on where it stopped.
    Path(snapshot.storage.full(broken.path)).write_bytes(whole)
    assert 2 in next(iter(loader)).parts
    loader.close()


def test_tokens_beyond_the_vocabulary_are_refused(frozen: Snapshot) -> None:
    document = of_snapshots([frozen]).document()
    rgb = next(fields for fields in document["modalities"] if fields["name"] == "rgb")
    rgb["vocabulary"] = 20
    with pytest.raises(ShardError, match=r"/rgb/.*holds token \d+, expected 0..19 of 'rgb'"):
        loader_of(frozen, vocabulary=Vocabulary.from_document(document)).batch_at(0)
    rgb |= {"vocabulary": 64, "tokens": 100}
    with pytest.raises(ShardError, match=r"/rgb/.*a row has 196 tokens, expected 100"):
        loader_of(frozen, vocabulary=Vocabulary.from_document(document)).batch_at(0)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("modmill-loader")]


def test_threads_end_with_the_loader(frozen: Snapshot) -> None:
    with loader_of(frozen, workers=3, batch=1) as loader:
        for batch in loader:
            assert threads()
            if batch.slots[0] > 20:
                break
    assert threads() == []


def test_threads_end_when_the_one_who_asks_is_interrupted(frozen: Snapshot) -> None:
    def consume() -> None:
        with loader_of(frozen, workers=2) as loader:
            for _ in loader:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert threads() == []


def test_no_more_is_made_ahead_than_asked_for(frozen: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_BLOCK_ROWS", 16)
    made: list[int] = []
    loader = loader_of(frozen, workers=1, prefetch=3)
    slots = loader._slots
    monkeypatch.setattr(loader, "_slots", lambda slot, count: (made.append(slot), slots(slot, count))[1])
    batches = iter(loader)
    next(batches)
    loader.close()
    assert len(made) <= 4


# -- the door, and what training needs --------------------------------------------------------------------------------


def test_the_door_opens_a_loader(workspace, frozen: Snapshot) -> None:
    with modmill.open(workspace.uri) as opened, opened.loader("all", batch=16, seed=0) as loader:
        assert_equal(loader.batch_at(3), loader_of(frozen).batch_at(3))
    with modmill.open(workspace.uri) as opened, opened.loader("all", batch=5, corpora=["scenes"], workers=1) as loader:
        assert {corpus for corpus, _, _ in rows_of(next(iter(loader)))} == {"scenes"}


HIDDEN = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "duckdb", "tokenizers", "click", "rich", "transformers"}:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Blocked())
from manifests.snapshots.snapshot import open_snapshot
from train.data.loader import Loader
from train.data.mixture import MixtureEntry
from train.data.vocabulary import of_snapshots
snapshot = open_snapshot(sys.argv[1])
with Loader([MixtureEntry(snapshot=snapshot)], vocabulary=of_snapshots([snapshot]), seed=0, batch=16, workers=1) as loader:
    batch = next(iter(loader))
print(batch.keys.tolist(), int(batch.columns["rgb"].values.sum()), batch.columns["caption"].values.tolist())
"""


def test_training_loads_batches_without_ray_and_duckdb(frozen: Snapshot) -> None:
    command = [sys.executable, "-c", HIDDEN, frozen.uri]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    batch = loader_of(frozen).batch_at(0)
    rgb, caption = batch.columns["rgb"].values, batch.columns["caption"].values
    assert done.stdout.strip() == f"{batch.keys.tolist()} {int(rgb.sum())} {caption.tolist()}"
