"""The commit log: read for ever, one chain, no version lost or doubled."""

import datetime
import inspect
import json
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from manifests.catalog.catalog import Catalog
from manifests.errors import LogError, WorkspaceError
from manifests.log import actions
from manifests.log import entries as log
from manifests.recipe import canonical_json, sha256_hex
from manifests.store import paths
from manifests.store.storage import Storage, open_storage

ROOT = Path(__file__).parents[3]

# A workspace of format 1, byte by byte, with an action and fields that this code does not know. It must be readable for
# ever: where a test below fails, the code is wrong, not these lines.
FORMAT_1 = (
    '{"format":1,"id":"0123456789abcdef0123456789abcdef","created_by":"modmill 0.1.0","time":"2026-11-23T10:00:00Z"}'
)
ENTRIES = (
    (
        '{"actions":[{"action":"run_started","commit":"abc123","config":{"engine":{"workers":2}},"host":"mill",'
        '"kind":"run","run":"r-one","time":"2026-11-23T10:00:00.000000Z","versions":{"duckdb":"2.0.0"}},'
        '{"action":"corpus","config":{"kind":"image"},"corpus":"photos","kind":"image","part_rows":2,"seed":7,'
        '"source":"pictures/über"},{"action":"part","corpus":"photos",'
        '"keys_sha256":"0202020202020202020202020202020202020202020202020202020202020202","part":0,'
        '"path":"data/photos/_samples/part-0000000-01010101.parquet","rows":2,'
        '"sha256":"0101010101010101010101010101010101010101010101010101010101010101","size_bytes":900,'
        '"source_bytes":123456}],"format":1,"previous":null,"run":"r-one","time":"2026-11-23T10:00:00.000001Z",'
        '"txn":"00000000000000000000000000000001","version":1}'
    ),
    (
        '{"actions":[{"action":"recipe","document":{"crop":null,"form":"token",'
        '"inputs":{"caption":"b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2b2"},'
        '"modality":"caption","parameters":{"size":224},"producer":"text","version":1,"weights":null},'
        '"fingerprint":"a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1"},{"action":"current",'
        '"corpus":"photos","crops":null,'
        '"fingerprint":"a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1","form":"token",'
        '"modality":"caption"},{"action":"tokenizer",'
        '"digest":"c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3c3","family":"text",'
        '"family_version":1,"metrics":{"chars_per_token":3.5},"name":"text","options":{"merges":100},'
        '"path":"tokenizers/text-c3c3c3c3c3c3","rows":2,"vocabulary":30000},{"action":"forgetting",'
        '"because":"an action of a later modmill","corpus":"photos","keys":["k1"]}],"format":1,'
        '"previous":"590717170d19606f3114c5c41bb629c123429a49c63a3c98c472c3def8ce4161","run":"r-one",'
        '"time":"2026-11-23T10:00:01.000000Z","txn":"00000000000000000000000000000002","version":2,'
        '"written_by":"a later modmill"}'
    ),
    (
        '{"actions":[{"absent":0,"action":"shard","corpus":"photos","crop":null,"device":"cpu","energy_j":12.5,'
        '"failed":1,"failed_path":"data/photos/caption/a1a1a1a1a1a1/part-0000000-03030303.failed.parquet",'
        '"failed_sha256":"0404040404040404040404040404040404040404040404040404040404040404",'
        '"fingerprint":"a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1a1","forgotten":0,'
        '"form":"token","format":"parquet",'
        '"keys_sha256":"0202020202020202020202020202020202020202020202020202020202020202","micro_batch":8,'
        '"modality":"caption","not_selected":0,"ok":1,"part":0,'
        '"path":"data/photos/caption/a1a1a1a1a1a1/part-0000000-03030303.parquet","rows":2,'
        '"sha256":"0303030303030303030303030303030303030303030303030303030303030303","size_bytes":700,'
        '"tokens":11,"vocabulary":30000},{"action":"sources_changed","changed":0,"corpus":"photos",'
        '"path":"data/photos/_changes/2.parquet","vanished":1},{"action":"run_ended","counts":{"ok_rows":1},'
        '"run":"r-one","status":"done","time":"2026-11-23T10:00:02.000000Z"}],"format":1,'
        '"previous":"1af1f057e51546c3332f8fe0d6105f65ebe7be768f3a20bc84e2057cb6229077","run":"r-two",'
        '"time":"2026-11-23T10:00:02.500000Z","txn":"00000000000000000000000000000003","version":3}'
    ),
)
SHA256S = (
    "590717170d19606f3114c5c41bb629c123429a49c63a3c98c472c3def8ce4161",
    "1af1f057e51546c3332f8fe0d6105f65ebe7be768f3a20bc84e2057cb6229077",
    "267e465b31e8b49cc02cea584aae9daa162c896a84c027711a0667d9c4026245",
)


@pytest.fixture
def frozen(tmp_path: Path) -> Storage:
    """The workspace of format 1, on disk."""
    storage = open_storage(tmp_path / "frozen")
    storage.put(paths.FORMAT, FORMAT_1.encode())
    for version, entry in enumerate(ENTRIES, start=1):
        storage.put(paths.log_entry(version), entry.encode())
    return storage


def append(storage: Storage, *new: actions.Action, run: str = "r") -> log.Entry | None:
    """Commits after the newest entry."""
    newest = list(log.entries(storage))[-1:]
    after, previous = (newest[0].version, newest[0].sha256) if newest else (0, None)
    return log.append(storage, [actions.to_json(action) for action in new], run=run, after=after, previous=previous)


# -- format 1 ---------------------------------------------------------------------------------------------------------


def test_format_1_is_read_for_ever(frozen: Storage) -> None:
    assert log.workspace_id(frozen) == "0123456789abcdef0123456789abcdef"
    first, second, third = log.entries(frozen)
    assert (first.version, first.run, first.time, first.previous) == (1, "r-one", "2026-11-23T10:00:00.000001Z", None)
    assert (second.txn, second.previous) == ("0" * 31 + "2", first.sha256)
    assert (first.sha256, second.sha256, third.sha256) == SHA256S
    known = [actions.from_json(document) for entry in (first, second, third) for document in entry.actions]
    assert known == [
        actions.RunStarted(
            run="r-one",
            kind="run",
            time="2026-11-23T10:00:00.000000Z",
            host="mill",
            commit="abc123",
            versions={"duckdb": "2.0.0"},
            config={"engine": {"workers": 2}},
        ),
        actions.CorpusAdded(
            corpus="photos",
            kind="image",
            source="pictures/über",
            seed=7,
            part_rows=2,
            config={"kind": "image"},
        ),
        actions.PartAdded(
            corpus="photos",
            part=0,
            rows=2,
            path="data/photos/_samples/part-0000000-01010101.parquet",
            sha256="01" * 32,
            size_bytes=900,
            keys_sha256="02" * 32,
            source_bytes=123456,
        ),
        actions.RecipeAdded(
            fingerprint="a1" * 32,
            document={
                "modality": "caption",
                "form": "token",
                "producer": "text",
                "version": 1,
                "weights": None,
                "parameters": {"size": 224},
                "crop": None,
                "inputs": {"caption": "b2" * 32},
            },
        ),
        actions.RecipeCurrent(corpus="photos", modality="caption", form="token", fingerprint="a1" * 32, crops=None),
        actions.TokenizerAdded(
            name="text",
            digest="c3" * 32,
            path="tokenizers/text-c3c3c3c3c3c3",
            family="text",
            family_version=1,
            vocabulary=30000,
            options={"merges": 100},
            rows=2,
            metrics={"chars_per_token": 3.5},
        ),
        None,
        actions.ShardAdded(
            corpus="photos",
            part=0,
            crop=None,
            modality="caption",
            form="token",
            fingerprint="a1" * 32,
            path="data/photos/caption/a1a1a1a1a1a1/part-0000000-03030303.parquet",
            format="parquet",
            sha256="03" * 32,
            size_bytes=700,
            rows=2,
            ok=1,
            failed=1,
            absent=0,
            not_selected=0,
            forgotten=0,
            keys_sha256="02" * 32,
            failed_path="data/photos/caption/a1a1a1a1a1a1/part-0000000-03030303.failed.parquet",
            failed_sha256="04" * 32,
            tokens=11,
            vocabulary=30000,
            device="cpu",
            micro_batch=8,
        ),
        actions.SourcesChanged(corpus="photos", path="data/photos/_changes/2.parquet", vanished=1, changed=0),
        actions.RunEnded(run="r-one", time="2026-11-23T10:00:02.000000Z", status="done", counts={"ok_rows": 1}),
    ]


def test_a_catalog_of_format_1_answers_for_ever(frozen: Storage) -> None:
    with Catalog(frozen) as catalog:
        assert catalog.version == 3
        shown = catalog.status().to_pylist()
        assert [(row["modality"], row["done"], row["ok"], row["failed"], row["tokens"]) for row in shown] == [
            ("caption", 1, 1, 1, 11)
        ]
        assert catalog.sql("SELECT status, time_s FROM runs").to_pylist() == [{"status": "done", "time_s": 2.0}]
        assert catalog.sql("SELECT samples, vanished FROM corpora").to_pylist() == [{"samples": 2, "vanished": 1}]
        assert catalog.sql("SELECT actions FROM timeline").column(0).to_pylist() == [3, 4, 3]


def test_a_commit_goes_on_from_format_1(frozen: Storage) -> None:
    entry = append(frozen, actions.RunEnded(run="r-two", time=log.now(), status="done"))
    assert entry is not None
    assert (entry.version, entry.previous) == (4, SHA256S[2])
    assert json.loads(frozen.read("_meta/log/00000000000000000004.json"))["format"] == 1


# -- actions ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_action_stands_in_the_frozen_log() -> None:
    frozen = {document["action"] for entry in ENTRIES for document in json.loads(entry)["actions"]}
    # Kinds that came after the log was frozen.
    assert frozen >= set(actions.ACTIONS) - {"snapshot", "shards_retired", "forgotten", "samples_dropped"}


def test_actions_come_back_from_json_as_they_were(make) -> None:
    for action in (make.corpus(), make.part(), make.current(crops=2), make.shard(crop=1), make.run_started()):
        assert actions.from_json(json.loads(canonical_json(actions.to_json(action)))) == action


def test_fields_that_an_older_writer_did_not_know_have_their_defaults(make) -> None:
    document = actions.to_json(make.shard(device="cuda", micro_batch=4, tokens=5))
    for field in ("device", "micro_batch", "tokens", "vocabulary", "failed_path", "not_selected", "forgotten"):
        del document[field]
    assert actions.from_json(document) == make.shard()


def test_an_action_without_a_field_it_needs_is_an_error(make) -> None:
    document = actions.to_json(make.part())
    del document["rows"]
    with pytest.raises(LogError, match="'part' in the log has no field 'rows'"):
        actions.from_json(document)


# -- the chain --------------------------------------------------------------------------------------------------------


def test_entries_form_one_chain(workspace: Storage, make) -> None:
    for part in range(3):
        assert append(workspace, make.part(part=part)) is not None
    assert workspace.names(paths.LOG) == [f"{version:020d}.json" for version in (1, 2, 3)]
    first, second, third = log.entries(workspace)
    assert first.previous is None
    assert second.previous == first.sha256 == sha256_hex(workspace.read(paths.log_entry(1)))
    assert third.previous == second.sha256
    assert len({first.txn, second.txn, third.txn}) == 3
    assert first.time <= second.time <= third.time
    assert list(log.entries(workspace, after=2, previous=second.sha256)) == [third]


def test_a_version_that_is_taken_is_not_written(workspace: Storage, make) -> None:
    first = append(workspace, make.part())
    assert first is not None
    before = workspace.read(paths.log_entry(1))
    assert log.append(workspace, [actions.to_json(make.corpus())], run="late", after=0, previous=None) is None
    assert workspace.read(paths.log_entry(1)) == before


def test_an_altered_entry_is_found_and_named(frozen: Storage) -> None:
    path = Path(frozen.full(paths.log_entry(2)))
    path.write_bytes(path.read_bytes().replace(b'"crops":null', b'"crops":7   '))
    with pytest.raises(LogError, match=r"00000000000000000003\.json follows an entry of sha256 .* but entry 2 has"):
        list(log.entries(frozen))
    with pytest.raises(LogError, match=r"00000000000000000003\.json"):
        Catalog(frozen)


def test_an_entry_of_another_chain_is_found_and_named(frozen: Storage) -> None:
    path = Path(frozen.full(paths.log_entry(1)))
    path.write_bytes(ENTRIES[0].replace("r-one", "r-two").encode())
    with pytest.raises(LogError, match=r"00000000000000000002\.json"):
        list(log.entries(frozen))


@pytest.mark.parametrize("missing", [1, 2])
def test_a_gap_is_found_and_named(frozen: Storage, missing: int) -> None:
    os.unlink(frozen.full(paths.log_entry(missing)))
    with pytest.raises(LogError, match=rf"{missing:020d}\.json is missing, but entry 3 stands"):
        list(log.entries(frozen))


def test_a_log_that_ends_earlier_is_no_gap(frozen: Storage) -> None:
    os.unlink(frozen.full(paths.log_entry(3)))
    assert [entry.version for entry in log.entries(frozen)] == [1, 2]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        ENTRIES[1].encode()[:200],
        b"[]",
        b"null",
        b"\xff\xfe",
        ENTRIES[1].replace('"version":2', '"version":3').encode(),
        ENTRIES[1].replace('"txn"', '"tx"').encode(),
        ENTRIES[1].replace('"format":1', '"format":"1"').encode(),
        b'{"format":1,"version":2,"txn":"t","run":"r","time":"t","previous":null,"actions":"none"}',
        b'{"format":1,"version":2,"txn":"t","run":"r","time":"t","previous":null,"actions":[1]}',
    ],
)
def test_an_entry_that_cannot_be_read_is_named(frozen: Storage, data: bytes) -> None:
    Path(frozen.full(paths.log_entry(2))).write_bytes(data)
    with pytest.raises(LogError, match=r"00000000000000000002\.json cannot be read"):
        list(log.entries(frozen))


def test_a_newer_format_of_the_workspace_is_refused(frozen: Storage) -> None:
    Path(frozen.full(paths.FORMAT)).write_text(FORMAT_1.replace('"format":1', '"format":2'))
    with pytest.raises(WorkspaceError, match="has format 2, this modmill reads up to format 1; install a newer"):
        Catalog(frozen)


def test_a_newer_format_of_an_entry_is_refused(frozen: Storage) -> None:
    Path(frozen.full(paths.log_entry(2))).write_text(ENTRIES[1].replace('"format":1', '"format":2'))
    with pytest.raises(WorkspaceError, match=r"00000000000000000002\.json has format 2.*install a newer"):
        list(log.entries(frozen))


# -- workspaces -------------------------------------------------------------------------------------------------------


def test_a_folder_without_a_workspace(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"is no modmill workspace .*modmill run FILE"):
        log.workspace_id(open_storage(tmp_path))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "one", "id": "x"}', '{"format": 1}'])
def test_a_broken_format_file_is_named(tmp_path: Path, text: str) -> None:
    storage = open_storage(tmp_path)
    storage.put(paths.FORMAT, text.encode())
    with pytest.raises(WorkspaceError, match=r"format"):
        log.workspace_id(storage)


def test_creating_a_workspace_twice_keeps_its_id(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "work")
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(log.create_workspace(storage))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert set(found) == {log.workspace_id(storage)}
    document = json.loads(storage.read(paths.FORMAT))
    assert document["format"] == 1
    assert len(document["id"]) == 32


def test_a_store_that_replaces_what_stands_is_refused() -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class Careless(MemoryFileSystem):
        """Knows no conditional writes, as some stores that speak S3."""

        store: ClassVar[dict] = {}

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
            super().pipe_file(path, value, **options)

    storage = Storage(uri="memory://w", fs=Careless(), root="/w")
    for _ in range(2):
        with pytest.raises(WorkspaceError, match="memory://w: this store replaces files that stand"):
            log.create_workspace(storage)
        assert list(storage.walk("")) == []


def test_times_are_utc_and_sort_as_text() -> None:
    before, after = log.now(), log.now()
    assert before <= after
    assert before.endswith("Z")
    assert abs(datetime.datetime.fromisoformat(before) - datetime.datetime.now(datetime.UTC)).total_seconds() < 60


# -- many writers -----------------------------------------------------------------------------------------------------


def write_many(storage: Storage, me: str, count: int) -> None:
    """Commits `count` entries, each after the newest one, trying again where another writer was first."""
    for number in range(count):
        document = {"action": "run_ended", "run": f"{me}-{number}", "time": log.now(), "status": "done", "counts": {}}
        after, previous = 0, None
        while True:
            for entry in log.entries(storage, after=after, previous=previous):
                after, previous = entry.version, entry.sha256
            if log.append(storage, [document], run=me, after=after, previous=previous):
                break


def check_all_there(storage: Storage, writers: int, count: int) -> None:
    found = list(log.entries(storage))
    assert [entry.version for entry in found] == list(range(1, writers * count + 1))
    runs = [entry.actions[0]["run"] for entry in found]
    assert sorted(runs) == sorted(f"w{writer}-{number}" for writer in range(writers) for number in range(count))
    for writer in range(writers):
        own = [run for run in runs if run.startswith(f"w{writer}-")]
        assert own == [f"w{writer}-{number}" for number in range(count)]


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_threads_that_write_one_log_lose_and_double_nothing(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = tmp_path if store == "disk" else f"{request.getfixturevalue('s3_bucket')}/{secrets.token_hex(8)}"
    storage = open_storage(uri)
    count = 20 if store == "disk" else 2
    threads = [threading.Thread(target=write_many, args=(storage, f"w{writer}", count)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_all_there(storage, 3, count)


WRITER = f"""
import sys
from manifests.log import entries as log
from manifests.store.storage import Storage, open_storage
{inspect.getsource(write_many)}
print("ready", flush=True)
sys.stdin.readline()
write_many(open_storage(sys.argv[1]), sys.argv[2], 15)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdin=-1, stdout=-1, text=True, cwd=ROOT)


def test_processes_that_write_one_log_lose_and_double_nothing(workspace: Storage) -> None:
    writers = [start(WRITER, workspace.uri, f"w{number}") for number in range(2)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n")
        assert writer.returncode == 0
    check_all_there(workspace, 2, 15)


def test_an_entry_whose_first_answer_got_lost_is_ours(make) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class LosesAnswers(MemoryFileSystem):
        """Writes, loses the answer, writes again, and is told that the name is taken."""

        store: ClassVar[dict] = {}

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
            super().pipe_file(path, value, mode=mode, **options)
            if mode == "create":
                super().pipe_file(path, value, mode=mode, **options)

    storage = Storage(uri="memory://w", fs=LosesAnswers(), root="/w")
    entry = append(storage, make.part())
    assert entry is not None
    assert [found.txn for found in log.entries(storage)] == [entry.txn]


def test_a_file_is_no_place_for_a_workspace(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("notes")
    with pytest.raises(WorkspaceError, match="is a file, and a workspace is a folder"):
        log.create_workspace(open_storage(tmp_path / "notes.md"))
