"""Adds what an object store needs beyond fsspec: a patient client, whole conditional PUTs, listings, errors in words.

S3 gets one PUT with `If-None-Match: *` and a SHA-256 that the store compares, of up to 5 GiB (no multipart upload). The
client itself tries again after what passes: 500, 503 SlowDown, resets, timeouts, truncated bodies. On GCS, gcsfs does the
same (`mode="create"` is `ifGenerationMatch=0`; read in its source, not run here).
"""

import base64
import contextlib
import datetime
import errno
import random
import time
from collections.abc import Iterator
from typing import Any

from manifests.errors import WorkspaceError
from manifests.recipe import sha256_hex

# botocore tries five times (backoff with jitter), and s3fs does that three times, also for a body that broke off. A store
# that refuses is given up after a minute or two, one that takes connections and never answers after 5 to 15 minutes.
S3_CLIENT: dict[str, Any] = {
    "connect_timeout": 10,
    "read_timeout": 20,
    "retries": {"mode": "standard", "total_max_attempts": 5},
}
_S3_ROUNDS = 3
_S3_LARGEST_PUT = 5 << 30
# A 409 (another conditional request on this name is under way) is not tried again by the client, but by `put` below.
_CONFLICT_WAITS_S = (0.1, 0.3, 1.0, 3.0)


def connect(uri: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URI, and the path in it. Raises ImportError or ValueError for an unknown scheme."""
    import fsspec.config

    # Listings change under us: other processes write here too.
    options: dict[str, Any] = {"use_listings_cache": False}
    if uri.startswith(("s3://", "s3a://")):
        own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        # One stream for one object: s3fs tries a truncated body again only there, and needs no HEAD before it.
        options |= {"config_kwargs": {**S3_CLIENT, **own}, "max_concurrency": 1}
    fs, root = fsspec.url_to_fs(uri, **options)
    if _is_s3(fs):
        fs.retries = _S3_ROUNDS
    return fs, root


@contextlib.contextmanager
def in_words(location: str, doing: str) -> Iterator[None]:
    """Turns the many errors of the store's client into a WorkspaceError that says where and what to do.

    FileNotFoundError and FileExistsError are answers, and stay.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, WorkspaceError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        raise WorkspaceError(
            f"{location} cannot be {doing} ({reason}); look at the network, the credentials and the rights of the bucket, "
            "then give the same command again: what is committed stays"
        ) from error


def put(fs: Any, path: str, data: bytes) -> bool:
    """Creates an object. Returns False if the name is taken, perhaps by an earlier try of ours whose answer got lost."""
    waits = iter(_CONFLICT_WAITS_S)
    while True:
        try:
            fs.pipe_file(path, data, mode="create", **_whole(fs, data))
            return True
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise WorkspaceError(f"{fs.unstrip_protocol(path)} cannot be written ({error}): make the bucket") from error
        except OSError as error:
            # A 412 that does not name its condition.
            if error.errno == errno.EINVAL and fs.exists(path):
                return False
            wait = next(waits, None)
            if wait is None or "ConditionalRequestConflict" not in str(error.__cause__ or error):
                raise
            time.sleep(wait * random.uniform(0.5, 1.5))


def replace(fs: Any, path: str, data: bytes) -> None:
    """Writes an object that may stand already."""
    fs.pipe_file(path, data, **_whole(fs, data))


def _whole(fs: Any, data: bytes) -> dict[str, Any]:
    """Returns the options that make a write one checked request.

    The checksum goes into a header, since some stores do not know trailers.
    """
    if not _is_s3(fs):
        return {}
    return {"chunksize": _S3_LARGEST_PUT, "ChecksumSHA256": base64.b64encode(bytes.fromhex(sha256_hex(data))).decode()}


def walk(fs: Any, folder: str) -> Iterator[tuple[str, int, datetime.datetime]]:
    """Yields path, bytes and time of every object below a folder, folder by folder: millions are never held at once."""
    try:
        found = fs.ls(folder, detail=True)
    except FileNotFoundError:
        return
    for entry in sorted(found, key=lambda entry: entry["name"]):
        name = entry["name"].rstrip("/")
        if entry["type"] == "directory":
            if name != folder:  # A store may list a folder's own marker in it.
                yield from walk(fs, name)
        else:
            yield name, int(entry["size"]), _modified(entry)


def _modified(entry: dict[str, Any]) -> datetime.datetime:
    """Returns when an object was written; S3, memory, GCS and Azure each name that in their own way."""
    names = ("LastModified", "modified", "mtime", "last_modified", "created")
    value = next(entry[name] for name in names if entry.get(name))
    if isinstance(value, int | float):
        return datetime.datetime.fromtimestamp(value, datetime.UTC)
    return value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)


def _is_s3(fs: Any) -> bool:
    return "s3" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
