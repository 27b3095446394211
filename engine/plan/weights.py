"""Finds the weights of labelers, or fetches them once a node, and knows them by the digest of their files.

A checkpoint is named by a path, an fsspec URI, or a hub id (`org/name`, `org/name@revision`). Its name does not
decide what a labeler makes, so recipes hold the digest and not the name: a folder may move, and a hub id may be
replaced by a copy on a disk, without anything becoming stale.
"""

import fcntl
import functools
import json
import os
import posixpath
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from manifests.errors import ConfigError
from manifests.recipe import canonical_json, sha256_hex, sha256_of_stream
from manifests.store.storage import cache_folder, replace_file

# Files of a checkpoint's folder that decide what comes out. Pickles only if no safetensors are there.
_ALWAYS = (".json", ".safetensors", ".txt", ".model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (".safetensors", *_PICKLES)
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Holds a checkpoint that lies on this machine.

    path        the local folder or file
    digest      of a file its sha256; of a folder the sha256 of the names and sha256s of the files that matter
    size_bytes  of these files
    checkpoint  its name for other machines: with the commit, for a hub id
    """

    path: Path
    digest: str
    size_bytes: int
    checkpoint: str


def resolve(checkpoint: str) -> Weights:
    """Returns the checkpoint of this name, fetched if it is not on this machine.

    A hub id without a revision is the commit that this machine saw first. Raises ConfigError if there is no such
    checkpoint, if it cannot be fetched, or if a file of it is cut short.
    """
    path, pinned = _locate(checkpoint)
    files = _files(path, checkpoint)
    for file in files:
        if file.suffix == ".safetensors":
            _check_whole(file)
    sums = {file.name: _sha256(file) for file in files}
    return Weights(
        path=path,
        digest=sums[path.name] if path.is_file() else sha256_hex(canonical_json(sums)),
        size_bytes=sum(file.stat().st_size for file in files),
        checkpoint=pinned,
    )


def fetch(checkpoint: str, digest: str) -> Weights:
    """Returns the checkpoint. Raises ConfigError if its digest is not this one, which the driver planned with."""
    found = resolve(checkpoint)
    if found.digest != digest:
        sums = {file.name: _sha256(file)[:12] for file in _files(found.path, checkpoint)}
        listed = ", ".join(f"{name} {sha256}" for name, sha256 in sorted(sums.items()))
        raise ConfigError(
            f"checkpoint {checkpoint}: {found.path} on {os.uname().nodename} has the digest {found.digest[:12]}, expected "
            f"{digest[:12]} ({listed}); put the driver's copy there, or delete that one if it was fetched"
        )
    return found


def is_hub_id(checkpoint: str) -> bool:
    """Tells whether a name is `org/name` or `org/name@revision`; a path of that form must start with `./`."""
    return bool(_HUB_ID.match(checkpoint))


def _locate(checkpoint: str) -> tuple[Path, str]:
    """Returns where the checkpoint lies on this machine, and its name for others."""
    if "://" in checkpoint:
        return _from_store(checkpoint), checkpoint
    path = Path(os.path.expanduser(checkpoint)).absolute()
    if path.exists():
        return path, str(path)
    if is_hub_id(checkpoint):
        repo, _, revision = checkpoint.partition("@")
        folder, commit = _from_hub(repo, revision or "main", os.environ.get("HF_ENDPOINT"))
        return folder, f"{repo}@{commit}"
    raise ConfigError(
        f"checkpoint {checkpoint}: no such file or folder on {os.uname().nodename}; expected a path that every node sees, "
        "a URI such as s3://bucket/weights, or a hub id such as facebook/dinov2-base"
    )


# -- files and digests ------------------------------------------------------------------------------------------------


def _files(path: Path, checkpoint: str) -> list[Path]:
    """Returns the files that matter, by name. Raises ConfigError if none of them holds weights."""
    if path.is_file():
        return [path]
    names = _that_matter(entry.name for entry in path.iterdir() if entry.is_file())
    if not any(name.endswith(_WEIGHTS) for name in names):
        raise ConfigError(f"checkpoint {checkpoint}: {path} holds no weights; expected *.safetensors (or *.bin, *.pt)")
    index = path / "model.safetensors.index.json"
    wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    if missing := sorted(wanted - set(names)):
        raise ConfigError(
            f"checkpoint {checkpoint}: {path} has no {missing[0]}, which {index.name} names; fetch it again"
        )
    return [path / name for name in names]


def _that_matter(names: Iterable[str]) -> list[str]:
    """Returns the names in a folder whose files decide what comes out."""
    plain = sorted(name for name in names if "/" not in name and not name.startswith("."))
    pickles = () if any(name.endswith(".safetensors") for name in plain) else _PICKLES
    return [name for name in plain if name.endswith((*_ALWAYS, *pickles))]


def _check_whole(path: Path) -> None:
    """Raises ConfigError if a safetensors file is shorter or longer than its header says, or has none."""
    from safetensors import SafetensorError, safe_open

    try:
        # Reads the header alone, and compares it with the size of the file.
        with safe_open(path, "numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: its {path.stat().st_size:,} bytes are not what a safetensors header says ({error}): the file was cut "
            "short or overwritten; fetch it again"
        ) from error


def _sha256(path: Path) -> str:
    """Returns the sha256 of a file. It is remembered while the file's size and time stay: weights are gigabytes."""
    path = path.resolve()
    stat = path.stat()
    identity = sha256_hex(f"{path} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}".encode())
    remembered = cache_folder() / "weights" / "digests" / identity
    if remembered.is_file():
        return remembered.read_text()
    with path.open("rb") as file:
        digest = sha256_of_stream(file)
    replace_file(remembered, digest.encode())
    return digest


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Holds a lock of this node: one process fetches, the others wait and then find what it fetched."""
    folder = cache_folder() / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -- object stores ----------------------------------------------------------------------------------------------------


def _from_store(uri: str) -> Path:
    """Returns a local copy of what lies at an fsspec URI: a folder of it for each state of its files."""
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(uri)
        found = _listed(fs, root)
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"checkpoint {uri} cannot be read: {error}") from error
    if not found:
        raise ConfigError(f"checkpoint {uri}: there is nothing there; expected a file, or a folder with *.safetensors")
    key = sha256_hex(canonical_json([uri, {name: fs.ukey(path) for name, path in found.items()}]))[:24]
    folder = cache_folder() / "weights" / key
    with _alone(key):
        if not folder.is_dir():
            # What a killed process left is deleted: only the lock's holder writes here.
            partial = folder.with_name(f".{key}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                for name, path in found.items():
                    fs.get_file(path, str(partial / name))
            except OSError as error:
                raise ConfigError(f"checkpoint {uri} cannot be fetched to {partial}: {error}") from error
            partial.rename(folder)
    single = posixpath.basename(root.rstrip("/"))
    return folder / single if list(found) == [single] else folder


def _listed(fs, root: str) -> dict[str, str]:
    """Returns the files that matter of a store's folder, or the one file there: name to path."""
    root = root.rstrip("/")
    if fs.isfile(root):
        return {posixpath.basename(root): root}
    paths = {posixpath.basename(path): path for path in fs.find(root, maxdepth=1)}
    return {name: paths[name] for name in _that_matter(paths)}


# -- the hub ----------------------------------------------------------------------------------------------------------


@functools.cache
def _from_hub(repo: str, revision: str, endpoint: str | None) -> tuple[Path, str]:
    """Returns the folder of a hub repository's files in Hugging Face's own cache, and their commit.

    Which commit a branch stands for is remembered, so that a repository that moves makes nothing stale by itself.
    """
    from huggingface_hub import HfApi, snapshot_download

    name = sha256_hex(f"{endpoint} {repo}@{revision}".encode())[:24]
    marker = cache_folder() / "weights" / f"hub-{name}.json"
    try:
        with _alone(f"hub-{name}"):
            known = _remembered(marker)
            if known is None:
                if _is_offline():
                    folder = _cached_by_hub(repo, revision)
                    return folder, folder.name
                info = HfApi(endpoint=endpoint).model_info(repo, revision=revision)
                names = _that_matter(file.rfilename for file in info.siblings or ())
                folder = snapshot_download(repo, revision=info.sha, allow_patterns=names, endpoint=endpoint)
                known = {"folder": folder, "commit": str(info.sha)}
                replace_file(marker, json.dumps(known).encode())
    # Releases of the library use different HTTP clients, and so raise different errors.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        offline = "HF_HUB_OFFLINE is set, and it is not in the cache; " if _is_offline() else ""
        raise ConfigError(
            f"checkpoint {repo}@{revision} cannot be fetched: {offline}{reason}; fetch it on a machine with a network "
            "(a private or gated one needs HF_TOKEN), or give the path of a copy"
        ) from error
    return Path(known["folder"]), known["commit"]


def _cached_by_hub(repo: str, revision: str) -> Path:
    """Returns the folder of a revision in Hugging Face's cache. Raises FileNotFoundError if it is missing.

    The library is not asked: it calls a snapshot without the repository's README incomplete.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    branch = folder / "refs" / revision
    return (folder / "snapshots" / (branch.read_text().strip() if branch.is_file() else revision)).resolve(strict=True)


def _remembered(marker: Path) -> Mapping[str, str] | None:
    """Returns what an earlier fetch left, if its folder still stands."""
    if not marker.is_file():
        return None
    known = json.loads(marker.read_text())
    return known if Path(known["folder"]).is_dir() else None


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
