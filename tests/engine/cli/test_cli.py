"""The command as people type it: exit codes, formats, messages of one line."""

import csv
import io
import json
import os
import pty
import signal
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


def test_sql_takes_its_query_from_standard_input_and_writes_to_a_file(folder: Path, tmp_path: Path) -> None:
    query = "-- a comment\nSELECT key, caption\nFROM captions ORDER BY key\n"
    rows = json.loads(modmill("sql", "work", "-", "--format", "json", cwd=folder, input=query).stdout)
    assert len(rows) == 3
    for name in ("a.parquet", "a.json", "a.csv", "a.txt"):
        done = modmill("sql", "work", "-", "--out", f"{tmp_path}/{name}", cwd=folder, input=query)
        assert (done.returncode, done.stdout) == (0, ""), done
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == rows
    assert json.loads((tmp_path / "a.json").read_text()) == rows
    assert list(csv.DictReader((tmp_path / "a.csv").open())) == rows
    assert (tmp_path / "a.txt").read_text().endswith("3 rows\n")


def test_tables_are_aligned_and_show_no_control_characters(folder: Path) -> None:
    query = "SELECT 'one' AS a, 12 AS b UNION ALL SELECT 'x' || chr(27) || chr(10), 3456 ORDER BY b"
    assert modmill("sql", "work", query, cwd=folder).stdout.splitlines() == [
        "a           b",
        "───────  ────",
        "one        12",
        r"x\x1b\n  3456",
        "2 rows",
    ]


def test_a_table_of_the_users_own_beside_the_samples(folder: Path, tmp_path: Path) -> None:
    keys = [
        row["key"] for row in json.loads(modmill("sql", "work", "FROM samples", "--format", "json", cwd=folder).stdout)
    ]
    (tmp_path / "scores.csv").write_text(
        "key,stars\n" + "".join(f"{key},{place}\n" for place, key in enumerate(keys[:2]))
    )
    query = ["SELECT s.key FROM samples s JOIN scores t USING (key) WHERE s.stars = 1", "--format", "json"]
    for more in ([], ["--locked"]):
        done = modmill("sql", "work", *query, "--attach", f"{tmp_path}/scores.csv:key", *more, cwd=folder)
        assert json.loads(done.stdout) == [{"key": keys[1]}], done
        assert "2 of 2 rows match" in done.stderr
    missing = modmill("sql", "work", *query, "--attach", "nothing.csv", cwd=folder)
    assert missing.returncode == 2
    assert "nothing.csv" in missing.stderr


def test_status_and_sql_as_of_a_version(folder: Path) -> None:
    def asked(*arguments: str) -> list[dict[str, object]]:
        return json.loads(modmill(*arguments, "--format", "json", cwd=folder).stdout)

    newest = asked("sql", "work", "SELECT max(version) AS version FROM timeline")[0]["version"]
    assert newest > 1
    assert asked("sql", "work", "SELECT version FROM timeline", "--as-of", "1") == [{"version": 1}]
    assert asked("status", "work", "--as-of", str(newest)) == asked("status", "work") != []
    assert asked("status", "work", "--as-of", "1") == []
    late = modmill("status", "work", "--as-of", "9999", cwd=folder)
    assert late.returncode == 2
    assert f"versions 1 to {newest}" in late.stderr


def test_locked_sql_answers_alike_and_refuses_in_one_line(folder: Path) -> None:
    query = "SELECT modality, sum(rows) AS rows, max(path) AS path FROM shards GROUP BY 1 ORDER BY 1"
    for form in ("table", "json"):
        plain = modmill("sql", "work", query, "--format", form, cwd=folder)
        assert modmill("sql", "work", query, "--format", form, "--locked", cwd=folder).stdout == plain.stdout != ""
    for attack, message in (
        ("FROM read_text('pipeline.yaml')", "refused: Permission Error"),
        ("SELECT list_sum(range(2000000000))", "took more than 2 GB"),
    ):
        answer = modmill("sql", "work", attack, "--locked", "--timeout", "20", cwd=folder)
        assert (answer.returncode, answer.stdout, answer.stderr.count("\n")) == (2, "", 1), answer
        assert message in answer.stderr
    slow = modmill(
        "sql", "work", "SELECT count(*) FROM range(1000000000000)", "--locked", "--timeout", "0.5", cwd=folder
    )
    assert slow.stderr == "modmill: stopped after 0.5 s; ask for less, or give more with --timeout\n"


@pytest.mark.parametrize("more", [[], ["--locked", "--timeout", "60"]], ids=["plain", "locked"])
def test_interrupting_a_query_that_never_ends_ends_with_4(folder: Path, more: list[str]) -> None:
    command = [
        str(Path(sys.executable).parent / "modmill"),
        "sql",
        "work",
        "SELECT count(*) FROM range(10000000000000)",
    ]
    modmill("sql", "work", "SELECT 1", *more, cwd=folder)
    process = subprocess.Popen([*command, *more], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=2.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    assert (process.returncode, stdout) == (4, ""), stderr
    assert stderr.startswith("interrupted")


def test_parquet_on_a_terminal_is_refused(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [str(Path(sys.executable).parent / "modmill"), "sql", "work", "SELECT 'a b' AS x", "--format"]
    try:
        refused = subprocess.run([*command, "parquet"], cwd=folder, stdout=theirs, stderr=subprocess.PIPE, timeout=60)
        assert refused.returncode == 2
        assert b"--out FILE" in refused.stderr
        shown = subprocess.run([*command, "table"], cwd=folder, stdout=theirs, stderr=subprocess.PIPE, timeout=60)
        assert shown.returncode == 0, shown.stderr
        text = os.read(ours, 10_000)
        assert b"a b" in text
        assert b"1 row" in text
    finally:
        os.close(ours)
        os.close(theirs)


def test_help_status_and_sql_import_little(folder: Path) -> None:
    program = str(Path(sys.executable).parent / "modmill")
    modmill("status", "work", cwd=folder)
    for arguments in (["--help"], ["sql", "--help"], ["status", "work"], ["sql", "work", "FROM captions"]):
        command = [sys.executable, "-X", "importtime", program, *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
        assert "click" in loaded
        heavy = {"torch", "ray", "transformers", "pydantic", "pandas", "numpy", "pyarrow", "rich", "yaml", "fsspec"}
        assert sorted(loaded & heavy) == [], arguments


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
        (["sql", "work"], "QUERY, or - to read it from standard input"),
        (["sql", "work", "SELECT 1 AS a, 2 AS a", "--format", "json"], "rename with AS"),
        (["status", "pipeline.yaml"], "pipeline.yaml is a file; a workspace is a folder"),
        (["run", "missing.yaml"], "missing.yaml"),
        (["run", "pipeline.yaml", "--set", "corpora.photos.crop=3"], "corpora.photos.crop"),
        (["run", "pipeline.yaml", "--set", "corpora.photos.cropss=3"], "crops"),
        (["run", "pipeline.yaml", "--only", "tokenise"], "tokenize"),
        (["run", "pipeline.yaml", "--ray", "127.0.0.1:1", "--set", "workspace=new"], "127.0.0.1:1 is out of reach"),
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
    assert not (folder / "new").exists(), "a cluster that is not there is told before anything is ingested"


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
