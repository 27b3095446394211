"""Reports what this machine has for modmill and what is missing: packages, GPUs, Ray, disk, memory, labelers."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from engine.show.tables import plain_lines
from engine.work.machine import cores
from labelers import protocol
from labelers.protocol import LabelerSpec
from manifests import units
from manifests.errors import ConfigError

_DISK_AT_LEAST_BYTES = 1 << 30
_COMMAND_SECONDS = 10
_LABEL_EXTRA = "pip install 'modmill[label]'"
_EXTRAS_TOLD = ("label", "train", "ray", "s3", "gcs", "heif")
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+).*?(?:extra == ['\"](\w+)['\"])?$")


@dataclass(frozen=True, kw_only=True)
class Check:
    """Holds one finding. `ok` is None if it is neither right nor wrong: something optional is missing."""

    name: str
    value: str
    ok: bool | None
    advice: str = ""


def report(folder: str | Path = Path()) -> list[Check]:
    """Returns all findings; `folder` is where the free disk is looked at. Nothing heavy is imported."""
    return [
        Check(name="modmill", value=metadata.version("modmill"), ok=True),
        Check(name="python", value=platform.python_version(), ok=True),
        *_packages(),
        _gpus(),
        _ray_cluster(),
        _disk(Path(folder)),
        _memory(),
        Check(name="cores", value=str(cores()), ok=True),
        _cache(),
        *_labelers(),
    ]


def text(checks: list[Check]) -> str:
    """Returns the findings as lines: a mark (ok, -, or WRONG), name, value, and what to do."""
    marks = {True: "ok", None: "-", False: "WRONG"}
    rows = [(marks[one.ok], one.name, one.value + (f"  → {one.advice}" if one.advice else "")) for one in checks]
    return "\n".join(plain_lines(rows))


def _packages() -> Iterator[Check]:
    """Yields a check of each package that modmill's metadata asks for, with the extra that brings it."""
    extras: dict[str, list[str]] = {}
    for requirement in metadata.requires("modmill") or ():
        match = _REQUIREMENT.match(requirement)
        if match is not None and (match[2] is None or match[2] in _EXTRAS_TOLD):
            extras.setdefault(match[1].lower(), []).append(match[2] or "")
    for name, wanted_by in extras.items():
        is_base = "" in wanted_by
        try:
            yield Check(name=name, value=metadata.version(name), ok=True)
        except metadata.PackageNotFoundError:
            package = "modmill" if is_base else f"modmill[{wanted_by[0]}]"
            yield Check(name=name, value="missing", ok=False if is_base else None, advice=f"pip install '{package}'")


def _gpus() -> Check:
    if found := _nvidia_smi():
        return Check(name="GPUs", value="; ".join(found), ok=True)
    return Check(name="GPUs", value="none", ok=None, advice="everything runs on the CPU, fits and big labelers slowly")


def _nvidia_smi() -> list[str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _ray_cluster() -> Check:
    if importlib.util.find_spec("ray") is None:
        return Check(
            name="Ray cluster",
            value="Ray is not installed",
            ok=None,
            advice="pip install 'modmill[ray]', or run with --runner local",
        )
    address = os.environ.get("RAY_ADDRESS") or _address_of_running_cluster()
    if address:
        return Check(name="Ray cluster", value=address, ok=True)
    return Check(name="Ray cluster", value="none running: a run starts its own", ok=True)


def _address_of_running_cluster() -> str:
    """Returns what `ray start` wrote for others to find it by."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _disk(folder: Path) -> Check:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    ok = free >= _DISK_AT_LEAST_BYTES
    advice = "" if ok else "a workspace needs room for shards and tokenizers; free some, or choose another disk"
    return Check(name="free disk", value=f"{units.memory(free)} at {there}", ok=ok, advice=advice)


def _memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _cgroup_limit_bytes()
    if limit is not None and limit < total:
        return Check(name="memory", value=f"{units.memory(limit)} (this container's share)", ok=True)
    return Check(name="memory", value=units.memory(total), ok=True)


def _cgroup_limit_bytes() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):
            continue
    return None


def _cache() -> Check:
    try:
        from manifests.store.storage import cache_folder
    except ImportError as error:
        # The missing package has its own line above.
        return Check(name="cache folder", value=f"not looked for: {error}", ok=None)
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        advice = "indexes of workspaces lie there; set MODMILL_CACHE to a folder of a local disk"
        return Check(name="cache folder", value=f"{folder}: {error.strerror}", ok=False, advice=advice)
    return Check(name="cache folder", value=str(folder), ok=True)


def _labelers() -> Iterator[Check]:
    for name in protocol.names():
        try:
            yield labeler_check(protocol.find(name).spec)
        except ConfigError as error:
            yield Check(name=f"labeler {name}", value=str(error), ok=None, advice=_LABEL_EXTRA)


def labeler_check(spec: LabelerSpec) -> Check:
    """Returns what a labeler still misses: packages, or its default weights."""
    name = f"labeler {spec.name}"
    missing = [package for package in spec.requires if importlib.util.find_spec(package.partition(".")[0]) is None]
    if missing:
        return Check(name=name, value=f"missing: {', '.join(missing)}", ok=None, advice=_LABEL_EXTRA)
    if not has_weights(spec):
        advice = "they are downloaded at first use; or name a folder that has them in its parameters"
        return Check(name=name, value=f"missing: its weights, {spec.checkpoint}", ok=None, advice=advice)
    return Check(name=name, value="ready", ok=True)


def has_weights(spec: LabelerSpec) -> bool:
    """Tells whether a labeler's default weights are on this machine: a file, a folder, or in the Hugging Face cache."""
    if spec.checkpoint is None or os.path.exists(os.path.expanduser(spec.checkpoint)):
        return True
    home = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    snapshots = hub / f"models--{spec.checkpoint.replace('/', '--')}" / "snapshots"
    return snapshots.is_dir() and any(snapshots.iterdir())
