"""Every benchmark starts as a module of the package, from the root of a clone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("engine", "chaos", "manifest", "loader", "generation", "scenes")


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_starts_and_tells_its_options(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    if name != "scenes":
        assert "--quick" in done.stdout
        assert "--json" in done.stdout


def test_all_benchmarks_are_named() -> None:
    found = {path.stem for path in (ROOT / "benchmarks").iterdir()} - {"__init__", "__pycache__"}
    assert found == set(NAMES)
