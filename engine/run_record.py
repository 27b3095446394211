"""What the log keeps of an execution: when, where, with which code and libraries, from which pipeline file."""

import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path

from engine import config as pipeline
from manifests import log
from manifests.actions import RunStarted

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


def started(name: str, kind: str, config: pipeline.PipelineConfig) -> RunStarted:
    """The record of a run that begins."""
    return RunStarted(
        run=name,
        kind=kind,
        time=log.now(),
        host=socket.gethostname(),
        commit=_commit(),
        versions={**_versions(), "python": platform.python_version(), "machine": platform.machine()},
        config=pipeline.document(config),
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
    """The commit of this code, None outside a clone."""
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
