"""Drivers that are killed at every step of a commit, one or two at a time, until all is done: what stands then.

The drivers and their kills are in `crash_driver.py`; here are the rounds, and the checker, which believes only the log.
"""

import collections
import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manifests.catalog.catalog import Catalog
from manifests.errors import LogError
from manifests.log import actions
from manifests.log import entries as log
from manifests.recipe import sha256_hex
from manifests.store import paths
from manifests.store.storage import Storage, open_storage

ROOT = Path(__file__).parents[3]
PROGRAM = Path(__file__).parents[1] / "crash_driver.py"
CRASHES = 300
MOST_ROUNDS = 60


def load_program() -> Any:
    """The program of the drivers as a module, for its words."""
    specification = importlib.util.spec_from_file_location("crash_driver", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["crash_driver"] = module
    specification.loader.exec_module(module)
    return module


crash_driver = load_program()


class Rounds:
    """Runs rounds in the program of drivers, each in a workspace of its own, and checks what they leave."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, make: Any, answers: Callable[..., Any]) -> None:
        self._process = process
        self._folder = folder
        self._make = make
        self._answers = answers

    def run(self, seed: int, **fields: Any) -> tuple[dict[str, int], list[str]]:
        """One round: how many lives each kill ended, and what is wrong afterwards."""
        folder = self._folder / f"round-{seed}"
        paths = {"uri": str(folder / "work"), "cache": str(folder / "cache"), "acks": str(folder / "acks")}
        given = crash_driver.Round(seed=seed, **paths, **fields)
        self._prepare(given)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(dataclasses.asdict(given)), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        if answer["errors"]:
            return answer["kills"], [f"a driver failed: {answer['errors']}", *check_log(given)]
        return answer["kills"], check_log(given) or check_indexes(given, self._answers)

    def _prepare(self, given: Any) -> None:
        """A workspace with a corpus and its parts."""
        storage = open_storage(given.uri)
        log.create_workspace(storage)
        samples = [
            self._make.samples_file(storage, "photos", part, {}, crash_driver.keys_of(part))
            for part in range(given.parts)
        ]
        recipes = [
            self._make.current(modality=name, fingerprint=sha256_hex(name.encode()))
            for name in crash_driver.MODALITY_NAMES
        ]
        documents = [actions.to_json(action) for action in (self._make.corpus(), *samples, *recipes)]
        assert log.append(storage, documents, run="setup", after=0, previous=None)
        Path(given.acks).touch()


def check_log(given: Any) -> list[str]:
    """What is wrong with the log and the files: it is dense and chained, they are whole, every task is done, and what
    was acknowledged is there."""
    storage = open_storage(given.uri)
    try:
        entries = list(log.entries(storage))
    except LogError as error:
        return [str(error)]
    wrong = []
    if storage.names(paths.LOG) != [f"{version:020d}.json" for version in range(1, len(entries) + 1)]:
        wrong.append("the log has a gap")
    added = {entry.version: [action for action in entry.actions if action["action"] == "shard"] for entry in entries}
    committed = collections.Counter((shard["part"], shard["modality"]) for found in added.values() for shard in found)
    if set(committed) != given.tasks():
        wrong.append(f"tasks were lost: {sorted(given.tasks() - set(committed))}")
    if (given.lease or given.drivers == 1) and set(committed.values()) != {1}:
        wrong.append(f"tasks were committed twice by writers that took turns: {committed}")
    runs = {entry.version: entry.run for entry in entries}
    for ack in map(json.loads, Path(given.acks).read_text().splitlines()):
        version = ack["version"]
        if runs.get(version) != ack["run"] or [shard["path"] for shard in added[version]] != ack["paths"]:
            wrong.append(f"acknowledged, but lost: {ack}")
    wrong += [problem for shards in added.values() for shard in shards for problem in check_files(storage, shard)]
    # Shards that no entry names are whole too: whoever makes them again adopts them.
    for path in sorted(Path(given.uri, "data").rglob("part-*-????????.parquet")):
        if sha256_hex(path.read_bytes())[:8] != path.stem[-8:]:
            wrong.append(f"{path} is not what its name says")
    return wrong


def check_files(storage: Storage, shard: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the files of a record of the log; those of a replaced one stand too."""
    data = storage.read(shard["path"])
    if (len(data), sha256_hex(data)) != (shard["size_bytes"], shard["sha256"]):
        yield f"{shard['path']} is not what the log says"
    if shard["failed_path"] and sha256_hex(storage.read(shard["failed_path"])) != shard["failed_sha256"]:
        yield f"{shard['failed_path']} is not what the log says"
    sidecar = json.loads(storage.read(shard["path"].replace(".parquet", ".json")))
    if {"action": "shard", **sidecar["shard"]} != shard:
        yield f"the sidecar of {shard['path']} says otherwise than the log"


def check_indexes(given: Any, answers: Callable[..., Any]) -> list[str]:
    """In which views the drivers' indexes, and one from a checkpoint, say otherwise than one from the log alone."""
    storage = open_storage(given.uri)
    checkpoints, aside = Path(storage.full(paths.CHECKPOINTS)), Path(storage.full("_meta/aside"))
    with pytest.MonkeyPatch.context() as patch:

        def opened(folder: str | Path) -> Catalog:
            patch.setenv("MODMILL_CACHE", str(Path(given.cache) / folder))
            return Catalog(storage)

        if checkpoints.exists():
            checkpoints.rename(aside)
        with opened("made from the log") as catalog:
            expected = answers(catalog)
            live = [(shard.part, shard.modality) for shard in catalog.live_shards()]
            wrong = [] if sorted(live) == sorted(given.tasks()) else [f"not every task has one live shard: {live}"]
        folders = {given.cache_of(driver) for driver in range(given.drivers)}
        if aside.exists():
            aside.rename(checkpoints)
            folders.add("made from a checkpoint")
        for folder in folders:
            files = list((Path(given.cache) / folder).rglob("index-*.duckdb"))
            # Held together, the catalogs take up one file each.
            catalogs = [opened(folder) for _ in range(max(1, len(files)))]
            for catalog in catalogs:
                found = answers(catalog)
                wrong += [f"{folder}: {view} is not the log's" for view in found if found[view] != expected[view]]
                catalog.close()
    return wrong


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory, make: Any, answers: Callable[..., Any]) -> Iterator[Rounds]:
    with subprocess.Popen([sys.executable, PROGRAM], stdin=-1, stdout=-1, text=True, cwd=ROOT) as process:
        yield Rounds(process, tmp_path_factory.mktemp("crashes"), make, answers)
        process.kill()


def test_no_crash_loses_or_doubles_anything(rounds: Rounds) -> None:
    kills: collections.Counter[str] = collections.Counter()
    seed = 0
    while kills.total() < CRASHES or not kills.keys() >= {*crash_driver.POINTS, crash_driver.TIMER}:
        assert seed < MOST_ROUNDS, f"after {seed} rounds only {kills}"
        fields = {
            "drivers": 1 if seed % 8 == 7 else 2,
            "lease": seed % 2 == 1,
            "same_bytes": seed % 3 > 0,
            "shared_cache": seed % 5 < 3,
        }
        found, wrong = rounds.run(seed, **fields)
        assert not wrong, f"rounds.run({seed}, **{fields}) after {found}: {wrong}"
        kills.update(found)
        seed += 1


@pytest.mark.parametrize("broken", crash_driver.BROKEN)
def test_a_broken_protocol_is_caught(rounds: Rounds, broken: str) -> None:
    seed = 1000 * (1 + list(crash_driver.BROKEN).index(broken))
    for number in range(12):
        # An early acknowledgement does harm when its driver is killed; where two write, it is wrong at once.
        _, wrong = rounds.run(seed + number, broken=broken, drivers=1 if broken == "early acknowledgement" else 2)
        if wrong:
            return
    pytest.fail(f"12 rounds of {broken!r} look as they should")
