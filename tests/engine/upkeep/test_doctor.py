import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from engine.upkeep import doctor
from labelers import protocol
from modmill import LabelerSpec


def checks_by_name(folder: Path) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.report(folder)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "cache"))


def test_a_machine_that_works(tmp_path: Path) -> None:
    checks = checks_by_name(tmp_path)
    assert [check for check in checks.values() if check.ok is False] == []
    assert checks["modmill"].value == metadata.version("modmill")
    assert checks["duckdb"].value == metadata.version("duckdb")
    assert checks["python"].value.startswith("3.")
    assert checks["cores"].value == str(len(os.sched_getaffinity(0)))
    assert checks["free disk"].value.endswith(f"at {tmp_path}")
    assert (tmp_path / "cache").is_dir()
    assert {f"labeler {name}" for name in protocol.names()} <= set(checks)


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert checks_by_name(tmp_path / "not" / "yet")["free disk"].value.endswith(f"at {tmp_path}")


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("MODMILL_CACHE", str(tmp_path / "taken"))
    check = checks_by_name(tmp_path)["cache folder"]
    assert check.ok is False
    assert "MODMILL_CACHE" in check.advice


def test_gpus_as_nvidia_smi_tells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771 MiB'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert checks_by_name(tmp_path)["GPUs"].value == "NVIDIA H200, 143771 MiB"
    command.write_text("#!/bin/sh\necho 'no driver' >&2\nexit 9\n")
    assert checks_by_name(tmp_path)["GPUs"].value == "none"


def test_a_running_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert checks_by_name(tmp_path)["Ray cluster"].value.startswith("none running")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379\n")
    assert checks_by_name(tmp_path)["Ray cluster"].value == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert checks_by_name(tmp_path)["Ray cluster"].value == "ray://head:10001"


def spec_with(checkpoint: str | None = None, requires: tuple[str, ...] = ()) -> LabelerSpec:
    return LabelerSpec(
        name="mine", version=1, scope="crop", outputs=("depth",), checkpoint=checkpoint, requires=requires
    )


def test_what_a_labeler_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert doctor.labeler_check(spec_with()).ok is True
    check = doctor.labeler_check(spec_with(requires=("json", "no_such_package", "none.such")))
    assert (check.ok, check.value) == (None, "missing: no_such_package, none.such")
    check = doctor.labeler_check(spec_with("some/model"))
    assert (check.ok, check.value) == (None, "missing: its weights, some/model")
    (tmp_path / "hub" / "models--some--model" / "snapshots" / "0123").mkdir(parents=True)
    assert doctor.labeler_check(spec_with("some/model")).ok is True
    (tmp_path / "weights.pt").touch()
    assert doctor.has_weights(spec_with(str(tmp_path / "weights.pt")))


def test_findings_as_text() -> None:
    text = doctor.text(
        [
            doctor.Check(name="a", value="1", ok=True),
            doctor.Check(name="longer", value="none", ok=None, advice="get one"),
            doctor.Check(name="b", value="2", ok=False, advice="mend it"),
        ]
    )
    assert text.splitlines() == ["ok     a       1", "-      longer  none  → get one", "WRONG  b       2  → mend it"]


def test_nothing_heavy_is_imported() -> None:
    code = "import sys\nfrom engine.upkeep import doctor\ndoctor.report()\nprint(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
