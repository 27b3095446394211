"""Rows written aside: a killed item goes on from there, to the same bytes."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from engine.plan.items import WorkItem
from engine.work import spill
from engine.work.shard import ShardOutput
from manifests.errors import ShardError
from manifests.store.storage import open_storage
from tests.engine.faulty import RED, files, item_of, worker_of

MODALITIES = {
    "rgb": {"keep": True, "tokens": False, "labeler": "tests.engine.faulty:Faulty"},
    "metadata": {"tokens": False},
    "palette": {"tokens": False},
}


@pytest.fixture
def source(tmp_path: Path, make_photos) -> Path:
    """Photographs, of which one cannot be decoded."""
    folder = make_photos(tmp_path / "photos", 12)
    (folder / "broken.jpg").write_bytes((folder / "photo000.jpg").read_bytes()[:3000])
    Image.new("RGB", (200, 180), RED).save(folder / "red.png")
    return folder


class Killed(BaseException):
    """What a kill looks like to whoever waits for the worker."""


def killed_after(item: WorkItem, workspace: Path, spills: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does the item, spilling after each batch, until every shard has spilled so often."""
    count = 0
    whole = ShardOutput.spill

    def counted(output: ShardOutput) -> None:
        nonlocal count
        whole(output)
        count += 1
        if count == spills * len(item.targets):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ShardOutput, "spill", counted)
        with pytest.raises(Killed):
            worker_of(workspace, spill_after_s=0.0, decode_threads=1).work(item)


def test_an_item_goes_on_from_its_spill(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = item_of(tmp_path / "quiet", source, MODALITIES, crops=2)
    worker_of(tmp_path / "quiet").work(quiet)
    calls = tmp_path / "calls"
    workspace = tmp_path / "w"
    item = item_of(workspace, source, MODALITIES, crops=2)
    killed_after(item, workspace, 2, monkeypatch)
    storage = open_storage(workspace)
    assert not files(storage)
    hidden = files(storage, hidden=True)
    assert len(hidden) == 3 * len(item.targets)
    assert all(path.endswith(".tmp") for path in hidden)
    keys = [sample.key for sample in _samples(workspace, item)]
    found = [spill.read(storage, spill.path_of(item, target), keys) for target in item.targets]
    assert {len(rows) for rows in found} == {8}
    # What is spilled is not labeled again.
    done = []
    monkeypatch.setattr(
        "tests.engine.faulty.Faulty.label",
        lambda self, batch: done.append(int(batch["image"].any(axis=(1, 2, 3)).sum())) or {"rgb": list(batch["image"])},
    )
    worker_of(workspace).work(item)
    assert sum(done) <= 2 * 6
    assert files(workspace) == files(tmp_path / "quiet")
    assert not [path for path in files(storage, hidden=True)]
    assert not [file.path for file in storage.walk("data") if ".spill" in file.path]
    assert not calls.exists()


def _samples(workspace: Path, item: WorkItem) -> list:
    from manifests.formats import shards

    return shards.read_samples(open_storage(workspace).read(item.part.path))


def test_another_item_or_a_damaged_spill_is_begun_anew(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "w"
    item = item_of(workspace, source, MODALITIES)
    killed_after(item, workspace, 1, monkeypatch)
    storage = open_storage(workspace)
    keys = [sample.key for sample in _samples(workspace, item)]
    target = item.targets[0]
    path = spill.path_of(item, target)
    assert len(spill.read(storage, path, keys)) == 4
    selected = replace(item, selected=b"\xff\xff")
    assert spill.path_of(selected, target) != path
    assert spill.read(storage, path, keys[::-1]) == []
    assert spill.read(storage, "data/photos/rgb/nothing/.spill-part-0000009", keys) == []
    data = next(name for name in files(storage, hidden=True) if name.startswith(path) and "failed" not in name)
    (workspace / data).write_bytes((workspace / data).read_bytes()[:-700])
    assert spill.read(storage, path, keys) == []
    (workspace / f"{path}.json.tmp").write_text("{")
    assert spill.read(storage, path, keys) == []
    spill.remove(storage, path)
    worker_of(workspace).work(item)
    quiet = item_of(tmp_path / "quiet", source, MODALITIES)
    worker_of(tmp_path / "quiet").work(quiet)
    assert files(workspace) == files(tmp_path / "quiet")


def test_a_base_that_was_altered_is_refused(tmp_path: Path, source: Path) -> None:
    workspace = tmp_path / "w"
    item = item_of(workspace, source, MODALITIES)
    records = worker_of(workspace).work(item).records
    base = dict(zip(item.targets, records, strict=True))
    path = workspace / records[1].path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match="its sha256 is not the one in the log"):
        worker_of(workspace).work(replace(item, base=base, retry=frozenset(("DecodeError",))))
