"""Marks: written, read, cleared; what is broken counts as none."""

import time
from pathlib import Path

from engine.work import marks
from engine.work.marks import AtHand, Mark
from manifests.store import paths
from manifests.store.storage import open_storage


def test_a_mark_is_read_as_it_was_written(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    name = "photos/0000003/light"
    assert marks.read(storage, "run-1", name) is None
    for mark in (Mark(rows=(1, 2), doing="decode"), Mark(rows=(7,), doing="edges", reason="deadline")):
        marks.write(storage, "run-1", name, mark)
        assert marks.read(storage, "run-1", name) == mark
    assert [file.path for file in storage.walk("runs")] == ["runs/run-1/marks/photos+0000003+light.json"]
    for broken in (b"", b"{}", b"[1]", b'{"rows": 3, "doing": "x", "reason": null}'):
        storage.replace(paths.mark("run-1", name), broken)
        assert marks.read(storage, "run-1", name) is None
    marks.clear(storage, "run-1", name)
    marks.clear(storage, "run-1", name)
    assert not storage.names("runs/run-1/marks")


def test_what_is_at_hand_is_marked_where_asked_and_has_a_deadline(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    silent = AtHand(storage, "run-1", "a/0", writes=False)
    silent.begin([0, 1])
    assert marks.read(storage, "run-1", "a/0") is None
    assert silent.overdue(60) is None
    time.sleep(0.002)
    assert silent.overdue(0.001) == Mark(rows=(0, 1), doing="decode", reason="deadline")
    silent.end()
    assert silent.overdue(0) is None
    at_hand = AtHand(storage, "run-1", "a/1", writes=True)
    at_hand.begin([4, 5])
    assert marks.read(storage, "run-1", "a/1") == Mark(rows=(4, 5), doing="decode")
    at_hand.doing("edges", [5])
    assert marks.read(storage, "run-1", "a/1") == Mark(rows=(5,), doing="edges")
    at_hand.finish()
    assert marks.read(storage, "run-1", "a/1") is None
