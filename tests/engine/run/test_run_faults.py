"""A whole run while the world fails: killed at every step of a commit, on a store that answers badly, on a full disk."""

import json
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from engine.pipeline import config as pipeline
from engine.run import job
from engine.upkeep import verify as verifying
from manifests.catalog.catalog import Catalog
from manifests.errors import ModmillError
from manifests.store.storage import open_storage
from tests.manifests.crash_driver import COMMIT_POINTS, FILE_POINTS
from tests.manifests.log.test_damage import SmallDisk, small_disk  # noqa: F401
from tests.manifests.store.test_object_stores import spoiled, start_faults  # noqa: F401

PIPELINE = """
workspace: {workspace}
corpora:
  photos:
    source: {source}
    part_rows: 4
    modalities: {{rgb: {{keep: true, tokens: false}}, metadata: {{tokens: false}}, caption: {{tokens: false}}}}
engine: {{runner: local, workers: 1, batch: 4, max_failed_fraction: 1}}
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, make_photos) -> tuple[Path, dict[str, bytes]]:
    """A pipeline file beside its photographs, one of them broken, and the files that a quiet run makes."""
    folder = tmp_path_factory.mktemp("faults")
    photos = make_photos(folder / "photos", 6)
    whole = (photos / "photo000.jpg").read_bytes()
    (photos / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    file = folder / "pipeline.yaml"
    file.write_text(PIPELINE.format(workspace=folder / "work", source=photos))
    job.run(pipeline.load(file), quiet=True)
    return file, files_of(str(folder / "work"))


def files_of(uri: str) -> dict[str, bytes]:
    """Shards, failed files and samples files by path."""
    storage = open_storage(uri)
    wanted = (".parquet", ".tar")
    found = (file.path for file in storage.walk("data"))
    return {
        path: storage.read(path)
        for path in found
        if path.endswith(wanted) and not path.rpartition("/")[2].startswith(".")
    }


def verified(uri: str) -> None:
    with Catalog.open(uri) as catalog:
        assert verifying.verify(catalog).findings == []


KILLED_AT_POINTS = """
import json, os, sys
from pathlib import Path
import cv2, numpy, pandas, pyarrow.parquet
import labelers.rgb, labelers.metadata, labelers.caption
from engine.pipeline import config
from engine.run import job
from engine.run.runners import local
from engine.work import worker
from tests.manifests import crash_driver

class Kill:
    def __init__(self, point):
        self.point = point
    def passes(self, point):
        if point == self.point:
            os._exit(137)

file, folder, *points = sys.argv[1:]
said = {}
for number, point in enumerate(points):
    codes = []
    for life in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if life == 0:
                    crash_driver.place(Kill(point))
                job.run(config.load(Path(file), [f"workspace={folder}/{number}"]), quiet=True)
                status = 0
            finally:
                os._exit(status)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if codes[-1] == 0:
            break
    said[point] = codes
print(json.dumps(said))
"""
POINTS = (*(point for point in FILE_POINTS if "log entry" not in point), *COMMIT_POINTS[:2], "log entry linked")


def test_killed_at_every_step_of_a_commit_the_next_run_makes_the_same_bytes(tmp_path: Path, undisturbed) -> None:
    """Of a shard, its failed file and sidecar, and of the log's entry: each is passed, and the run that follows ends."""
    file, expected = undisturbed
    command = [sys.executable, "-c", KILLED_AT_POINTS, str(file), str(tmp_path), *POINTS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == {point: [137, 0] for point in POINTS}
    for number in range(len(POINTS)):
        assert files_of(str(tmp_path / str(number))) == expected, POINTS[number]
    verified(str(tmp_path / "0"))


@pytest.mark.usefixtures("s3_bucket")
def test_a_store_that_answers_badly_changes_nothing(s3_bucket: str, spoiled, undisturbed) -> None:  # noqa: F811
    """503, timeouts, resets, cut bodies and slow answers in a fifth of all requests, for source and workspace alike."""
    file, expected = undisturbed
    source = open_storage(f"{s3_bucket}/{secrets.token_hex(8)}")
    for path in sorted((file.parent / "photos").iterdir()):
        source.put(path.name, path.read_bytes())
    workspace = f"{s3_bucket}/{secrets.token_hex(8)}"
    start_faults(spoiled, 0.2, seed=3)
    overrides = [f"workspace={workspace}", f"corpora.photos.source={source.uri}"]
    job.run(pipeline.load(file, overrides), quiet=True)
    spoiled.share = 0
    assert spoiled.faults.total() > 10
    assert files_of(workspace) == expected
    verified(workspace)


@pytest.fixture
def filled(small_disk: SmallDisk) -> SmallDisk:  # noqa: F811
    small_disk.fill(leave_bytes=160 << 10)
    return small_disk


def test_a_full_disk_stops_the_run_and_the_next_one_goes_on(filled: SmallDisk, undisturbed) -> None:
    file, expected = undisturbed
    work = filled.folder / "work"
    with pytest.raises((ModmillError, OSError), match="No space left"):
        job.run(pipeline.load(file, [f"workspace={work}"]), quiet=True)
    filled.empty()
    job.run(pipeline.load(file, [f"workspace={work}"]), quiet=True)
    assert files_of(str(work)) == expected
    verified(str(work))
