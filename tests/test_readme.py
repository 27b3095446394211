"""What the README says is so: its labeler and modality work, its table and tree are true, its verbs exist."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def block(name: str) -> str:
    """The code block behind the comment `<!-- name -->`."""
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no block {name}"
    return found[1]


def labelers_table() -> str:
    from labelers import protocol

    lines = ["| labeler | makes | runs on | from | code | weights |", "|---|---|---|---|---|---|"]
    for name in protocol.names():
        spec = protocol.find(name).spec
        makes = ", ".join(spec.outputs) if spec.outputs else "whatever the source brings along"
        runs_on = "the whole photograph" if spec.scope == "image" else "every crop"
        if "image" not in spec.inputs:
            runs_on = "the sample"
        weights = spec.licence_weights or "none needed"
        lines.append(f"| `{name}` | {makes} | {runs_on} | {', '.join(spec.inputs)} | {spec.licence_code} | {weights} |")
    return "\n".join(lines)


def test_the_table_of_labelers_is_true() -> None:
    assert labelers_table() in README, f"the README's table should be:\n{labelers_table()}"


def test_the_labeler_of_the_readme_works_by_its_file_alone(tmp_path: Path, make_photos, monkeypatch) -> None:
    import labelers
    from engine.pipeline import config as pipeline
    from engine.run import job
    from manifests.catalog.catalog import Catalog

    (tmp_path / "labelers").mkdir()
    (tmp_path / "labelers/luma.py").write_text(block("labeler"))
    monkeypatch.setattr(labelers, "__path__", [*labelers.__path__, str(tmp_path / "labelers")])
    make_photos(tmp_path / "photos", 3)
    (tmp_path / "pipeline.yaml").write_text(
        "workspace: work\n"
        "corpora: {photos: {source: photos, modalities: {edges: {keep: true, tokens: false, labeler: luma}}}}\n"
        "engine: {runner: local, workers: 1}\n"
    )
    override = "corpora.photos.modalities.edges.parameters.threshold=0.6"
    job.run(pipeline.load(tmp_path / "pipeline.yaml", [override]), quiet=True)
    with Catalog.open(tmp_path / "work") as catalog:
        assert [(row["modality"], row["ok"]) for row in catalog.coverage()] == [("edges", 3)]
        recipe = catalog.sql("SELECT producer, parameters FROM recipes").to_pylist()[0]
        assert recipe == {"producer": "luma", "parameters": '{"threshold":0.6}'}
    monkeypatch.delitem(sys.modules, "labelers.luma")


def test_what_a_plugin_needs_comes_from_the_one_door() -> None:
    import modmill

    assert [name for name in modmill.__all__ if not hasattr(modmill, name)] == []
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tests/data/**/*.py")]
    for path in texts:
        own = re.findall(
            r"^(?:from|import) (?:engine|labelers|manifests|tokenize_jobs|train)\b.*", path.read_text(), re.M
        )
        assert own == [], f"{path.name} imports {own} instead of `from modmill import ...`"


def test_the_modality_of_the_readme_works(tmp_path: Path, make_photos, monkeypatch) -> None:
    from engine.pipeline import config as pipeline
    from engine.run import job
    from manifests.catalog.catalog import Catalog
    from manifests.formats.shards import read_tar

    (tmp_path / "my_heat.py").write_text(block("modality"))
    monkeypatch.syspath_prepend(str(tmp_path))
    photos = make_photos(tmp_path / "photos", 3)
    for photo in sorted(photos.glob("*.jpg")):
        np.save(photo.with_suffix(".npy"), np.full((20, 30), 27_000, np.uint16))
    (tmp_path / "pipeline.yaml").write_text(
        "workspace: work\n"
        "corpora: {photos: {source: photos, modalities: {'my_heat:HEAT': "
        "{keep: true, tokens: false, parameters: {path: '{stem}.npy'}}}}}\n"
        "engine: {runner: local, workers: 1}\n"
    )
    job.run(pipeline.load(tmp_path / "pipeline.yaml"), quiet=True)
    with Catalog.open(tmp_path / "work") as catalog:
        shard = catalog.live_shards()[0]
        assert (shard.modality, shard.ok, shard.format) == ("heat", 3, "webdataset")
        with catalog.storage.open(shard.path) as file:
            values = read_tar(file).values
        assert values is not None
        assert values[0].startswith(b"\x89PNG")


def test_the_lines_for_plain_readers_read_live_rows_alone(tmp_path: Path, make_photos, monkeypatch) -> None:
    import duckdb

    from engine.pipeline import config as pipeline
    from engine.run import job
    from engine.upkeep.forget import forget

    make_photos(tmp_path / "photos", 5)
    (tmp_path / "pipeline.yaml").write_text(
        "workspace: photos-workspace\n"
        "corpora: {photos: {source: photos, part_rows: 3, modalities: {rgb: {keep: true}}}}\n"
        "tokenizers: {rgb: {steps: 1, batch: 4, codebook: 16, width: 16}}\nfit_rows: 4\n"
        "engine: {runner: local, workers: 1, batch: 4}\n"
    )
    job.run(pipeline.load(tmp_path / "pipeline.yaml"), quiet=True)
    assert forget(str(tmp_path / "photos-workspace"), ["photo002.jpg"], quiet=True) is not None
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    exec(block("live files"), made)
    keys = [key for key, _ in made["rows"].fetchall()]
    assert len(keys) == len(set(keys)) == 4
    # What a pattern over the folder reads is more, as the README says.
    pattern = "photos-workspace/data/photos/rgb/*/part-*.parquet"
    assert duckdb.sql(f"SELECT count(DISTINCT key) FROM '{pattern}' WHERE status = 0").fetchall() == [(5,)]


OF_THE_DEMO = (
    "fit_rows=12",
    "corpora.photos.crops=1",
    "corpora.photos.modalities=[boxes, caption]",
    "corpora.scenes.modalities={boxes: {labeler: files, parameters: {path: '../boxes/{stem}.json'}}, caption: {}}",
    "tokenizers={text: {vocabulary: 5000}}",
    "engine.runner=local",
)


def test_the_questions_of_the_readme_have_answers(
    tmp_path: Path, readme_questions: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """On a demo without its pixels and its training, with a broken photograph and a labeler that is newer since."""
    from engine.cli import entry
    from engine.pipeline import config as pipeline
    from engine.run import job
    from examples.demo import demo
    from manifests.catalog.catalog import Catalog
    from manifests.log import entries as log
    from manifests.log.actions import RecipeAdded, RecipeCurrent, RunStarted
    from manifests.recipe import Recipe
    from manifests.snapshots import snapshot

    demo.lay_out(tmp_path, 12, lambda line: None)
    (tmp_path / "sources/photos/broken.jpg").write_text("no picture")
    config = pipeline.load(tmp_path / "pipeline.yaml", OF_THE_DEMO)
    job.run(config, steps=("ingest", "fit", "label", "tokenize", "snapshot"), quiet=True)
    with Catalog.open(tmp_path / "workspace") as catalog:
        trained = {"uri": "W#demo", "sha256": snapshot.read(catalog.storage, "demo").sha256}
        old = catalog.sql("SELECT * FROM recipes WHERE modality = 'caption' AND form = 'label'").to_pylist()[0]
        newer = Recipe(modality="caption", form="label", producer="caption", version=old["producer_version"] + 1)
        catalog.commit(
            [
                RunStarted(
                    run="t",
                    kind="train",
                    time=log.now(),
                    host="h",
                    commit=None,
                    versions={},
                    config={"snapshots": [trained]},
                ),
                RecipeAdded(fingerprint=newer.fingerprint, document=newer.document()),
                RecipeCurrent(
                    corpus="scenes", modality="caption", form="label", fingerprint=newer.fingerprint, crops=None
                ),
            ],
            run="t",
        )

    answers = []
    for question in readme_questions:
        words = [str(tmp_path / "workspace") if word == "W" else word for word in question]
        with pytest.raises(SystemExit) as end:
            entry.main([*words, "--format", "json"])
        assert end.value.code == 0, question
        answers.append(json.loads(capsys.readouterr().out))
    have, failed, missing, stale, changed, chosen, lineage, seen = answers
    assert {(row["corpus"], row["modality"], row["form"]) for row in have} >= {("scenes", "boxes", "token")}
    assert [(row["class"], row["images"], row["such_as"]) for row in failed] == [("DecodeError", 1, "broken.jpg")]
    assert missing == [{"corpus": "scenes", "modality": "caption", "form": "label", "shards": 1}]
    assert {"modality": "caption", "form": "label", "cause": "version", "was": "1", "now": "2", "parts": 1} in stale
    assert {"change": "added", "kind": "part", "corpus": "photos", "modality": None, "form": None, "n": 1} in changed
    assert {row["snapshot"] for row in chosen} == {"domes-train", "domes-val"}
    assert [row["kind"] for row in lineage[:4]] == ["source", "labeler", "tokenizer", "shard"]
    assert lineage[-1]["name"] == "t"
    assert {(row["snapshot"], row["run"]) for row in seen} >= {("demo", "t")}


def test_every_verb_is_in_the_readme() -> None:
    from engine.cli.entry import app

    verbs = sorted(app.commands)
    assert verbs == sorted(
        [
            *("init", "labelers", "doctor", "run", "status", "sql", "snapshot", "verify"),
            *("forget", "export", "train", "generate"),
        ]
    )
    for verb in verbs:
        assert re.search(rf"(modmill|make) {verb}\b", README), verb


def test_the_tree_of_the_readme_is_there() -> None:
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    assert tree
    for line in tree[1].splitlines():
        # The rooms of a package are indented; `test_architecture.py` holds them against its docstring.
        assert line.startswith("  ") or (ROOT / line.split()[0]).exists(), line


def test_the_pipeline_file_of_the_first_screen_loads(tmp_path: Path) -> None:
    from engine.pipeline import config as pipeline

    found = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert found
    (tmp_path / "photos.yaml").write_text(found[1])
    config = pipeline.load(tmp_path / "photos.yaml")
    assert config.corpora["photos"].crops == 2
    pipeline.check_labelers(config)


DOCUMENTS = [
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_are_there(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_a_document_names_are_there(path: Path) -> None:
    named = re.findall(
        r"`((?:engine|labelers|manifests|tokenize_jobs|train|examples|tests|docs)/[\w/.]+)`", path.read_text()
    )
    # The README's own labeler is a file to be written.
    assert [name for name in named if not (ROOT / name).exists()] == ["labelers/luma.py"] * (path.name == "README.md")
