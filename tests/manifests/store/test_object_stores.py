"""A workspace on S3 behind a network that fails one request in five: nothing acknowledged is lost, nothing stands twice."""

import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from manifests.catalog.catalog import Catalog
from manifests.errors import WorkspaceError
from manifests.log import entries as log
from manifests.log.lease import writer_lease
from manifests.recipe import sha256_hex
from manifests.store import object_store, paths
from manifests.store.storage import Storage, open_storage, put_same
from tests.manifests.fault_proxy import FAULTS, FaultProxy, Spoiled


@pytest.fixture
def spoiled(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Spoiled]:
    """What is between the tests and S3 from here on; no faults yet. The client's waits are cut short."""
    import botocore.retries.standard
    import s3fs

    server = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    spoiled = Spoiled(slow_s=0.8)
    proxy = FaultProxy((str(server.hostname), int(server.port or 80)), spoiled)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setitem(object_store.S3_CLIENT, "read_timeout", 0.6)
    monkeypatch.setattr(botocore.retries.standard.ExponentialBackoff, "delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(object_store, "_CONFLICT_WAITS_S", (0.01,) * 6)
    s3fs.S3FileSystem.clear_instance_cache()  # Those at hand know the way past the proxy.
    yield spoiled
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.close()


@pytest.fixture
def store(s3_bucket: str, spoiled: Spoiled) -> Storage:
    return open_storage(f"{s3_bucket}/{secrets.token_hex(8)}")


def start_faults(spoiled: Spoiled, share: float, *kinds: str, seed: int = 0) -> None:
    spoiled.seed, spoiled.share, spoiled.kinds = seed, share, kinds or FAULTS
    spoiled.__post_init__()


# -- a whole workspace ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1])
def test_a_workspace_survives_a_bad_network(
    store: Storage, spoiled: Spoiled, make, monkeypatch: pytest.MonkeyPatch, tmp_path, seed: int
) -> None:
    parts = 64
    start_faults(spoiled, 0.2, seed=seed)
    log.create_workspace(store)
    acknowledged: dict[int, int] = {}
    with writer_lease(store, "r") as held, Catalog(store, lease=held) as catalog:
        catalog.commit([make.corpus(), *(make.part(part=part) for part in range(parts))], run="r")
        for part in range(parts):
            data = part.to_bytes(4, "big") * 1000
            sha256 = sha256_hex(data)
            path = make.shard(part=part, sha256=sha256).path
            put_same(store, path, data, sha256)
            record = make.shard(part=part, path=path, sha256=sha256, size_bytes=len(data))
            acknowledged[part] = catalog.commit([record], run="r")
        seen = {shard.part for shard in catalog.live_shards()}
    # Another machine reads it, over the same network.
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "elsewhere"))
    with Catalog(store) as reader:
        assert reader.version == parts + 1
        shards = reader.live_shards()
    assert {shard.part for shard in shards} == seen == set(range(parts))
    assert all(sha256_hex(store.read(shard.path)) == shard.sha256 for shard in shards)
    spoiled.share = 0.0
    entries = list(log.entries(store))
    assert [entry.version for entry in entries] == list(range(1, parts + 2))
    written = [
        (action["part"], entry.version) for entry in entries for action in entry.actions if "fingerprint" in action
    ]
    assert written == list(acknowledged.items())
    assert sum(spoiled.faults.values()) > 0.1 * spoiled.requests
    assert set(spoiled.faults) == set(FAULTS)
    assert len(spoiled.puts) > 2 * parts
    assert spoiled.wrong_checksums == []


def test_two_writers_without_a_lease_lose_and_double_nothing(store: Storage, spoiled: Spoiled, make) -> None:
    log.create_workspace(store)
    start_faults(spoiled, 0.2, seed=3)
    failed: list[BaseException] = []

    def write(me: str) -> None:
        try:
            previous, after = None, 0
            for number in range(20):
                while True:
                    action = {"action": "note", "writer": me, "number": number}
                    entry = log.append(store, [action], run=me, after=after, previous=previous)
                    if entry is not None:
                        previous, after = entry.sha256, entry.version
                        break
                    for entry in log.entries(store, after=after, previous=previous):
                        previous, after = entry.sha256, entry.version
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    spoiled.share = 0.0
    notes = [entry.actions[0] for entry in log.entries(store)]
    assert Counter(note["writer"] for note in notes) == {"a": 20, "b": 20}
    for name in "ab":
        assert [note["number"] for note in notes if note["writer"] == name] == list(range(20))


@pytest.mark.parametrize("seed", range(5))
def test_of_takers_over_a_bad_network_exactly_one_holds(store: Storage, spoiled: Spoiled, seed: int) -> None:
    start_faults(spoiled, 0.2, seed=seed)
    line, over = threading.Barrier(2), threading.Barrier(2)
    ends: list[str] = []

    def take(name: str) -> None:
        line.wait()
        try:
            with writer_lease(store, name):
                ends.append("held")
                over.wait()
        except WorkspaceError as error:
            ends.append(str(error))
            over.wait()

    threads = [threading.Thread(target=take, args=(f"r-{number}",)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted("is being written by r-" in end for end in ends) == [False, True]
    assert "held" in ends


def test_a_lease_whose_first_answer_got_lost_is_held(store: Storage, spoiled: Spoiled) -> None:
    start_faults(spoiled, 0.5, "dropped")
    for epoch in range(1, 7):
        with writer_lease(store, f"r-{epoch}") as held:
            held.check()
            assert store.names(paths.LEASES) == [f"{epoch:020d}.json"]
    assert sum(fault == "dropped" and status == 200 for _, status, fault in spoiled.puts) > 3


# -- one operation at a time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAULTS)
def test_every_operation_survives_every_fault(store: Storage, spoiled: Spoiled, kind: str) -> None:
    data = os.urandom(100_000)
    start_faults(spoiled, 0.3, kind, seed=1)
    for number in range(3):
        path = f"folder/{number}"
        put_same(store, path, data, sha256_hex(data))
        assert store.exists(path)
        assert not store.exists("folder/none")
        assert store.size(path) == len(data)
        assert store.read(path) == data
        with store.open(path) as file:
            file.seek(50_000)
            assert file.read(10) == data[50_000:50_010]
    assert store.names("folder") == ["0", "1", "2"]
    assert [file.path for file in store.walk("")] == [f"folder/{number}" for number in range(3)]
    store.remove("folder/2")
    assert store.names("folder") == ["0", "1"]
    assert sum(spoiled.faults.values()) > 3


@pytest.mark.parametrize("kind", ["slow_down", "internal", "reset", "dropped"])
def test_a_store_that_stays_away_is_told_in_words(store: Storage, spoiled: Spoiled, kind: str) -> None:
    store.put("a/stands", b"1")
    start_faults(spoiled, 1.0, kind)
    before = spoiled.requests
    for ask, doing in (
        (lambda: store.read("a/stands"), "read"),
        (lambda: store.put("a/new", b"2"), "written"),
        (lambda: store.names("a"), "listed"),
    ):
        with pytest.raises(
            WorkspaceError, match=rf"^{store.uri}/a.* cannot be {doing} \(.*then give the same command again"
        ):
            ask()
    assert spoiled.requests - before < 200  # Patience has an end.
    spoiled.share = 0.0
    assert store.read("a/stands") == b"1"
    assert store.put("a/new", b"2") is (kind != "dropped")  # Unknown to us, that one had been applied.


def test_a_body_that_is_cut_off_is_never_taken_for_whole(store: Storage, spoiled: Spoiled) -> None:
    data = os.urandom(1_000_000)
    store.put("a", data)
    start_faults(spoiled, 1.0, "truncated")
    with pytest.raises(WorkspaceError, match="a cannot be read"):
        store.read("a")
    start_faults(spoiled, 0.4, "truncated", seed=5)
    assert all(store.read("a") == data for _ in range(5))
    assert spoiled.faults["truncated"]


def test_a_put_is_one_conditional_request_with_a_checksum(store: Storage, spoiled: Spoiled) -> None:
    assert store.put("a/b/c", b"data") is True
    assert store.put("a/b/c", b"other") is False
    assert store.read("a/b/c") == b"data"
    path = f"/{store.full('a/b/c')}"
    assert spoiled.puts == [(path, 200, ""), (path, 412, "")]
    assert spoiled.requests == 3
    assert spoiled.wrong_checksums == []


def test_a_big_file_is_one_request_too(s3_bucket: str) -> None:
    store = open_storage(f"{s3_bucket}/{secrets.token_hex(8)}")
    data = bytes(101 << 20)  # From 100 MiB on, s3fs would upload it in pieces.
    assert store.put("big", data) is True
    assert "-" not in store.fs.info(store.full("big"))["ETag"]
    assert store.put("big", data) is False
    assert store.size("big") == len(data)
    store.remove("big")


def test_no_bucket_is_told_and_none_is_made(s3_bucket: str) -> None:
    store = open_storage("s3://no-such-bucket/work")
    with pytest.raises(WorkspaceError, match=r"s3://no-such-bucket/work/a cannot be written.*make the bucket"):
        store.put("a", b"1")
    with pytest.raises(FileNotFoundError):
        store.read("a")
    with pytest.raises(WorkspaceError, match="no modmill workspace"):
        Catalog(store)
