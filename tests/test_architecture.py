"""Holds the rules of docs/design.md: who imports whom, which code holds SQL and Ray, what stays small."""

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifests.catalog.catalog import Catalog
from manifests.log import actions
from manifests.log import entries as log
from manifests.store.storage import open_storage

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine", "labelers", "tokenize_jobs", "train", "manifests")
MODULES = [*sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")), ROOT / "modmill.py"]
# Promised views, and the experimental ones that our own code may ask too, since it changes with them.
HEADINGS = re.findall(r"^### (.*)", (ROOT / "docs" / "manifest.md").read_text(), re.MULTILINE)
VIEWS = {name for heading in HEADINGS for name in re.findall(r"`(\w+)`", heading)}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> set[str]:
    """The packages that a module imports anywhere in it."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found


def texts(path: Path) -> Iterator[str]:
    """The strings of a module; an f-string as one, with {} for what it fills in."""
    inside = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.JoinedStr):
            inside |= {id(piece) for piece in node.values}
            yield "".join(str(piece.value) if isinstance(piece, ast.Constant) else "{}" for piece in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


# -- arrows -----------------------------------------------------------------------------------------------------------


def test_the_arrows_between_packages_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_ray_is_imported_where_it_lives_and_nowhere_else() -> None:
    with_ray = {name_of(path) for path in MODULES if "ray" in imports(path)}
    assert with_ray >= {"engine/run/runners/ray/runner.py"}
    for name in with_ray:
        assert re.fullmatch(r"engine/run/runners/ray/\w+\.py", name), f"{name} imports ray"


def test_duckdb_is_imported_in_manifests_only() -> None:
    with_duckdb = {name_of(path) for path in MODULES if "duckdb" in imports(path)}
    assert with_duckdb >= {"manifests/catalog/catalog.py"}
    assert {name.partition("/")[0] for name in with_duckdb} == {"manifests"}


# -- SQL --------------------------------------------------------------------------------------------------------------

STATEMENT = re.compile(
    r"\b(?:SELECT\b.*\bFROM\b|INSERT INTO\b|UPDATE\b.*\bSET\b|DELETE FROM\b|CREATE (?:OR REPLACE |TEMP )*(?:TABLE|VIEW)\b"
    r"|DROP (?:TABLE|VIEW)\b|COPY\b.*\bTO\b|ATTACH\b|PRAGMA\b)",
    re.DOTALL,
)


def queries(path: Path) -> list[str]:
    """The texts of a module that hold SQL; its keywords are written in capitals."""
    return [text for text in texts(path) if STATEMENT.search(text)]


def test_sql_that_knows_the_tables_stands_in_manifests() -> None:
    knowing = {name_of(path) for path in MODULES if any(re.search(r"\blog\.\w+", text) for text in queries(path))}
    assert {name.partition("/")[0] for name in knowing} == {"manifests"}


def test_sql_elsewhere_selects_from_views_as_any_script_may() -> None:
    for path in MODULES:
        name = name_of(path)
        found = [] if name.startswith("manifests/") else queries(path)
        assert not found or name.startswith("engine/") or name == "modmill.py", f"{name} holds SQL: {found[0]}"
        for query in found:
            for start in STATEMENT.findall(query):
                assert start.startswith("SELECT"), f"{name} writes: {query}"
            own = set(re.findall(r"\b(\w+) AS \(", query))
            asked = set(re.findall(r"\b(?:FROM|JOIN) ([A-Za-z_.]+)", query))
            assert asked <= VIEWS | own, (
                f"{name} asks {asked - VIEWS - own}, which are no views that it may ask: {query}"
            )


# -- sizes and places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "benchmarks").rglob("*.py"))], ids=name_of)
def test_no_module_is_over_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def test_tests_are_no_package_and_mirror_the_folders() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= {*PACKAGES, "benchmarks", "examples", "data"}


ROOMS = re.compile(r"^  ([a-z_, ]+?)  +(\S.*)$", re.MULTILINE)


@pytest.mark.parametrize("package", ["engine", "tokenize_jobs", "train", "manifests"])
def test_a_package_names_its_rooms_and_the_readme_says_the_same(package: str) -> None:
    folder = ROOT / package
    said = ROOMS.findall(re.sub("^", "  ", ast.get_docstring(tree(folder / "__init__.py")) or "", flags=re.MULTILINE))
    named = {name for names, _ in said for name in names.split(", ")}
    # A clone that is not new may hold bytecode in folders that are gone.
    shown = {path.stem for path in folder.iterdir() if path.is_file() or any(path.glob("*.py"))} - {"__init__"}
    assert named == shown
    block = re.search(rf"^{package}/ .*\n((?:  .*\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert block
    assert ROOMS.findall(block[1]) == said


def test_a_folder_shows_at_most_15_names() -> None:
    for package in PACKAGES:
        for folder in [ROOT / package, *(path for path in (ROOT / package).rglob("[!_]*") if path.is_dir())]:
            names = {path.name for path in folder.iterdir()} - {"__init__.py", "__pycache__"}
            # Shelves of equals, in which a file is found by its name.
            assert len(names) <= 15 or name_of(folder) in ("labelers", "engine/cli"), (
                f"{name_of(folder)}: {sorted(names)}"
            )


# -- what a start loads -----------------------------------------------------------------------------------------------

LOADED = """
import json, os, sys
try:
    exec(sys.argv[1])
except SystemExit as end:
    assert not end.code, end.code
names = sorted({name.partition(".")[0] for name in sys.modules})
os.write(2, ("LOADED " + json.dumps(names)).encode())
"""


def loaded_by(code: str, cwd: Path, *arguments: str) -> tuple[set[str], str]:
    """The top-level packages that a fresh Python has loaded after some code, and what the code wrote."""
    command = [sys.executable, "-c", LOADED, code, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.rpartition("LOADED ")[2])), done.stdout


HEAVY = {"torch", "torchvision", "ray", "transformers", "pandas", "cv2", "PIL", "skimage", "moto", "s3fs"}


def test_the_catalog_starts_light() -> None:
    loaded, _ = loaded_by("import manifests.catalog.catalog", ROOT)
    assert "duckdb" in loaded
    assert sorted(loaded & {*HEAVY, "pydantic", "click", "rich", "yaml", "labelers", "engine", "train"}) == []


def test_modmill_alone_loads_nothing_of_ours() -> None:
    loaded, _ = loaded_by("import modmill", ROOT)
    assert sorted(loaded & {*HEAVY, "pydantic", "duckdb", "pyarrow", "numpy", "manifests", "engine"}) == []


def test_the_help_loads_nothing_that_it_does_not_show() -> None:
    loaded, output = loaded_by("import engine.cli; engine.cli.main(['--help'])", ROOT)
    assert sorted(loaded & {*HEAVY, "duckdb", "pyarrow", "pydantic"}) == []
    assert all(verb in output for verb in ("run", "sql", "status", "verify"))


ASKS = """
import engine.cli
for more in (["sql", sys.argv[2], "FROM corpora", "--format", "csv"], ["status", sys.argv[2]], ["verify", sys.argv[2]]):
    try:
        engine.cli.main(more)
    except SystemExit as end:
        assert not end.code, end.code
"""


def test_commands_that_only_ask_load_neither_torch_nor_ray(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "work")
    log.create_workspace(storage)
    with Catalog(storage) as catalog:
        added = actions.CorpusAdded(corpus="photos", kind="image", source="x", seed=0, part_rows=4, config={})
        catalog.commit([added], run="r")
    loaded, output = loaded_by(ASKS, ROOT, storage.uri)
    assert sorted(loaded & {*HEAVY, "pydantic"}) == []
    assert "photos,image,x" in output
    assert "ok: 1 log entries" in output
