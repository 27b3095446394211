"""Places that do not work as usual: no home, a mount that cannot be written, a disk that fails, a space in a path."""

import errno
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from PIL import Image

import engine.cli
from manifests.commands import command
from manifests.recipe import sha256_hex
from manifests.store import storage as stores
from manifests.store.storage import cache_folder

PIPELINE = """
workspace: {workspace}
corpora:
  photos:
    source: photos
    modalities: {{metadata: {{keep: true, tokens: false}}}}
engine: {{runner: local, workers: 1}}
"""


def modmill(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        engine.cli.main(list(arguments))
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def pipeline_file(folder: Path, workspace: str) -> Path:
    (folder / "photos").mkdir(parents=True)
    Image.new("RGB", (64, 48), "red").save(folder / "photos/a.png")
    (folder / "photos/broken.png").write_bytes((folder / "photos/a.png").read_bytes()[:60])
    file = folder / "p.yaml"
    file.write_text(PIPELINE.format(workspace=workspace))
    return file


@pytest.fixture
def file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A pipeline that ran, in a workspace with a space in its name."""
    file = pipeline_file(tmp_path / "here", "my ws")
    file.write_text(file.read_text().replace("workers: 1", "workers: 1, max_failed_fraction: 1"))
    assert modmill("run", str(file), capsys=capsys)[0] == 0
    return file


def printed(text: str) -> list[list[str]]:
    """The commands in a text, as a shell would read them."""
    lines = (line[line.index("modmill ") :] for line in text.splitlines() if "modmill " in line)
    return [shlex.split(line.partition("`")[0])[1:] for line in lines]


def test_printed_commands_can_be_pasted(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = str(file.parent / "my ws")
    _, out, _ = modmill("run", str(file), "--failed", capsys=capsys)
    commands = printed(out)
    assert [words[:2] for words in commands] == [["sql", workspace], ["status", workspace]]
    for words in commands:
        assert modmill(*words, capsys=capsys)[0] == 0, words
    keys = file.parent / "keys.txt"
    keys.write_text(sha256_hex((file.parent / "photos/a.png").read_bytes()))
    _, out, _ = modmill("forget", workspace, "--keys", str(keys), "--yes", capsys=capsys)
    assert f"modmill forget '{workspace}' --collect --yes" in out


@pytest.mark.parametrize(
    "word", ["plain", "a b", "it's", "SELECT 'a'", "$HOME", "it's $HOME", 'say "x"', "a'b\"c", "", "!1'"]
)
def test_a_word_of_a_command_comes_back_from_a_shell(word: str) -> None:
    shown = command("sql", word)
    assert subprocess.run(
        ["bash", "-c", f"printf '%s' {shown[len('modmill sql ') :]}"], capture_output=True
    ).stdout == (word.encode())


def test_a_user_without_a_home_has_a_cache(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pwd

    def unknown(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "MODMILL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == cache_folder()
    assert cache_folder().stat().st_mode & 0o777 == 0o700
    assert modmill("sql", str(file.parent / "my ws"), "SELECT count(*) FROM samples", capsys=capsys)[0] == 0
    assert modmill("run", str(file), capsys=capsys)[0] == 0
    assert modmill("doctor", capsys=capsys)[0] in (0, 1)


@pytest.fixture
def read_only(file: Path) -> Iterator[Path]:
    """The pipeline file and its workspace on a mount that cannot be written."""
    place = file.parent.parent / "ro"
    place.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(["mount", "--bind", str(file.parent), str(place)], capture_output=True).returncode
    )
    if not mounted or subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], capture_output=True).returncode:
        pytest.skip("only who may mount a file system has one that cannot be written")
    yield place / file.name
    subprocess.run(["umount", str(place)], check=True)


def test_a_read_only_mount_is_said_in_one_line(read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = str(read_only.parent / "my ws")
    keys = read_only.parent.parent / "keys.txt"
    keys.write_text(sha256_hex((read_only.parent / "photos/a.png").read_bytes()))
    Image.new("RGB", (64, 48), "blue").save(read_only.parent.parent / "here/photos/new.png")
    for words in (
        ["run", str(read_only)],
        ["snapshot", workspace, "s"],
        ["forget", workspace, "--keys", str(keys), "--yes"],
        ["forget", workspace, "--collect", "--yes"],
        ["init", str(read_only.parent / "photos"), "--out", str(read_only.parent / "new.yaml")],
    ):
        code, _, said = modmill(*words, capsys=capsys)
        assert (code, said.count("\n")) == (2, 1), (words, said)
        assert "Read-only file system" in said, said
    for words in (["sql", workspace, "FROM samples"], ["status", workspace], ["verify", workspace]):
        assert modmill(*words, capsys=capsys)[0] == 0, words


@pytest.mark.parametrize(
    "words", [["run", "FILE"], ["snapshot", "WORKSPACE", "s"], ["sql", "WORKSPACE", "FROM samples"]]
)
def test_a_disk_that_fails_is_said_in_one_line(
    file: Path, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = file.parent / "my ws"
    Image.new("RGB", (64, 48), "blue").save(file.parent / "photos/new.png")

    def fails(path: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(stores, "_sync_folder", fails)
    if words[0] == "sql":
        read = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: fails(path) if "_meta" in str(path) else read(path))
    code, _, said = modmill(
        *(word.replace("FILE", str(file)).replace("WORKSPACE", str(workspace)) for word in words), capsys=capsys
    )
    assert (code, said.count("\n")) == (2, 1), said
    assert "Input/output error" in said
