"""Files are created whole, once, or not at all: on a disk, in memory and on S3."""

import datetime
import errno
import io
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from manifests.errors import ShardError, WorkspaceError
from manifests.recipe import sha256_hex
from manifests.store.storage import Storage, open_storage, put_same

ROOT = Path(__file__).parents[3]


@pytest.fixture(params=["disk", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "disk":
        return open_storage(tmp_path / "work")
    if request.param == "memory":
        return open_storage(f"memory://{secrets.token_hex(8)}/work")
    return open_storage(f"{request.getfixturevalue('s3_bucket')}/{secrets.token_hex(8)}")


@pytest.fixture
def disk(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "work")


def every_file(folder: Path) -> list[str]:
    """All files under a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class Breaks(io.BytesIO):
    """A stream that fails after its first MiB."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 0:
            raise OSError(errno.EIO, "the disk under the source is gone")
        return super().read(1 << 20 if size is None or size < 0 else size)


# -- on every store ---------------------------------------------------------------------------------------------------


def test_put_creates_once_and_never_replaces(storage: Storage) -> None:
    assert storage.put("a/b/one.json", b"first") is True
    assert storage.put("a/b/one.json", b"second, which is longer") is False
    assert storage.read("a/b/one.json") == b"first"
    assert storage.size("a/b/one.json") == 5
    assert storage.exists("a/b/one.json")
    assert not storage.exists("a/b/two.json")


def test_put_takes_a_whole_stream_from_its_start(storage: Storage) -> None:
    data = os.urandom(3_000_001)
    stream = io.BytesIO(data)
    stream.seek(0, io.SEEK_END)
    assert storage.put("stream.bin", stream) is True
    assert storage.read("stream.bin") == data
    with storage.open("stream.bin") as file:
        file.seek(1_500_000)
        assert file.read(10) == data[1_500_000:1_500_010]


def test_a_stream_that_breaks_leaves_nothing(storage: Storage) -> None:
    with pytest.raises(OSError, match="source is gone"):
        storage.put("folder/broken.bin", Breaks(bytes(3 << 20)))
    assert not storage.exists("folder/broken.bin")
    assert storage.names("folder") == []
    assert storage.put("folder/broken.bin", b"whole") is True


def test_names_are_sorted_and_hide_what_is_hidden(storage: Storage) -> None:
    for name in ("c.json", ".hidden.json.123.tmp", "a.json", "sub/b.json"):
        assert storage.put(f"folder/{name}", b"x")
    assert storage.names("folder") == ["a.json", "c.json", "sub"]
    assert storage.names("no/such/folder") == []


def test_a_file_that_is_not_there(storage: Storage) -> None:
    for ask in (storage.read, storage.open, storage.size):
        with pytest.raises(FileNotFoundError):
            ask("nowhere.json")


def test_replace_and_remove_folder(storage: Storage) -> None:
    storage.replace("scratch/state", b"one")
    storage.replace("scratch/state", b"two, longer")
    assert storage.read("scratch/state") == b"two, longer"
    assert storage.names("scratch") == ["state"]
    storage.remove_folder("scratch")
    assert storage.names("scratch") == []
    storage.remove_folder("scratch")


def test_walk_finds_every_file_below_a_folder(storage: Storage) -> None:
    assert list(storage.walk("")) == []
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=2)
    for name in ("a/two", "a/.hidden.123.tmp", "a/b/c/three", "ab", "d"):
        assert storage.put(name, name.encode())
    found = list(storage.walk(""))
    assert {file.path: file.size_bytes for file in found} == {
        name: len(name) for name in ("a/.hidden.123.tmp", "a/b/c/three", "a/two", "ab", "d")
    }
    assert [file.path for file in storage.walk("a")] == ["a/.hidden.123.tmp", "a/b/c/three", "a/two"]
    assert [file.path for file in storage.walk("a/b/")] == ["a/b/c/three"]
    assert list(storage.walk("nowhere")) == []
    for file in found:
        assert file.modified.tzinfo is datetime.UTC
        assert before <= file.modified <= datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2)


def test_a_removed_file_is_gone_and_its_name_is_free(storage: Storage) -> None:
    storage.put("a/one", b"1")
    storage.put("a/two", b"2")
    storage.remove("a/one")
    storage.remove("a/one")
    storage.remove("no/such/file")
    assert [file.path for file in storage.walk("")] == ["a/two"]
    assert storage.put("a/one", b"again") is True


def test_put_same_adopts_an_equal_file_and_refuses_another(storage: Storage) -> None:
    put_same(storage, "data/x", b"content", sha256_hex(b"content"))
    put_same(storage, "data/x", io.BytesIO(b"content"), sha256_hex(b"content"))
    assert storage.read("data/x") == b"content"
    with pytest.raises(ShardError, match=r"data/x holds sha256 [0-9a-f]{12}, expected .*altered or truncated"):
        put_same(storage, "data/x", b"other", sha256_hex(b"other"))
    assert storage.read("data/x") == b"content"


@pytest.mark.parametrize("storage", ["disk", "s3"], indirect=True)
def test_of_many_threads_that_put_one_name_exactly_one_wins(storage: Storage) -> None:
    for name in ("one", "two", "three"):
        start = threading.Barrier(6)
        wins: list[bytes] = []

        def put(number: int, name: str = name, start: threading.Barrier = start, wins: list[bytes] = wins) -> None:
            data = b"%d" % number * 1000
            start.wait()
            if storage.put(f"race/{name}", data):
                wins.append(data)

        threads = [threading.Thread(target=put, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wins == [storage.read(f"race/{name}")]
    assert storage.names("race") == ["one", "three", "two"]


def test_location_is_what_others_open(storage: Storage) -> None:
    import fsspec

    storage.put("plain/file", b"seen")
    fs, path = fsspec.url_to_fs(storage.location("plain/file"))
    assert fs.cat_file(path) == b"seen"


# -- on a disk --------------------------------------------------------------------------------------------------------

RACER = """
import json, sys, time
from manifests.store.storage import open_storage
storage, me = open_storage(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps([n for n in range(60) if storage.put(f"race/{n}", me.encode() * 100)]))
"""


@pytest.fixture
def start(disk: Storage) -> Iterator[object]:
    """Starts Python on a script with the storage's root and more arguments; killed at the end."""
    running: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, disk.uri, *arguments]
        running.append(subprocess.Popen(command, stdin=-1, stdout=-1, text=True, cwd=ROOT))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate()


def test_of_many_processes_that_put_one_name_exactly_one_wins(disk: Storage, start) -> None:
    racers = [start(RACER, name) for name in "abc"]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    wins = {name: json.loads(racer.communicate()[0]) for name, racer in zip("abc", racers, strict=True)}
    assert sorted(number for numbers in wins.values() for number in numbers) == list(range(60))
    for name, numbers in wins.items():
        for number in numbers:
            assert disk.read(f"race/{number}") == name.encode() * 100
    assert every_file(Path(disk.root)) == sorted(f"race/{number}" for number in range(60))


def test_no_temporary_file_stays(disk: Storage) -> None:
    disk.put("a", b"1")
    disk.put("a", b"2")
    disk.replace("b", b"1")
    with pytest.raises(OSError, match="source is gone"):
        disk.put("c", Breaks(bytes(3 << 20)))
    assert every_file(Path(disk.root)) == ["a", "b"]


KILLED = """
import io, os, signal, sys
from manifests.store.storage import open_storage

class Kills(io.BytesIO):
    def read(self, size=-1):
        if self.tell() > 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(size)

open_storage(sys.argv[1]).put("data/shard", Kills(bytes(3 << 20)))
"""


def test_a_killed_put_leaves_no_file_of_that_name(disk: Storage, start) -> None:
    assert start(KILLED).wait() == -signal.SIGKILL
    assert disk.names("data") == []
    assert disk.put("data/shard", b"whole") is True
    assert disk.names("data") == ["shard"]


def test_a_new_file_and_the_folders_to_it_are_synced(disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))[1])
    disk.put("data/photos/shard", b"x")
    root = Path(disk.root)
    folders = {str(path) for path in (root.parent, root, root / "data", root / "data" / "photos")}
    assert folders <= set(synced)
    assert any(".shard." in path for path in synced)


def test_walk_follows_a_link_to_another_disk_once(disk: Storage, tmp_path: Path) -> None:
    disk.put("data/photos/shard", b"x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "far").write_bytes(b"y")
    (Path(disk.root) / "data" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(disk.root)
    (Path(disk.root) / "data" / "dangling").symlink_to(tmp_path / "nowhere")
    assert [file.path for file in disk.walk("")] == ["data/linked/far", "data/photos/shard"]


def test_a_file_whose_maker_was_killed_is_synced_by_who_adopts_it(
    disk: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.put("data/shard", b"x")
    synced: list[str] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))[1])
    assert disk.put("data/shard", b"x") is False
    assert synced == [disk.full("data")]


def test_a_disk_without_hard_links_is_refused_in_words(disk: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(WorkspaceError, match="no hard links"):
        disk.put("a", b"1")
    assert every_file(Path(disk.root)) == []


def test_a_file_is_readable_by_others_as_the_umask_says(disk: Storage) -> None:
    before = os.umask(0o022)
    try:
        disk.put("a", b"1")
    finally:
        os.umask(before)
    assert os.stat(disk.full("a")).st_mode & 0o777 == 0o644


# -- on S3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["s3"], indirect=True)
def test_what_another_process_writes_is_seen(storage: Storage) -> None:
    import s3fs

    storage.put("log/1", b"1")
    assert storage.names("log") == ["1"]
    assert not storage.exists("log/2")
    s3fs.S3FileSystem(skip_instance_cache=True).pipe_file(storage.full("log/2"), b"2")
    assert storage.exists("log/2")
    assert storage.size("log/2") == 1
    assert storage.names("log") == ["1", "2"]
    assert storage.put("log/2", b"mine") is False


def test_a_store_that_refuses_in_other_words_is_understood() -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class SaysInvalid(MemoryFileSystem):
        """Answers 412 as s3fs passes it on where the store names no condition."""

        store: ClassVar[dict] = {}

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
            if mode == "create":
                raise OSError(errno.EINVAL, "At least one of the pre-conditions you specified did not hold")
            super().pipe_file(path, value, mode=mode, **options)

    fs = SaysInvalid()
    fs.pipe_file("/w/taken", b"x")
    storage = Storage(uri="memory://w", fs=fs, root="/w")
    assert storage.put("taken", b"y") is False
    with pytest.raises(WorkspaceError, match=r"memory:///w/free cannot be written \(OSError: .*pre-conditions"):
        storage.put("free", b"y")


# -- names of workspaces ----------------------------------------------------------------------------------------------


def test_folders_and_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for uri in ("work", "./work/", tmp_path / "work", f"file://{tmp_path}/work"):
        assert open_storage(uri).root == str(tmp_path / "work")
        assert open_storage(uri).is_local
    assert open_storage("~/work").root == str(tmp_path / "home" / "work")
    assert not open_storage("memory://work").is_local
    assert not (tmp_path / "work").exists()


def test_an_unknown_scheme_is_the_users_mistake() -> None:
    with pytest.raises(WorkspaceError, match=r"foo://bucket/work.*modmill\[s3\]"):
        open_storage("foo://bucket/work")
