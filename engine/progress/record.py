"""Records an execution in the log: when, where, with which code and libraries, from what, and how it ended."""

import os
import platform
import socket
import subprocess
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from engine.progress import events
from engine.progress.progress import Progress
from manifests.catalog.catalog import Catalog
from manifests.errors import TooManyFailures
from manifests.log import entries as log
from manifests.log.actions import RunEnded, RunStarted
from manifests.log.lease import writer_lease
from manifests.store.storage import Storage

_RECORDED = (
    "modmill",
    "torch",
    "ray",
    "duckdb",
    "pyarrow",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "scikit-image",
    "tokenizers",
)


@dataclass
class Done:
    """Counts what a run did; `failed_corpora` are those of which nothing could be made."""

    run: str
    counts: dict[str, int] = field(default_factory=dict)
    failed_corpora: list[str] = field(default_factory=list)
    training_folder: str | None = None

    def add(self, name: str, more: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + more

    @property
    def did_nothing(self) -> bool:
        return not any(self.counts.values())


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Holds what a run works with: its catalog, its progress, and its counts of what it did."""

    catalog: Catalog
    progress: Progress
    done: Done


@contextmanager
def recorded(storage: Storage, kind: str, config: Mapping[str, Any], *, quiet: bool = False) -> Iterator[Execution]:
    """Holds the workspace as its one writer for as long as a run lasts, and records its start and its end.

    `config` is what the run is given, as plain JSON values. Raises WorkspaceError if there is no workspace, or if
    another writer holds it, LogError if its log has lost entries.
    """
    log.workspace_id(storage)
    name = log.run_name(kind)
    with writer_lease(storage, name) as lease, Catalog(storage, lease=lease) as catalog:
        log.check_dense(storage, catalog.version)
        progress = Progress(events.sink(storage, name), quiet=quiet)
        progress.event("run", run=name, kind=kind, host=socket.gethostname(), pid=os.getpid())
        done = Done(run=name)
        catalog.commit([started_with(name, kind, config)], run=name)
        status = "failed"
        try:
            yield Execution(catalog=catalog, progress=progress, done=done)
            status = "done"
        except TooManyFailures:
            status = "over_budget"
            raise
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        except Exception as error:
            progress.event("error", error=type(error).__name__, message=str(error), trace=traceback.format_exc())
            raise
        finally:
            try:
                catalog.commit([RunEnded(run=name, time=log.now(), status=status, counts=done.counts)], run=name)
            finally:
                progress.event("ended", status=status, counts=done.counts)
                progress.close()


def started_with(name: str, kind: str, document: Mapping[str, Any]) -> RunStarted:
    """Returns the record of a run that begins; `document` is its configuration as plain JSON values."""
    return RunStarted(
        run=name,
        kind=kind,
        time=log.now(),
        host=socket.gethostname(),
        commit=_commit(),
        versions={**_versions(), "python": platform.python_version(), "machine": platform.machine()},
        config=document,
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in _RECORDED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Returns the commit of this code, None outside a clone."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
