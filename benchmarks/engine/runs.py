"""Runs the engine for `benchmarks.engine`, and tells how long the work took.

A run is the real one: `engine.run.job.run` on a pipeline, with samples, log, sidecars and commits. Its time comes from its own
events (`runs/<run>/events.jsonl`): from the moment when the last worker committed its first work item to the commit of the
last item. Starting Ray, loading models and reading the first bytes lie before that, and are told apart as `start_s`.
"""

import json
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from manifests.store import paths


def run(pipeline: Mapping[str, Any], *, workers: int) -> dict[str, float]:
    """Runs a pipeline, whose parts are all full; what its steady part took.

    wall_s    from the last worker's first committed item to the last commit
    rows      of the items committed in that time
    start_s   from the call, ingest done, to the moment when `wall_s` begins: one item a worker, and all that comes before it
    cpu_s     of this process, from the call to the end (all of the work if the runner is `local`)
    cpu_rows  the rows that `cpu_s` was for: all of them
    """
    called, cpu = _ingested(pipeline)
    times = commits(_labeled(pipeline))
    cpu_s = time.process_time() - cpu
    if len(times) <= workers:
        raise ValueError(f"{len(times)} work items for {workers} workers; expected more, to leave the start out")
    part_rows = pipeline["corpora"]["photos"]["part_rows"]
    return {
        "wall_s": times[-1] - times[workers - 1],
        "rows": (len(times) - workers) * part_rows,
        "start_s": times[workers - 1] - called,
        "cpu_s": cpu_s,
        "cpu_rows": len(times) * part_rows,
    }


def run_to_events(pipeline: Mapping[str, Any]) -> Path:
    """Runs a pipeline and returns the path of its events."""
    _ingested(pipeline)
    return _labeled(pipeline)


def commits(events: Path) -> list[float]:
    """Returns when each item was committed, in seconds since 1970, in that order."""
    found = []
    for line in events.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "item":
            found.append(datetime.fromisoformat(event["time"]).timestamp())
    return sorted(found)


def _ingested(pipeline: Mapping[str, Any]) -> tuple[float, float]:
    """Ingests what the pipeline names; wall and CPU time afterwards."""
    from engine.pipeline import config
    from engine.run import job

    job.run(config.PipelineConfig.model_validate(dict(pipeline)), steps=("ingest",), quiet=True)
    return time.time(), time.process_time()


def _labeled(pipeline: Mapping[str, Any]) -> Path:
    """Labels what was ingested and returns the path of that run's events. Raises ValueError if rows failed."""
    from engine.pipeline import config
    from engine.run import job

    settled = config.PipelineConfig.model_validate(dict(pipeline))
    done = job.run(settled, steps=("label",), quiet=True)
    if failed := done.counts.get("failed_rows", 0):
        raise ValueError(f"{failed} rows failed; see the view `failures` of {settled.workspace}")
    return Path(settled.workspace) / paths.events(done.run)
