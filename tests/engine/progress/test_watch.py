"""A run seen from another process: `modmill status`, with and without `--watch`, of runs that live, end and are killed."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.progress import watch
from manifests.errors import WorkspaceError
from manifests.log import entries as log
from manifests.store.storage import open_storage

# A run that tells how far it is, and ends as its standard input says.
DRIVER = """
import sys
sys.path.insert(0, {tests!r})
from test_progress import beat, item, result, MADE
from engine.progress.record import recorded
from manifests.log import entries as log
from manifests.store.storage import open_storage
storage = open_storage(sys.argv[1])
log.create_workspace(storage)
try:
    with recorded(storage, "run", {{}}, quiet=True) as execution:
        told = execution.progress
        told.plan(dict.fromkeys(MADE, 4), 1, 2.5)
        told.workers("", 1, 1)
        for number in range(2):
            told.started(item(number), "w0")
            told.done_items([(item(number), result(item(number)))])
        told.started(item(2), "w0")
        told.beat("w0", beat(item(2).name, 42))
        told.workers("", 1, 2)  # What follows a beat is written by the next flush with it.
        told.alarm("alarm (drift): look")
        print("going", flush=True)
        for line in sys.stdin:
            if line == "raise\\n":
                raise ValueError("it broke")
            if line == "end\\n":
                break
            told.done_items([(item(2), result(item(2)))])
except ValueError:
    pass
"""

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Begins a run in a process of its own; it is killed at the end of the test."""
    drivers: list[subprocess.Popen[str]] = []

    def begin(workspace: str) -> "subprocess.Popen[str]":
        code = DRIVER.format(tests=str(Path(__file__).parent))
        driver = subprocess.Popen(
            [sys.executable, "-c", code, workspace], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        drivers.append(driver)
        assert driver.stdout
        assert driver.stdout.readline() == "going\n"
        return driver

    yield begin
    for driver in drivers:
        driver.kill()
        driver.wait()


def tell(driver: "subprocess.Popen[str]", word: str) -> None:
    assert driver.stdin
    driver.stdin.write(f"{word}\n")
    driver.stdin.flush()


def modmill(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from engine.cli.entry import main; main(sys.argv[1:])", *arguments]


def until(condition: Callable[[], bool]) -> None:
    by = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < by
        time.sleep(0.05)


def test_status_tells_of_a_run_at_work_and_of_one_that_was_killed(tmp_path: Path, start: Start) -> None:
    workspace = str(tmp_path / "work")
    storage = open_storage(workspace)
    driver = start(workspace)
    until(lambda: "1 alarm" in watch.head(storage))
    asked = subprocess.run(modmill("status", workspace), capture_output=True, text=True, check=True)
    assert re.match(r"run-\w+-\w+ is running: 0:0\d  4/8 parts 50 %.* 1 alarm .*depth 2/4  edges 2/4", asked.stderr)
    assert asked.stdout.startswith("corpus")
    asked = subprocess.run(modmill("status", workspace, "--format", "json"), capture_output=True, text=True, check=True)
    assert asked.stderr == ""
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert re.fullmatch(
        r"run-\S+ was killed at 0:0\d of its time\. The same command again goes on from there", watch.head(storage)
    )
    tell(again := start(workspace), "end")
    again.wait()
    assert watch.head(storage) == ""


def test_three_watch_one_run_by_lines_on_a_terminal_and_until_ctrl_c(tmp_path: Path, start: Start) -> None:
    workspace = str(tmp_path / "work")
    driver = start(workspace)
    command = modmill("status", workspace, "--watch")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "40", "TERM": "xterm-256color"}
    by_lines = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    on_terminal = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    left = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert by_lines.stdout
    assert left.stdout
    assert "4/8 parts" in by_lines.stdout.readline()
    assert "4/8 parts" in left.stdout.readline()
    left.send_signal(signal.SIGINT)
    assert left.communicate(timeout=10)[1] == ""
    assert left.returncode == 0
    assert driver.poll() is None
    written = b""

    def shows(text: bytes) -> bool:
        nonlocal written
        written += os.read(ours, 65536)
        return text in written

    until(lambda: shows(b"photos/0000002/light"))
    tell(driver, "more")
    tell(driver, "raise")
    until(lambda: shows(b" ended: failed (ValueError: it broke)"))
    assert on_terminal.wait(10) == 0
    os.close(ours)
    table = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode()).replace("\r", "\n")
    table = table[table.rindex("modality") :]
    assert re.search(r"depth +3/4 +75 %", table)
    assert "\nalarm (drift): look" in table
    lines = by_lines.stdout.read().splitlines()
    assert by_lines.wait() == 0
    assert "6/8 parts 75 %" in lines[-2]
    assert re.fullmatch(r"run-\S+ ended: failed \(ValueError: it broke\)", lines[-1])


def test_a_killed_run_is_told_from_one_that_is_only_silent(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "_ASK_S", 0.2)
    monkeypatch.setattr(watch, "_SILENT_S", 0.4)
    monkeypatch.setattr(watch, "_LINE_EVERY_S", 0.1)
    storage = open_storage(tmp_path / "work")
    driver = start(storage.uri)
    watched = watch.newest(storage)
    assert watched
    until(lambda: watched.silent_s > 0.5)
    assert re.search(r"no sign of life for 0:0\d, but its process holds the workspace", watched.word())
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    watch.watch(storage)
    assert re.search(r"was killed: no sign of life for .*, and it holds the workspace no more", capsys.readouterr().out)


def test_a_run_on_an_object_store_is_seen_from_anywhere(s3_bucket: str, start: Start) -> None:
    storage = open_storage(f"{s3_bucket}/watched")
    driver = start(storage.uri)
    until(lambda: "is running: " in watch.head(storage))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    # The holder was of this machine, and its process is gone.
    assert " was killed " in watch.head(storage)


def test_where_nothing_ran_there_is_nothing_to_watch(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError):
        watch.watch(open_storage(tmp_path / "none"))
    storage = open_storage(tmp_path / "work")
    log.create_workspace(storage)
    assert watch.head(storage) == ""
    with pytest.raises(WorkspaceError, match="no run has told anything yet"):
        watch.watch(storage)
    refused = subprocess.run(
        modmill("status", storage.uri, "--watch", "--as-of", "1"), capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "--watch" in refused.stderr
