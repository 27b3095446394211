"""Weights of labelers: where they are found, their digest, damage, object stores, the hub."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.pipeline import config
from engine.plan import corpus, weights
from manifests.errors import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint's folder, with files beside it that decide nothing."""
    made = tmp_path / "checkpoint"
    made.mkdir()
    save_file({"weight": np.arange(12, dtype=np.float32)}, made / "model.safetensors")
    (made / "config.json").write_text('{"model_type": "dinov2"}')
    (made / "README.md").write_text("what it is")
    (made / "pytorch_model.bin").write_bytes(b"the same as a pickle")
    return made


def test_the_digest_is_of_the_files_that_matter_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    found = weights.resolve(str(folder))
    assert (found.path, found.checkpoint) == (folder, str(folder))
    assert found.size_bytes == sum((folder / name).stat().st_size for name in ("model.safetensors", "config.json"))
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    (moved / "README.md").write_text("another text")
    (moved / "pytorch_model.bin").unlink()
    assert weights.fetch(str(moved), found.digest).path == moved
    (moved / "config.json").write_text('{"model_type": "other"}')
    assert weights.resolve(str(moved)).digest != found.digest


def test_a_single_file_has_its_own_sha256(folder: Path) -> None:
    file = folder / "model.safetensors"
    assert weights.resolve(str(file)).digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_digest_is_computed_once_for_a_files_size_and_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = weights.resolve(str(folder))
    file = folder / "model.safetensors"
    stat = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights.resolve(str(folder)).digest == found.digest
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert weights.resolve(str(folder)).digest != found.digest


def test_other_weights_than_planned_are_refused_with_both_digests(folder: Path) -> None:
    digest = weights.resolve(str(folder)).digest
    with pytest.raises(
        ConfigError, match=rf"digest {digest[:12]}, expected {'0' * 12}.*model\.safetensors [0-9a-f]{{12}}"
    ):
        weights.fetch(str(folder), "0" * 64)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_file_that_was_cut_short_is_named(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ConfigError, match=r"model\.safetensors: .*(cut short|no safetensors header)"):
        weights.resolve(str(folder))


def test_a_lacking_shard_of_the_weights_is_named(folder: Path) -> None:
    index = {"weight_map": {"weight": "model.safetensors", "other": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"has no model-2\.safetensors"):
        weights.resolve(str(folder))


def test_pickles_count_where_there_is_nothing_else(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert weights.resolve(str(folder)).size_bytes > 0
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        weights.resolve(str(folder))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/nowhere/at/all", "no such file or folder"),
        ("model.pt", "no such file or folder"),
        ("memory://no/weights", "nothing there"),
        ("nope://bucket/weights", "cannot be read"),
    ],
)
def test_what_is_not_there_is_said(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        weights.resolve(name)


def test_weights_of_an_object_store_are_fetched_once(folder: Path, s3_bucket: str) -> None:
    import fsspec

    uri = f"{s3_bucket}/weights/dinov2"
    fs, root = fsspec.core.url_to_fs(uri)
    for file in folder.iterdir():
        fs.put_file(str(file), f"{root}/{file.name}")
    local = weights.resolve(str(folder))
    found = weights.resolve(uri)
    assert (found.digest, found.checkpoint) == (local.digest, uri)
    assert {path.name for path in found.path.iterdir()} == {"model.safetensors", "config.json"}
    fetched_at = (found.path / "model.safetensors").stat().st_mtime_ns
    assert weights.fetch(uri, local.digest).path == found.path
    assert (found.path / "model.safetensors").stat().st_mtime_ns == fetched_at

    # A file there that was replaced is another checkpoint, and a single file is one too.
    fs.pipe_file(f"{root}/config.json", b"{}")
    fs.invalidate_cache()
    with pytest.raises(ConfigError, match="expected"):
        weights.fetch(uri, local.digest)
    assert weights.resolve(f"{uri}/model.safetensors").path.name == "model.safetensors"


def test_processes_fetch_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    """Four at once, and a half-fetched folder of one that was killed: one whole copy, and nobody sees less."""
    cache = tmp_path / "cache"
    code = "import sys; from engine.plan import weights; print(weights.resolve(sys.argv[1]).digest)"
    environment = {**os.environ, "MODMILL_CACHE": str(cache)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"file://{folder}"], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    outputs = [process.communicate()[0].strip() for process in running]
    assert outputs == [weights.resolve(str(folder)).digest] * 4
    copies = [path for path in (cache / "weights").iterdir() if path.is_dir() and path.name != "digests"]
    assert len(copies) == 1
    assert not copies[0].name.startswith(".")


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """A server that answers as the hub does, for one repository; its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            names = sorted(file.name for file in folder.iterdir())
            if self.path.startswith(f"/api/models/someone/tiny/tree/{COMMIT}"):
                sizes = {name: (folder / name).stat().st_size for name in names}
                files = [{"type": "file", "path": name, "size": sizes[name], "oid": "0" * 40} for name in names]
                self._answer(200, json.dumps(files).encode(), {"Content-Type": "application/json"})
                return
            if self.path.startswith("/api/models/someone/tiny/revision/"):
                found = {"id": "someone/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                self._answer(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
                return
            file = folder / self.path.rpartition("/")[2]
            if self.path.startswith(f"/someone/tiny/resolve/{COMMIT}/") and file.is_file():
                body = file.read_bytes()
                self._answer(200, body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT})
                return
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def resolve_elsewhere(name: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`resolve` in a process of its own: the hub's library reads its environment when it is imported."""
    code = (
        "import sys; from engine.plan import weights; from manifests.errors import ConfigError\n"
        "try:\n    found = weights.resolve(sys.argv[1]); print(found.digest, found.checkpoint)\n"
        "except ConfigError as error:\n    print(error); sys.exit(2)\n"
    )
    home = {"HF_HOME": str(cache / "hf"), "MODMILL_CACHE": str(cache / "own"), "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", code, name],
        env={**os.environ, **home, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_hub_id_is_fetched_once_and_pinned_to_its_commit(
    hub: tuple[str, list[str]], folder: Path, tmp_path: Path
) -> None:
    address, asked = hub
    digest = weights.resolve(str(folder)).digest
    ran = resolve_elsewhere("someone/tiny", tmp_path, HF_ENDPOINT=address)
    assert ran.stdout.split() == [digest, f"someone/tiny@{COMMIT}"], ran.stderr
    assert not [path for path in asked if "README" in path or "pytorch_model" in path]

    # From then on nothing is asked, and nothing needs a network.
    asked.clear()
    again = resolve_elsewhere("someone/tiny", tmp_path, HF_ENDPOINT=address)
    assert again.stdout == ran.stdout
    assert asked == []
    # What the library's cache holds is enough without our own note of it, under the commit as under the branch.
    shutil.rmtree(tmp_path / "own")
    offline = resolve_elsewhere(f"someone/tiny@{COMMIT}", tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT=address)
    assert offline.stdout == ran.stdout, offline.stderr


def test_a_hub_id_that_cannot_be_had_is_an_error_that_helps(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = hub
    lacking = resolve_elsewhere("someone/else", tmp_path, HF_ENDPOINT=address)
    assert lacking.returncode == 2
    assert "checkpoint someone/else@main cannot be fetched" in lacking.stdout
    assert "HF_TOKEN" in lacking.stdout
    offline = resolve_elsewhere("someone/tiny", tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE is set" in offline.stdout


# -- recipes ----------------------------------------------------------------------------------------------------------


def plan(tmp_path: Path, modalities: str) -> corpus.CorpusPlan:
    file = tmp_path / "p.yaml"
    file.write_text(f"workspace: ws\ncorpora:\n  p:\n    source: photos\n    modalities:\n{modalities}\n")
    loaded = config.load(file)
    config.check_labelers(loaded)
    return corpus.corpus_plan(loaded, "p", str(tmp_path / "photos"), {})


def test_recipes_hold_the_digest_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    shutil.copytree(folder, tmp_path / "weights/other")
    written = "      {}: {{labeler: dinov2, parameters: {{checkpoint: {}}}}}"
    plans = [
        plan(tmp_path, "\n".join(written.format(name, path) for name in ("dinov2", "dinov2_global")))
        for path in (folder, "./checkpoint", "weights/other")
    ]
    recipes = [made.modalities["dinov2"].label for made in plans]
    assert recipes[0] == recipes[1] == recipes[2]
    assert recipes[0].weights == weights.resolve(str(folder)).digest
    assert "checkpoint" not in recipes[0].parameters
    # One pass makes both modalities, and workers are told the place.
    (use,) = plans[2].labelers
    assert [output.name for output in use.outputs] == ["dinov2", "dinov2_global"]
    assert use.weights == recipes[0].weights
    assert use.parameters == {"checkpoint": str(tmp_path / "weights/other")}

    (folder / "config.json").write_text("{}")
    changed = plan(tmp_path, written.format("dinov2", folder)).modalities["dinov2"].label
    assert changed.fingerprint != recipes[0].fingerprint


def test_missing_weights_are_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"corpora\.p\.modalities\.dinov2: checkpoint \S*/no/such: no such file"):
        plan(tmp_path, "      dinov2: {parameters: {checkpoint: ./no/such}}")


def test_recipes_without_weights_are_what_they_were(tmp_path: Path) -> None:
    """Shards are found by these: a change here makes the shards of every workspace stale."""
    made = plan(tmp_path, "      rgb:\n      edges:\n      metadata:\n      palette:\n      boxes:\n      caption:")
    found = {name: modality.label.fingerprint[:12] for name, modality in made.modalities.items()}
    assert found == {
        "rgb": "d6c541c91490",
        "edges": "5f69fc45753d",
        "metadata": "7e3b8a45b5a4",
        "palette": "c23e5c0f1ab9",
        "boxes": "c5020eac43f8",
        "caption": "bfeb3fa10278",
    }
