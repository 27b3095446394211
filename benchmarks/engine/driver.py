"""Measures how well one driver keeps many workers busy: `python -m benchmarks.engine.driver [--workers 64] [--items 3840]`.

A simulated cluster (`ray.cluster_utils.Cluster`) of fake nodes on this machine. Each work item sleeps 1 s ± 50 %, by a
hash of its document, then writes a real small shard, which the driver commits: `engine.run` as it is. Prints one line of
JSON:

    driver_efficiency_64   seconds slept / (workers x seconds), from the moment that the last worker began its first item (they
                           wait for each other) until the run's last commit
    driver_ms_per_item     CPU of the driver's process, Ray's threads and the commits in it, a work item, in the same span
    driver_mb_growth       by how much more memory the driver uses after 100,000 items than after 1,000

For the last one items are not sent to workers: a runner within the process takes them from the real schedule and makes up
their records, so that planning, schedule, commits and progress are what grows, if anything does.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from labelers.protocol import LabelerSpec

ROOT = Path(__file__).resolve().parents[2]
_NODES = 4
_PIPELINE = """
workspace: {folder}/work
corpora:
  notes:
    source: {folder}/notes.jsonl
    kind: text
    part_rows: 1
    modalities:
      text:
        {{labeler: "benchmarks.engine.driver:Sleeper", keep: true, tokens: false,
         parameters: {{folder: "{folder}", workers: {workers}, mean_s: {mean_s}}}}}
engine: {{runner: ray, workers: {workers}, ray_address: "{address}"}}
"""


class Sleeper:
    """Makes the modality `text`: the document as it is, after a nap whose length is told by its hash.

    Before its first nap a worker waits until all of them are here. Each tells in a file of its own when it slept.
    """

    spec = LabelerSpec(
        name="benchmarks.engine.driver:Sleeper", version=1, scope="image", inputs=("columns",), outputs=("text",)
    )

    def __init__(self, folder: str, workers: int, mean_s: float) -> None:
        self._folder, self._workers, self._mean_s = Path(folder), workers, mean_s

    def label(self, batch: Mapping[str, Any]) -> Mapping[str, list[str]]:
        path = self._folder / "naps" / str(os.getpid())
        if not path.exists():
            path.touch()
            while len(os.listdir(path.parent)) < self._workers:
                time.sleep(0.2)
        texts = [columns["text"] for columns in batch["columns"]]
        began = time.time()
        time.sleep(sum(nap_s(text, self._mean_s) for text in texts))
        with path.open("a") as file:
            file.write(f"{began} {time.time()}\n")
        return {"text": texts}


def nap_s(text: str, mean_s: float) -> float:
    """Returns the mean ± 50 %, the same for the same text."""
    return mean_s * (0.5 + int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32)


def measure(folder: Path, *, quick: bool) -> dict[str, float]:
    """Returns the three figures, each measured in a process of its own."""
    found: dict[str, float] = {}
    # Enough items that the last second, when workers run out of them, weighs little.
    for part, items in (("cluster", 3840 if quick else 7680), ("memory", 100_000)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.engine.driver", "--part", part, "--items", str(items)]
        done = subprocess.run(
            [*command, "--folder", str(folder / part)],
            cwd=ROOT,
            # Where Python is told to keep no bytecode, 64 workers would each compile all that they import.
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the driver's benchmark ({part}) failed:\n{done.stderr[-3000:]}")
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def on_cluster(folder: Path, items: int, workers: int, mean_s: float) -> dict[str, float]:
    """Measures efficiency and CPU of the driver, with one-CPU workers."""
    from ray.cluster_utils import Cluster

    from engine.pipeline import config
    from engine.run import job

    _start_no_idle_workers()
    (folder / "naps").mkdir(exist_ok=True)
    (folder / "notes.jsonl").write_text("".join(f'{{"text": "note {number}"}}\n' for number in range(items)))
    cluster = _tried(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}))
    for number in range(_NODES):
        cpus = workers // _NODES + (number < workers % _NODES)
        _tried(lambda cpus=cpus: cluster.add_node(num_cpus=cpus))
    pipeline = folder / "pipeline.yaml"
    pipeline.write_text(_PIPELINE.format(folder=folder, workers=workers, mean_s=mean_s, address=cluster.address))
    began: list[float] = []

    def watch() -> None:
        while len(os.listdir(folder / "naps")) < workers:
            time.sleep(0.05)
        began.extend((time.time(), time.process_time()))

    threading.Thread(target=watch, daemon=True).start()
    job.run(config.load(pipeline, []), quiet=True)
    # The run's end waits for its actors to go; the events tell when the last item was committed.
    cpu_s = time.process_time() - began[1]
    events = next((folder / "work" / "runs").glob("*/events.jsonl")).read_text().splitlines()
    done = [event for event in map(json.loads, events) if event["event"] == "item"]
    ended = max(datetime.fromisoformat(event["time"]).timestamp() for event in done)
    cluster.shutdown()
    naps = [
        tuple(map(float, line.split()))
        for path in (folder / "naps").iterdir()
        for line in path.read_text().splitlines()
    ]
    slept_s = sum(end - start for start, end in naps)
    return {
        "driver_efficiency_64": slept_s / workers / (ended - began[0]),
        "driver_ms_per_item": 1000 * cpu_s / items,
        "driver_items": len(naps),
        "driver_wall_s": ended - began[0],
    }


def _start_no_idle_workers() -> None:
    """Keeps Ray from starting an idle process for each CPU of a node, which no run takes: 64 useless starts on one machine."""
    from ray._private import services

    start, option = services.start_ray_process, "--num_prestart_python_workers="

    def without(command: list[str], *arguments: Any, **named: Any) -> Any:
        kept = [f"{option}0" if part.startswith(option) else part for part in command]
        return start(kept, *arguments, **named)

    services.start_ray_process = without


def _tried(start: Callable[[], Any]) -> Any:
    """Starts a node, again if it fails: Ray gives it 30 s, which a busy machine may need more of."""
    for _ in range(4):
        with contextlib.suppress(Exception):
            return start()
    return start()


class _InProcess:
    """Takes items from the queue and makes up their records, 64 at a tick, without any work."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self._at = at
        self.used_mb: list[float] = []

    def work(self, items: Iterable[Any], progress: Any) -> Generator[list[tuple[Any, Any]], None, None]:
        from engine.plan.items import ItemResult
        from engine.run.runners.queue import ItemQueue, needed_models

        queue = ItemQueue(items, needed_models)
        done = 0
        while not queue.exhausted:
            taken = [item for item in (queue.next("") for _ in range(64)) if item is not None]
            for item in taken:
                progress.started(item, f"worker-{done % 64}")
            yield [
                (
                    item,
                    ItemResult(
                        records=tuple(_record(item, target) for target in item.targets),
                        rows=1,
                        seconds={"total": 1.0},
                        seconds_by_labeler={},
                        busy=1.0,
                        rss_bytes=0,
                    ),
                )
                for item in taken
            ]
            for mark in self._at:
                if done < mark <= done + len(taken):
                    self.used_mb.append(_used_mb())
            done += len(taken)

    def fit(self, items: Any, progress: Any) -> Iterator[Any]:
        yield from ()

    def close(self) -> None: ...


def in_process(folder: Path, items: int) -> dict[str, float]:
    """Measures the driver's memory after 1,000 items and after all of them."""
    from engine.pipeline import config
    from engine.plan.corpus import corpus_plan
    from engine.plan.missing import Wanted
    from engine.progress.record import recorded
    from engine.run import labeling
    from manifests.log import actions
    from manifests.log import entries as log
    from manifests.store.storage import open_storage

    pipeline = folder / "pipeline.yaml"
    pipeline.write_text(_PIPELINE.format(folder=folder, workers=64, mean_s=1.0, address="none"))
    loaded = config.load(pipeline, [])
    storage = open_storage(loaded.workspace)
    log.create_workspace(storage)
    runner = _InProcess((1000, items))
    with recorded(storage, "run", {}, quiet=True) as execution:
        corpus = actions.CorpusAdded(corpus="notes", kind="text", source="x", seed=0, part_rows=1, config={})
        execution.catalog.commit([corpus], run=execution.done.run)
        for first in range(0, items, 10_000):
            parts = [_part(number) for number in range(first, min(first + 10_000, items))]
            execution.catalog.commit(parts, run=execution.done.run)
        plans = {"notes": corpus_plan(loaded, "notes", str(folder), {})}
        labeling.label(execution, plans, {}, loaded.engine, Wanted(), lambda most: runner)
    return {"driver_mb_growth": runner.used_mb[-1] - runner.used_mb[0], "driver_mb": runner.used_mb[-1]}


def _part(number: int) -> Any:
    from manifests.log.actions import PartAdded
    from manifests.store import paths

    digest = hashlib.sha256(str(number).encode()).hexdigest()
    path = paths.samples("notes", number, digest)
    facts: dict[str, Any] = {"size_bytes": 1000, "keys_sha256": digest, "source_bytes": 10}
    return PartAdded(corpus="notes", part=number, rows=1, path=path, sha256=digest, **facts)


def _record(item: Any, target: Any) -> Any:
    from manifests.log.actions import ShardAdded
    from manifests.store import paths

    digest = hashlib.sha256(item.name.encode()).hexdigest()
    path = paths.shard("notes", "text", target.fingerprint, item.part.part, None, digest, is_tar=False)
    place: dict[str, Any] = {
        "corpus": "notes",
        "part": item.part.part,
        "crop": None,
        "modality": "text",
        "form": target.form,
    }
    counts: dict[str, Any] = {"size_bytes": 1000, "rows": 1, "ok": 1, "failed": 0, "absent": 0}
    facts: dict[str, Any] = {"path": path, "format": "parquet", "sha256": digest, "keys_sha256": digest}
    return ShardAdded(fingerprint=target.fingerprint, **place, **facts, **counts)


def _used_mb() -> float:
    """Returns what the process holds: memory that was freed and not given back to the system yet is no growth."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=("cluster", "memory"), default="cluster")
    parser.add_argument("--items", type=int, default=3840)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--mean-s", type=float, default=1.0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="modmill-driver-") as scratch:
        folder = given.folder or Path(scratch)
        if given.part == "cluster":
            found = on_cluster(folder, given.items, given.workers, given.mean_s)
        else:
            found = in_process(folder, given.items)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
