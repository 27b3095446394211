"""A worker on its own: what it makes, whatever labelers, memory and earlier attempts do to it."""

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.plan.items import Attempt, Beat, Failure, WorkItem
from engine.work import marks
from manifests.errors import DeadlineExceeded
from manifests.formats import shards
from manifests.formats.shards import Status
from manifests.log.actions import ShardAdded
from manifests.store.storage import open_storage
from tests.engine.faulty import RED, attempt, files, item_of, worker_of

LIGHT = {
    "rgb": {"keep": True, "tokens": False},
    "edges": {"keep": True, "tokens": False},
    "metadata": {"tokens": False},
    "palette": {"tokens": False},
    "caption": {"tokens": False},
}


def faulty(**parameters: Any) -> dict[str, Any]:
    options = {"labeler": "tests.engine.faulty:Faulty", "parameters": parameters, "keep": True, "tokens": False}
    return {"rgb": options, "metadata": {"tokens": False}}


@pytest.fixture
def source(tmp_path: Path, make_photos) -> Path:
    """Ten photographs, one of which is all red."""
    folder = make_photos(tmp_path / "photos", 9)
    Image.new("RGB", (200, 180), RED).save(folder / "red.png")
    return folder


def rows(workspace: Path, record: ShardAdded) -> shards.ShardRows:
    with open_storage(workspace).open(record.path) as file:
        return shards.read_tar(file) if record.format == "webdataset" else shards.read_parquet(file)


def red_row(workspace: Path, item: WorkItem) -> int:
    samples = shards.read_samples(open_storage(workspace).read(item.part.path))
    return next(sample.row for sample in samples if sample.source == "red.png")


def make(workspace: Path, item: WorkItem, **settings: Any) -> dict[str, ShardAdded]:
    result = worker_of(workspace, **settings).work(item)
    return {record.modality: record for record in result.records}


def test_an_item_is_made_and_what_it_took_is_told(tmp_path: Path, source: Path) -> None:
    item = item_of(tmp_path / "w", source, LIGHT, crops=2)
    beats: list[Beat] = []
    worker = worker_of(tmp_path / "w")
    worker.prefetch(item)
    result = worker.work(item, beats.append)
    assert [(record.modality, record.crop) for record in result.records] == [
        (target.modality, target.crop) for target in item.targets
    ]
    assert all(record.rows == record.ok + record.absent == 10 for record in result.records)
    assert set(result.seconds_by_labeler) == {"rgb", "edges", "metadata", "palette", "caption"}
    assert result.seconds["total"] >= result.seconds["label"] > 0
    assert 0 < result.busy <= 1
    assert result.rss_bytes > 1 << 20
    assert {record.micro_batch for record in result.records} == {4}
    assert next(record for record in result.records if record.modality == "rgb").metrics
    # Other threads, other batches of decode, the same bytes.
    again = worker_of(tmp_path / "w", decode_threads=1, queue_bytes=1).work(item)
    assert [record.sha256 for record in again.records] == [record.sha256 for record in result.records]


def test_a_worker_of_light_labelers_does_without_torch(tmp_path: Path, source: Path) -> None:
    item_of(tmp_path / "w", source, LIGHT)
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.engine.faulty import item_of, worker_of\n"
        "import engine.work.worker\nassert 'torch' not in sys.modules, 'torch'\n"
        f"work = Path({str(tmp_path / 'w')!r})\n"
        f"worker_of(work).work(item_of(work, Path({str(source)!r}), {LIGHT!r}))\n"
        "heavy = {'torch', 'transformers', 'ray', 'skimage', 'scipy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", ["raise", "raise all", "short", "wrong shape"])
def test_rows_that_a_labeler_cannot_do_become_failed_rows(tmp_path: Path, source: Path, how: str) -> None:
    item = item_of(tmp_path / "w", source, faulty(how=how))
    record = make(tmp_path / "w", item)["rgb"]
    assert record.failed == (1 if how == "raise" else 10)
    assert record.failed_path is not None
    if how == "raise":
        assert rows(tmp_path / "w", record).statuses[red_row(tmp_path / "w", item)] == Status.FAILED


def test_tensors_are_checked_and_written_as_arrays_are(tmp_path: Path, source: Path) -> None:
    as_tensors = item_of(tmp_path / "a", source, faulty(how="tensor"))
    as_arrays = item_of(tmp_path / "b", source, faulty())
    first, second = make(tmp_path / "a", as_tensors)["rgb"], make(tmp_path / "b", as_arrays)["rgb"]
    assert first.sha256 == second.sha256
    maps = {"normals": {"labeler": "tests.engine.faulty:Maps", "keep": True, "tokens": False}}
    item = item_of(tmp_path / "c", source, maps)
    record = make(tmp_path / "c", item)["normals"]
    assert (record.failed, record.ok) == (1, 9)
    found = rows(tmp_path / "c", record)
    assert found.statuses[red_row(tmp_path / "c", item)] == Status.FAILED


def test_lack_of_memory_halves_the_calls_and_is_told(tmp_path: Path, source: Path) -> None:
    log = tmp_path / "calls"
    plenty = make(tmp_path / "a", item_of(tmp_path / "a", source, faulty()))["rgb"]
    item = item_of(tmp_path / "b", source, faulty(most=1, log=str(log)))
    worker = worker_of(tmp_path / "b")
    record = worker.work(item).records[0]
    assert (record.micro_batch, record.failed) == (1, 0)
    assert record.sha256 == plenty.sha256
    sizes = [int(line.split()[0]) for line in log.read_text().splitlines()]
    assert sizes[:3] == [4, 2, 1]
    assert set(sizes[3:]) == {1}
    # It remembers, and obeys what the driver learned.
    log.unlink()
    worker.work(item)
    assert {int(line.split()[0]) for line in log.read_text().splitlines()} == {1}
    log.unlink()
    assert make(tmp_path / "b", attempt(item, batch=1))["rgb"].micro_batch == 1
    assert {int(line.split()[0]) for line in log.read_text().splitlines()} == {1}
    # Where one row alone is too much, the row fails.
    none = make(tmp_path / "c", item_of(tmp_path / "c", source, faulty(most=0)))["rgb"]
    assert none.failed == 10


def test_photographs_go_to_their_labelers_in_batches(tmp_path: Path, source: Path) -> None:
    modalities = {"caption": {"labeler": "tests.engine.faulty:Photos", "tokens": False}}
    item = item_of(tmp_path / "w", source, modalities)
    record = make(tmp_path / "w", item)["caption"]
    found = rows(tmp_path / "w", record)
    assert record.failed == 1
    assert found.values is not None
    assert [value[-1] for value in found.values if value].count("3") >= 3
    # Nothing but the bytes of photographs bounds the calls: with room for one, each is alone.
    alone = make(tmp_path / "w", item, queue_bytes=1)["caption"]
    assert {value[-1] for value in rows(tmp_path / "w", alone).values or [] if value} == {"1"}


def test_killers_are_not_touched_and_suspects_go_alone(tmp_path: Path, source: Path) -> None:
    log = tmp_path / "calls"
    modalities = faulty(log=str(log))
    item = item_of(tmp_path / "w", source, modalities)
    undisturbed = make(tmp_path / "w", item)
    row = red_row(tmp_path / "w", item)
    log.unlink()
    again = make(tmp_path / "w", attempt(item, strikes=2, suspects=tuple(range(10))))
    assert {name: record.sha256 for name, record in again.items()} == {
        name: record.sha256 for name, record in undisturbed.items()
    }
    assert {line.split()[1] for line in log.read_text().splitlines()} == {"1"}
    assert marks.read(open_storage(tmp_path / "w"), "run-1", item.name) is None
    killers = {row: Failure("label", "WorkerDied", "it died")}
    without = make(tmp_path / "w", attempt(item, strikes=1, killers=killers))
    assert {record.failed for record in without.values()} == {1}
    before, after = rows(tmp_path / "w", undisturbed["rgb"]), rows(tmp_path / "w", without["rgb"])
    assert before.values is not None
    assert after.values is not None
    assert [value for number, value in enumerate(before.values) if number != row] == [
        value for number, value in enumerate(after.values) if number != row
    ]
    assert after.statuses[row] == Status.FAILED


def test_rows_of_the_base_are_kept_and_only_the_others_made(tmp_path: Path, source: Path) -> None:
    log = tmp_path / "calls"
    workspace = tmp_path / "w"
    item = item_of(workspace, source, faulty(log=str(log)))
    whole = make(workspace, item)
    some = np.packbits(np.arange(10) < 6).tobytes()
    part = make(workspace, replace(item, selected=some))
    assert {(record.not_selected, record.ok) for record in part.values()} == {(4, 6)}
    base = {target: part[target.modality] for target in item.targets}
    log.unlink()
    grown = make(workspace, replace(item, base=base))
    assert {name: record.sha256 for name, record in grown.items()} == {
        name: record.sha256 for name, record in whole.items()
    }
    assert sum(int(line.split()[1]) for line in log.read_text().splitlines()) == 4
    # With another selection, what is there stays there.
    other = np.packbits(np.arange(10) >= 8).tobytes()
    both = make(workspace, replace(item, base=base, selected=other))["rgb"]
    assert rows(workspace, both).statuses == [0] * 6 + [3] * 2 + [0] * 2


def test_failed_rows_are_made_again_by_class(tmp_path: Path, source: Path) -> None:
    workspace = tmp_path / "w"
    bad = make(workspace, item_of(workspace, source, faulty(how="raise")))
    # The same labeler, mended: its fingerprint does not tell.
    item = item_of(workspace, source, faulty())
    base = {target: bad[target.modality] for target in item.targets}
    kept = make(workspace, replace(item, base=base, retry=frozenset(("DecodeError",))))["rgb"]
    assert (kept.failed, kept.failed_sha256) == (1, bad["rgb"].failed_sha256)
    mended = make(workspace, replace(item, base=base, retry=frozenset(("RuntimeError",))))["rgb"]
    assert mended.failed == 0
    assert mended.sha256 == make(workspace, item)["rgb"].sha256


def test_labels_of_a_fit_are_the_same_after_a_death_but_for_what_kills(tmp_path: Path, source: Path) -> None:
    item = item_of(tmp_path / "w", source, LIGHT)
    worker = worker_of(tmp_path / "w")
    samples = shards.read_samples(worker.storage.read(item.part.path))
    targets = [target for target in item.targets if target.modality == "edges"]

    def made(first: int, learned: Attempt) -> dict[str, np.ndarray]:
        batches = worker.labels(item.plan, samples, targets, name="edges", first=first, attempt=learned)
        return {labels.key: labels.crop[0]["edges"].value for batch in batches for labels in batch}

    plain = made(0, Attempt())
    again = made(100, Attempt(strikes=2, suspects=(103, 101, 108), batch=2))
    failure = Failure(stage="label", class_name="WorkerDied", message="")
    without = made(0, Attempt(strikes=1, suspects=(5,), killers={3: failure}))
    keys = [sample.key for sample in samples]
    assert [list(found) for found in (plain, again, without)] == [keys, keys, [*keys[:3], *keys[4:]]]
    for found in (again, without):
        assert all(np.array_equal(value, plain[key]) for key, value in found.items())
    mark = marks.read(worker.storage, "run-1", "edges")
    assert mark is not None
    assert (mark.rows, mark.doing) == ((), "between batches")


def test_a_batch_that_hangs_is_told_in_this_process(tmp_path: Path, source: Path) -> None:
    item = item_of(tmp_path / "w", source, faulty(how="hang"))
    worker = worker_of(tmp_path / "w", batch_deadline_s=1.0)
    with pytest.raises(DeadlineExceeded, match=r"took over 1 s, the last of it at tests.engine.faulty:Faulty"):
        worker.work(item)
    mark = marks.read(open_storage(tmp_path / "w"), "run-1", item.name)
    assert mark is not None
    assert mark.reason == "deadline"
    assert red_row(tmp_path / "w", item) in mark.rows
    assert [thread.name for thread in threading.enumerate() if thread.name == "item" and not thread.daemon] == []


@pytest.mark.parametrize("how", ["hang", "kill"])
def test_a_worker_of_its_own_ends_and_leaves_a_mark(tmp_path: Path, source: Path, how: str) -> None:
    workspace = tmp_path / "w"
    item = item_of(workspace, source, faulty(how=how))
    row = red_row(workspace, item)
    deadline_s = 8.0 if how == "hang" else 60.0
    program = (
        "from dataclasses import replace\nfrom pathlib import Path\n"
        "from tests.engine.faulty import SETTINGS, attempt, item_of\nfrom engine.work.worker import Worker\n"
        f"work = Path({str(workspace)!r})\nitem = item_of(work, Path({str(source)!r}), {faulty(how=how)!r})\n"
        f"worker = Worker(str(work), replace(SETTINGS, batch_deadline_s={deadline_s}), own_process=True)\n"
        f"worker.work(attempt(item, strikes=1, suspects=({row},)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == (marks.DEADLINE_EXIT if how == "hang" else 9), done.stderr
    mark = marks.read(open_storage(workspace), "run-1", item.name)
    reason = "deadline" if how == "hang" else None
    assert mark == marks.Mark(rows=(row,), doing="tests.engine.faulty:Faulty", reason=reason)
    assert not files(workspace)


def test_a_scaled_decode_is_another_input_and_keeps_the_true_size(tmp_path: Path, make_photos) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (900, 1300, 3), np.uint8)
    Image.fromarray(noise).save(source / "a.jpg")
    modalities = {
        "caption": {"labeler": "tests.engine.faulty:Photos", "tokens": False},
        "metadata": {"tokens": False},
        "rgb": {"keep": True, "tokens": False},
    }
    full = item_of(tmp_path / "a", source, modalities)
    scaled = item_of(tmp_path / "b", source, modalities, decode_short=300)
    assert {target.fingerprint for target in full.targets}.isdisjoint(target.fingerprint for target in scaled.targets)
    assert scaled.plan.modalities["rgb"].label.inputs == {"image": "decoder-1-short300"}
    records = make(tmp_path / "b", scaled)
    caption, metadata = (rows(tmp_path / "b", records[name]).values for name in ("caption", "metadata"))
    assert caption == ["650x450 of 1300x900 in 1"]
    assert metadata is not None
    assert (metadata[0]["original_width"], metadata[0]["original_height"]) == (1300, 900)
    json.dumps(metadata)
