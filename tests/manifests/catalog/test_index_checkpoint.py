"""Checkpoints of the log: what is rebuilt from one equals what the whole log says, and a bad one is passed over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.catalog import index_checkpoint
from manifests.catalog.catalog import Catalog
from manifests.log import entries as log
from manifests.log.lease import writer_lease
from manifests.store import paths
from manifests.store.storage import Storage, open_storage

VIEWS = ("corpora", "parts", "shards", "recipes", "coverage", "runs", "tokenizers", "lineage", "timeline", "forgotten")
Ask = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    uri = tmp_path / "work" if request.param == "disk" else f"{request.getfixturevalue('s3_bucket')}/{tmp_path.name}"
    made = open_storage(uri)
    log.create_workspace(made)
    return made


def grow(catalog: Catalog, make, first: int, commits: int) -> None:
    """Commits of a part and its shard; the first shard of all is made again in each."""
    for part in range(first, first + commits):
        again = make.shard(part=0, path=make.shard(part=part).path)
        catalog.commit([make.part(part=part), make.shard(part=part), again], run=f"r{part}")


def drop_index(storage: Storage, cache: Path) -> None:
    for file in (cache / log.workspace_id(storage)).glob("index-*"):
        file.unlink()


def test_an_index_from_a_checkpoint_is_the_logs(
    storage: Storage, make, answers: Ask, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_checkpoint, "_ENTRIES", 5)
    with writer_lease(storage, "r") as lease, Catalog(storage, lease=lease) as catalog:
        catalog.commit([make.run_started(), make.corpus(), make.current()], run="r")
        grow(catalog, make, 0, 13)
        expected = answers(catalog, (*VIEWS, "log.shard", "log.part"))
    assert index_checkpoint.versions(storage) == [5, 10]
    drop_index(storage, cache)
    read: list[int] = []
    plain_read = log._read

    def counting(storage: Storage, version: int) -> bytes | None:
        read.append(version)
        return plain_read(storage, version)

    monkeypatch.setattr(log, "_read", counting)
    with Catalog(storage) as rebuilt:
        assert answers(rebuilt, (*VIEWS, "log.shard", "log.part")) == expected
        assert rebuilt.version == 14
    assert min(read) == 10


def test_every_version_can_be_looked_at_from_a_checkpoint(storage: Storage, make, cache: Path) -> None:
    with Catalog(storage) as catalog:
        catalog.commit([make.corpus(), make.current()], run="r")
        grow(catalog, make, 0, 6)
        catalog._index.write_checkpoint()
    drop_index(storage, cache)
    for version in range(1, 8):
        with Catalog(storage, as_of=version) as then:
            assert len(then.parts("photos")) == version - 1
            assert len(then.live_shards()) == version - 1


def flipped(folder: Path) -> None:
    file = folder / "shard.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def unfinished(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


def without_a_table(folder: Path) -> None:
    (folder / "part.parquet").unlink()


def of_other_code(folder: Path) -> None:
    document = folder / "checkpoint.json"
    document.write_text(document.read_text().replace('"made_by":"', '"made_by":"0'))


def of_another_log(folder: Path) -> None:
    document = folder / "checkpoint.json"
    text = document.read_text().replace('"sha256":"', '"sha256":"00')
    document.write_text(text)
    sums = folder / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if "checkpoint.json" not in line]
    from manifests.recipe import sha256_hex

    sums.write_text("\n".join([*lines, f"{sha256_hex(text.encode())}  checkpoint.json"]) + "\n")


@pytest.mark.parametrize("damage", [flipped, unfinished, without_a_table, of_other_code, of_another_log])
def test_a_checkpoint_that_is_not_right_is_passed_over(
    workspace: Storage, make, answers: Ask, cache: Path, damage: Callable[[Path], None]
) -> None:
    with Catalog(workspace) as catalog:
        catalog.commit([make.corpus(), make.current()], run="r")
        grow(catalog, make, 0, 3)
        catalog._index.write_checkpoint()
        grow(catalog, make, 3, 2)
        expected = answers(catalog, VIEWS)
    damage(Path(workspace.full(paths.checkpoint(4))))
    drop_index(workspace, cache)
    with Catalog(workspace) as rebuilt:
        assert answers(rebuilt, VIEWS) == expected


def test_a_checkpoint_ahead_of_its_log_is_passed_over(workspace: Storage, make, cache: Path) -> None:
    with Catalog(workspace) as catalog:
        catalog.commit([make.corpus()], run="r")
        grow(catalog, make, 0, 3)
        catalog._index.write_checkpoint()
    for version in (3, 4):
        Path(workspace.full(paths.log_entry(version))).unlink()
    drop_index(workspace, cache)
    with Catalog(workspace) as rebuilt:
        assert rebuilt.version == 2
        assert len(rebuilt.parts("photos")) == 1


def test_checkpoints_stay_a_fraction_of_the_log() -> None:
    made, last = 0, 0
    for version in range(1, 200_001):
        if index_checkpoint.is_due(version, last):
            made, last = made + 1, version
    assert made < 60
    assert 200_000 - last <= 20_000
