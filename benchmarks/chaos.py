"""Tries a run under fire: labels images on a two-node Ray cluster of this machine while workers and the driver are killed.

    python -m benchmarks.chaos FOLDER --images 30000 --worker-every 20 --drivers 3

Makes the images (crops of photographs that ship inside scikit-image, and procedural scenes), starts a cluster, and runs
`modmill run --ray ADDRESS` again and again until it ends by itself. Meanwhile one worker process gets SIGKILL every so many
seconds, and the driver gets it so many times, at moments spread over the work. It writes `kills.jsonl`, verifies the
workspace, and prints the counts as one JSON object. Exit code 0: complete and verified.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

MODALITIES = ("rgb", "edges", "boxes", "metadata", "palette", "caption")
PIPELINE = """
workspace: {folder}/workspace
corpora:
  photos:
    source: {folder}/images
    part_rows: {part_rows}
    modalities: {{rgb: {{keep: true}}, edges: {{keep: true}}, boxes:, metadata:, palette:, caption:}}
engine: {{batch: 16, max_failed_parts: 0}}
"""
# The command of the environment that runs this.
MODMILL = str(Path(sys.executable).with_name("modmill"))
_LOOK_EVERY_S = 0.25
_MOST_STARTS = 60


def make_images(folder: Path, count: int, processes: int = 2) -> None:
    """Makes `count` JPEGs: four of five are crops of photographs, one of five is a scene; half of them have captions."""
    folder.mkdir(parents=True, exist_ok=True)
    there = len(list(folder.glob("*.jpg")))
    chunks = [range(start, min(start + 500, count)) for start in range(there - there % 500, count, 500)]
    with ProcessPoolExecutor(processes) as pool:
        list(pool.map(_make_some, [folder] * len(chunks), chunks))


def _make_some(folder: Path, numbers: range) -> None:
    import cv2
    import numpy as np
    import skimage.data

    from benchmarks import scenes

    cv2.setNumThreads(1)
    sources = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), skimage.data.rocket()]
    for number in numbers:
        generator = np.random.default_rng(number)
        caption = f"picture {number}"
        if number % 5 == 0:
            scene = scenes.render(number, size=224)
            image, caption = scene.rgb, scene.caption
        else:
            source = sources[number % len(sources)]
            height, width = (int(generator.integers(180, side + 1)) for side in source.shape[:2])
            top, left = (
                int(generator.integers(0, have - want + 1))
                for have, want in zip(source.shape, (height, width), strict=False)
            )
            image = source[top : top + height, left : left + width]
        cv2.imwrite(
            str(folder / f"{number:06d}.jpg"), np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 88]
        )
        if number % 2:
            (folder / f"{number:06d}.txt").write_text(caption)


@contextlib.contextmanager
def two_nodes(cpus_a_node: int = 1) -> Iterator[str]:
    """Starts a cluster of a head without processors and two nodes, and yields its address."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=cpus_a_node)
        cluster.wait_for_nodes()
        yield str(cluster.address)
    finally:
        cluster.shutdown()


def workers_of(address: str) -> list[int]:
    """Returns the processes of actors of the cluster at this address."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            # Nodes have processes of their own called ray::...; without them a node dies.
            if not title.startswith("ray::RayWorker"):
                continue
            parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            if address in Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace"):
                found.append(int(entry.name))
    return found


class Fire:
    """Kills processes; every kill is a line of the log."""

    def __init__(self, log: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self._log = log
        self._start = time.monotonic()
        self.kills: list[dict[str, Any]] = []

    def kill(self, kind: str, pid: int, done: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            entry = {"second": round(time.monotonic() - self._start, 1), "kind": kind, "pid": pid, "shards_done": done}
            self.kills.append(entry)
            with self._log.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def a_worker(self, address: str, done: int) -> None:
        if pids := workers_of(address):
            self.kill("worker", self._random.choice(pids), done)


def run_under_fire(
    folder: Path, address: str, *, parts: int, worker_every_s: float, drivers: int, seed: int = 0
) -> dict[str, Any]:
    """Runs the pipeline until it ends by itself; what was killed, and how often it was started."""
    fire = Fire(folder / "kills.jsonl", seed)
    command = [
        MODMILL,
        "run",
        str(folder / "pipeline.yaml"),
        "--only",
        "label",
        "--ray",
        address,
    ]
    shards = parts * len(MODALITIES)
    # The driver dies when so much of the work is done: early, in the middle, late.
    moments = [shards * (place + 1) // (drivers + 1) for place in range(drivers)]
    begun = time.monotonic()
    next_worker = begun + worker_every_s
    for start in range(1, _MOST_STARTS + 1):
        with (folder / f"driver-{start}.log").open("wb") as output:
            driver = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
            while driver.poll() is None:
                time.sleep(_LOOK_EVERY_S)
                done = _shards_done(folder / "workspace")
                if time.monotonic() >= next_worker:
                    fire.a_worker(address, done)
                    next_worker = time.monotonic() + worker_every_s
                if moments and done >= moments[0]:
                    moments.pop(0)
                    fire.kill("driver", driver.pid, done)
                    driver.wait()
        if driver.returncode != -signal.SIGKILL:
            seconds = time.monotonic() - begun
            return {"code": driver.returncode, "starts": start, "seconds": round(seconds, 1), "kills": fire.kills}
    raise RuntimeError(f"the driver was started {_MOST_STARTS} times and did not end")


def _shards_done(workspace: Path) -> int:
    return sum(1 for path in (workspace / "data").glob("*/*/*/part-*") if path.suffix in (".parquet", ".tar"))


def judge(folder: Path, images: int) -> dict[str, Any]:
    """Returns what the workspace says of itself: every row of every modality is accounted for, and `verify` finds nothing."""
    from manifests.catalog.catalog import Catalog

    verify = subprocess.run(
        [MODMILL, "verify", str(folder / "workspace")],
        capture_output=True,
        text=True,
        check=False,
    )
    with Catalog.open(str(folder / "workspace")) as catalog:
        rows = catalog.sql(
            "SELECT modality, count(*) AS shards, sum(rows)::INT AS rows, sum(ok)::INT AS ok, sum(failed)::INT AS failed, "
            "sum(absent)::INT AS absent, count(DISTINCT part) AS parts FROM shards GROUP BY modality ORDER BY modality"
        ).to_pylist()
    complete = len(rows) == len(MODALITIES) and all(
        row["rows"] == images and row["shards"] == row["parts"] for row in rows
    )
    return {"complete": complete, "verify": verify.returncode, "said": verify.stdout[-600:], "modalities": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="the folder of images and workspace; by default one that is removed"
    )
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--part-rows", type=int, default=64)
    parser.add_argument("--worker-every", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--drivers", type=int, default=3, help="how often the driver is killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="1,200 images in parts of 64, a worker every 15 seconds")
    parser.add_argument("--json", action="store_true", help="print the JSON object alone")
    options = parser.parse_args()
    if options.quick:
        options.images, options.part_rows, options.worker_every = 1200, 64, 15.0
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modmill-chaos-")))
        outcome = under_fire(folder.resolve(), options)
    if not options.json:
        for modality in outcome["modalities"]:
            print("  ".join(f"{name} {value:,}" if name != "modality" else value for name, value in modality.items()))
    print(json.dumps(outcome))
    sys.exit(0 if outcome["code"] == 0 and outcome["complete"] and outcome["verify"] == 0 else 1)


def under_fire(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Makes images, cluster, run and judgement, and returns all counts."""
    make_images(folder / "images", options.images)
    (folder / "pipeline.yaml").write_text(PIPELINE.format(folder=folder, part_rows=options.part_rows))
    subprocess.run([MODMILL, "run", str(folder / "pipeline.yaml"), "--only", "ingest"], check=True, capture_output=True)
    parts = -(-options.images // options.part_rows)
    with two_nodes() as address:
        outcome = run_under_fire(
            folder,
            address,
            parts=parts,
            worker_every_s=options.worker_every,
            drivers=options.drivers,
            seed=options.seed,
        )
    kills = outcome.pop("kills")
    for kind in ("worker", "driver"):
        outcome[f"{kind}s_killed"] = sum(kill["kind"] == kind for kill in kills)
    return {**outcome, **judge(folder, options.images)}


if __name__ == "__main__":
    main()
