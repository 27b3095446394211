"""Runs on a real Ray whose workers are killed, hang and lose their nodes: every row is accounted for, bytes are the same."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.pipeline import config as pipeline
from engine.run import job
from engine.upkeep import verify as verifying
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError

pytestmark = pytest.mark.ray

PIPELINE = """
workspace: {folder}/work
corpora:
  photos:
    source: {photos}
    part_rows: 4
    modalities:
      palette: {{labeler: "deadly:Deadly", tokens: false, parameters: {{orders: {folder}/orders.json}}}}
engine: {{batch: 2, max_failed_fraction: 0.9}}
"""


class Place:
    """A folder with a pipeline over photographs, and orders for its labeler (`tests/data/own_labelers/deadly.py`)."""

    def __init__(self, folder: Path, photos: Path) -> None:
        self.folder = folder
        self.pipeline = folder / "pipeline.yaml"
        self.pipeline.write_text(PIPELINE.format(folder=folder, photos=photos))
        self.order({})

    def order(self, orders: dict[str, Any]) -> None:
        new = self.folder / "orders.new"
        new.write_text(json.dumps(orders))
        new.replace(self.folder / "orders.json")

    def run(self, *overrides: str, runner: str = "ray", steps: Sequence[job.Step] = job.STEPS) -> job.Done:
        config = pipeline.load(self.pipeline, [f"engine.runner={runner}", *overrides])
        return job.run(config, quiet=True, steps=steps)

    def shards(self, work: str = "work") -> dict[str, bytes]:
        folder = self.folder / work / "data/photos/palette"
        return {path.name: path.read_bytes() for path in sorted(folder.rglob("part-*.parquet"))}

    def pids(self) -> list[int]:
        """The processes that labeled, in the order of their first call."""
        path = self.folder / "pids"
        return list(dict.fromkeys(int(line) for line in path.read_text().split())) if path.exists() else []

    def failures(self) -> set[tuple[str, str, str]]:
        """Photograph, stage and class of failed rows, of a workspace that must be whole otherwise."""
        with Catalog.open(self.folder / "work") as catalog:
            found = catalog.sql(
                "SELECT DISTINCT s.source, f.stage, f.class FROM failures f JOIN samples s USING (corpus, key)"
            ).to_pylist()
            assert verifying.verify(catalog).findings == []
            assert all(row["parts_missing"] == 0 for row in catalog.coverage())
        return {(row["source"], row["stage"], row["class"]) for row in found}

    def status(self) -> str:
        with Catalog.open(self.folder / "work") as catalog:
            return catalog.sql("SELECT status FROM runs").to_pylist()[-1]["status"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, make_photos: Callable[..., Path]) -> Path:
    return make_photos(tmp_path_factory.mktemp("deadly") / "photos", 16)


@pytest.fixture
def place(tmp_path: Path, photos: Path, ray_cluster: Any) -> Place:
    return Place(tmp_path, photos)


def wait_until(happened: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not happened() and time.monotonic() < until:
        time.sleep(0.05)


def meanwhile(what: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=what, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_rows_that_kill_their_worker_or_hang_fail_alone(place: Place) -> None:
    place.order({"photo001.jpg": "segv", "photo002.jpg": "exit", "photo009.jpg": "hang"})
    # Long enough for a fresh worker on a busy machine to import what decodes its first row.
    place.run("engine.workers=2", "engine.batch_deadline_s=10")
    deadly = {
        ("photo001.jpg", "label", "WorkerDied"),
        ("photo002.jpg", "label", "WorkerDied"),
        ("photo009.jpg", "label", "DeadlineExceeded"),
    }
    assert place.failures() == deadly
    assert list((place.folder / "work" / "runs").rglob("marks/*.json")) == []
    # Where the same rows only raise, all others have the same labels.
    place.order({name: "raise" for name, _, _ in deadly})
    place.run(f"workspace={place.folder / 'raised'}", runner="local")
    with Catalog.open(place.folder / "work") as one, Catalog.open(place.folder / "raised") as other:
        query = "SELECT * FROM palettes ORDER BY ALL"
        assert one.sql(query).num_rows > 0
        assert one.sql(query).equals(other.sql(query))


@pytest.mark.long
def test_a_photograph_that_kills_its_worker_is_left_out_of_a_fit(place: Place) -> None:
    text = place.pipeline.read_text().replace("palette: {", "depth: {").replace("deadly:Deadly", "deadly:DeadlyDepth")
    fit = "tokenizers: {depth: {steps: 2, codebook: 8, batch: 4, width: 8, depth: 1}}\n"
    place.pipeline.write_text(text.replace("tokens: false, ", "") + fit)
    place.order({"photo001.jpg": "exit"})
    place.run("engine.workers=2")
    assert place.failures() == {("photo001.jpg", "label", "WorkerDied")}
    with Catalog.open(place.folder / "work") as catalog:
        fitted = catalog.tokenizer("depth")
        assert fitted is not None
        assert fitted.rows + fitted.metrics["held_out_rows"] == 15
    assert list((place.folder / "work" / "runs").rglob("marks/*.json")) == []


@pytest.mark.slow
def test_nodes_join_and_leave_and_workers_are_killed(place: Place, ray_cluster: Any) -> None:
    """One worker too many waits for a node, which comes, and is lost with it; another is killed. No byte is other."""
    place.run(f"workspace={place.folder / 'calm'}", runner="local")
    (place.folder / "pids").unlink()
    place.order({"all": "wait"})
    # Nodes are added by the main thread: they take signals.
    runs = meanwhile(lambda: place.run("engine.workers=3"))
    wait_until(place.pids)
    node = ray_cluster.add_node(num_cpus=1)
    wait_until(lambda: len(place.pids()) == 3 or not runs.is_alive())
    os.kill(place.pids()[0], signal.SIGKILL)
    ray_cluster.remove_node(node, allow_graceful=False)
    place.order({})
    runs.join(120)
    assert not runs.is_alive()
    assert len(place.pids()) >= 3
    assert place.failures() == set()
    assert place.shards() == place.shards("calm")


def test_an_interrupt_drains_and_the_next_run_goes_on(place: Place) -> None:
    place.order({"all": "wait"})

    def interrupt() -> None:
        wait_until(lambda: len(place.pids()) == 2)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        place.order({})

    meanwhile(interrupt)
    with pytest.raises(KeyboardInterrupt):
        place.run("engine.workers=2")
    assert place.status() == "interrupted"
    # What was at work is there and committed, what waited was not begun.
    assert len(place.shards()) == 2
    with Catalog.open(place.folder / "work") as catalog:
        assert len(catalog.live_shards()) == 2
    place.run("engine.workers=2")
    assert place.failures() == set()
    assert len(place.shards()) == 4


def test_an_item_that_raises_stays_to_be_done(place: Place) -> None:
    """The samples of one part are gone, which no row can be blamed for."""
    place.run(runner="local", steps=("ingest",))
    lost = sorted((place.folder / "work/data/photos/_samples").glob("part-0000001-*.parquet"))[0]
    kept = lost.read_bytes()
    lost.unlink()
    done = place.run("engine.workers=1", "engine.max_failed_parts=1", steps=("label",))
    assert done.counts["failed_items"] == 1
    assert len(place.shards()) == 3
    lost.write_bytes(kept)
    place.run("engine.workers=1")
    assert place.failures() == set()


def test_a_worker_that_cannot_start_says_why(place: Place) -> None:
    (place.folder / "hides").mkdir()
    (place.folder / "hides" / "train.py").touch()
    with pytest.raises(ConfigError, match=r"pool 'odd'.*no worker starts on node .*ImportError"):
        place.run(
            "engine.pools.odd={labelers: ['deadly:Deadly'], workers: 1,"
            f" runtime_env: {{env_vars: {{PYTHONPATH: '{place.folder / 'hides'}'}}}}}}"
        )
