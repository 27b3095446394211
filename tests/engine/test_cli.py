"""The command as people type it: exit codes, formats, messages of one line."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

PIPELINE = """
workspace: work
corpora:
  photos:
    source: photos
    modalities: {palette: {tokens: false}, caption: {tokens: false}}
engine: {runner: local, workers: 1}
"""


def modmill(*arguments: str, cwd: Path, env: dict[str, str] | None = None, text: bool = True, input: str | None = None):
    command = [str(Path(sys.executable).parent / "modmill"), *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=text, env={**os.environ, **(env or {})}, input=input, timeout=120
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_photos) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    make_photos(folder / "photos", 5)
    (folder / "pipeline.yaml").write_text(PIPELINE)
    done = modmill("run", "pipeline.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "done: 5 new samples" in done.stdout
    return folder


def test_a_second_run_says_that_there_is_nothing_to_do_without_ray(folder: Path) -> None:
    again = modmill("run", "pipeline.yaml", "--runner", "ray", cwd=folder)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert "Ray" not in again.stderr


def test_sql_answers_in_every_format(folder: Path, tmp_path: Path) -> None:
    query = "SELECT key, caption FROM captions ORDER BY key"
    rows = json.loads(modmill("sql", "work", query, "--format", "json", cwd=folder).stdout)
    assert len(rows) == 3
    found = list(csv.DictReader(io.StringIO(modmill("sql", "work", query, "--format", "csv", cwd=folder).stdout)))
    assert found == rows
    data = modmill("sql", "work", query, "--format", "parquet", cwd=folder, text=False).stdout
    (tmp_path / "answer.parquet").write_bytes(data)
    assert pq.read_table(tmp_path / "answer.parquet").to_pylist() == rows
    table = modmill("sql", "work", "-", cwd=folder, input=query).stdout
    assert rows[0]["caption"] in table
    assert "3 rows" in table


def test_status_and_verify(folder: Path) -> None:
    status = json.loads(modmill("status", "work", "--format", "json", cwd=folder).stdout)
    assert {(row["modality"], row["form"], row["missing"]) for row in status} == {
        ("palette", "label", 0),
        ("caption", "label", 0),
    }
    verified = modmill("verify", "work", cwd=folder)
    assert verified.returncode == 0
    assert verified.stdout.startswith("ok: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sql", "work", "SELECT nope FROM shards"], "nope"),
        (["sql", "work", "DELETE FROM log.shard"], "only read"),
        (["sql", "nowhere", "SELECT 1"], "no modmill workspace"),
        (["run", "missing.yaml"], "missing.yaml"),
        (["run", "pipeline.yaml", "--set", "corpora.photos.crop=3"], "corpora.photos.crop"),
        (["run", "pipeline.yaml", "--set", "corpora.photos.cropss=3"], "crops"),
        (["run", "pipeline.yaml", "--only", "tokenise"], "tokenize"),
        (["run", "pipeline.yaml", "--set", "corpora.photos.source=empty"], "empty"),
        (["runn"], "run"),
    ],
)
def test_the_users_mistakes_are_one_message_and_exit_2(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    answer = modmill(*arguments, cwd=folder)
    assert answer.returncode == 2, answer
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_verify_exits_1_where_something_is_wrong(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder / "work", tmp_path / "work")
    shard = sorted((tmp_path / "work/data/photos/palette").rglob("*.parquet"))[0]
    shard.write_bytes(b"rubbish")
    answer = modmill("verify", "work", cwd=tmp_path)
    assert answer.returncode == 1
    assert "WRONG: 1 findings" in answer.stdout
    found = json.loads(modmill("verify", "work", "--format", "json", cwd=tmp_path).stdout)
    assert found[0]["path"] == str(shard.relative_to(tmp_path / "work"))


def test_files_of_the_users_with_our_names_do_no_harm(folder: Path) -> None:
    (folder / "train.py").write_text("raise SystemExit('the wrong train')")
    (folder / "labelers").mkdir(exist_ok=True)
    (folder / "labelers/__init__.py").write_text("raise SystemExit('the wrong labelers')")
    assert modmill("status", "work", cwd=folder).returncode == 0
    named = modmill("status", "work", cwd=folder, env={"PYTHONPATH": str(folder)})
    assert named.returncode == 2
    assert "labelers" in named.stderr
    assert "PYTHONPATH" in named.stderr


def test_interrupting_ends_with_4_and_says_how_to_go_on(tmp_path: Path, make_photos) -> None:
    import signal
    import time

    make_photos(tmp_path / "photos", 60)
    (tmp_path / "pipeline.yaml").write_text(
        "workspace: work\ncorpora: {photos: {source: photos, part_rows: 2, modalities: {boxes: {tokens: false}}}}\n"
        "engine: {runner: local, workers: 1}\n"
    )
    command = [str(Path(sys.executable).parent / "modmill"), "run", "pipeline.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while time.monotonic() < until and not list((tmp_path / "work").glob("data/photos/boxes/*/*.parquet")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 4, stderr
    assert "the same command goes on" in stderr
    rows = json.loads(modmill("sql", "work", "SELECT status FROM runs", "--format", "json", cwd=tmp_path).stdout)
    assert rows == [{"status": "interrupted"}]
    assert modmill("run", "pipeline.yaml", cwd=tmp_path).returncode == 0
