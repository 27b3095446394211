import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.pipeline import config, file
from manifests.errors import ConfigError

EXAMPLE = Path(__file__).parents[3] / "examples" / "photos.yaml"
SMALL = "workspace: work\ncorpora:\n  photos:\n    source: pictures\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes_of(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load(written(folder, text), overrides)
    return str(caught.value).replace(f"{folder}{os.sep}", "").splitlines()


def test_the_example_is_the_contract() -> None:
    loaded = config.load(EXAMPLE)
    assert list(loaded.corpora) == ["photos"]
    options = loaded.modality_options("photos")
    assert list(options) == ["rgb", "edges", "boxes", "metadata", "palette", "caption"]
    assert options["rgb"].keep is True
    assert all(option.tokens is not False for option in options.values())
    assert loaded.fit_options("rgb")["steps"] == 400
    assert loaded.fit_options("edges")["steps"] == 200
    assert Path(loaded.workspace) == EXAMPLE.parents[1] / "photos-workspace"
    config.check_labelers(loaded)


def test_the_example_takes_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = config.load(EXAMPLE, ["workspace=out", "corpora.photos.source=my photos #1: 50% {off}"])
    assert loaded.workspace == str(tmp_path / "out")
    assert loaded.corpora["photos"].source == str(tmp_path / "my photos #1: 50% {off}")


def test_the_schema_accepts_the_example_and_refuses_a_mistake() -> None:
    document = yaml.safe_load(EXAMPLE.read_text())
    schema = json.loads(json.dumps(config.schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(document, schema)
    document["corpora"]["photos"]["modalities"] = ["rgb", "edges"]
    jsonschema.validate(document, schema)
    document["corpora"]["photos"]["crops"] = 0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_every_option_is_described() -> None:
    definitions = [config.schema(), *config.schema()["$defs"].values()]
    undescribed = [
        f"{definition['title']}.{name}"
        for definition in definitions
        for name, option in definition.get("properties", {}).items()
        if not option.get("description")
    ]
    assert undescribed == []


def test_defaults_by_kind(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path, SMALL + "  books: {source: books, kind: text}\n"))
    assert list(loaded.corpora["photos"].modalities) == ["rgb", "edges", "boxes", "metadata", "palette", "caption"]
    assert list(loaded.corpora["books"].modalities) == ["text"]
    assert loaded.engine.runner == "ray"
    assert loaded.corpora["photos"].part_rows == 2048
    assert loaded.fit_options("text") == {"vocabulary": 30_000, "min_frequency": 2}


def test_paths_start_at_the_file_and_uris_stay(tmp_path: Path) -> None:
    text = (
        "workspace: s3://bucket/work\ncorpora:\n  photos: {source: ../p/**/*.jpg, table: t.csv}\n"
        "  home: {source: ~/x}\ntokenizers: {text: {file: vocabulary.json}}\n"
    )
    folder = tmp_path / "here"
    folder.mkdir()
    loaded = config.load(written(folder, text))
    assert loaded.workspace == "s3://bucket/work"
    assert loaded.corpora["photos"].source == str(tmp_path / "p/**/*.jpg")
    assert loaded.corpora["photos"].table == str(folder / "t.csv")
    assert loaded.corpora["home"].source == str(Path.home() / "x")
    assert loaded.fit_options("text")["file"] == str(folder / "vocabulary.json")


def test_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "config"
    folder.mkdir()
    path = written(folder, SMALL + "    modalities: [rgb, caption]\n")
    loaded = config.load(
        path,
        [
            "corpora.photos.crops=4",
            "corpora.photos.crop.scale=[0.5, 1]",
            "corpora.photos.modalities.rgb.keep=true",
            "corpora.more={source: elsewhere, modalities: [palette]}",
            "tokenizers.rgb.rate=1e-3",
            "engine.runner=local",
            "corpora.photos.crops=5",
        ],
    )
    photos = loaded.corpora["photos"]
    assert (photos.crops, photos.crop.scale) == (5, (0.5, 1.0))
    assert photos.source == str(folder / "pictures")
    assert loaded.corpora["more"].source == str(tmp_path / "elsewhere")
    assert list(photos.modalities) == ["rgb", "caption"]
    assert photos.modalities["rgb"].keep is True
    assert loaded.fit_options("rgb")["rate"] == 0.001


def test_an_override_of_one_default_modality_keeps_the_others(tmp_path: Path) -> None:
    loaded = config.load(written(tmp_path, SMALL), ["corpora.photos.modalities.rgb.keep=true"])
    assert len(loaded.corpora["photos"].modalities) == 6
    assert loaded.corpora["photos"].modalities["rgb"].keep is True


def test_an_override_leaves_a_yaml_alias_alone(tmp_path: Path) -> None:
    text = "workspace: w\ncorpora:\n  a: &same {source: s}\n  b: *same\n"
    loaded = config.load(written(tmp_path, text), ["corpora.a.crops=3"])
    assert (loaded.corpora["a"].crops, loaded.corpora["b"].crops) == (3, 1)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("corpora.photos.crops", "expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("a..b=3", "expected NAME=VALUE"),
        ("workspace.x=3", "which has nothing below it"),
        ("engine.wrokers=3", "--set engine.wrokers=3: engine.wrokers is no option; did you mean 'workers'?"),
        ("corpora.fotos.crops=3", "--set corpora.fotos.crops=3: corpora.fotos.source is missing"),
        ("corpora.photos.crops=[", "the value is no valid YAML"),
        ("corpora.photos.crops=many", "--set corpora.photos.crops=many: corpora.photos.crops is 'many'"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    assert any(said in line for line in mistakes_of(tmp_path, SMALL, override))


def test_all_mistakes_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
workspace: work
corpora:
  photos:
    sorce: x
    crops: 1000
    seed: "7"
    modalities:
      rgb: {kep: true}
      rbg:
  Bad Name: {source: x}
  2024: {source: x}
tokenizers:
  rgb: {rate: fast}
engine: {device: gpu}
enigne: {}
runner: local
"""
    lines = mistakes_of(tmp_path, text)
    for said in (
        "pipeline.yaml:3: corpora.photos.source is missing",
        "pipeline.yaml:4: corpora.photos.sorce is no option; did you mean 'source'?",
        "pipeline.yaml:5: corpora.photos.crops is 1000; it should be less than or equal to 999",
        "pipeline.yaml:6: corpora.photos.seed is '7'; it should be a valid integer",
        "pipeline.yaml:8: corpora.photos.modalities.rgb.kep is no option; did you mean 'keep'?",
        "pipeline.yaml:9: corpora.photos.modalities.rbg: unknown modality 'rbg'; did you mean 'rgb'?",
        "pipeline.yaml:10: corpora has the name 'Bad Name'",
        "pipeline.yaml:11: corpora has the name 2024; expected text; put it in quotes",
        "pipeline.yaml:13: tokenizers.rgb.rate is 'fast'; it should be a valid number",
        "pipeline.yaml:14: engine.device is 'gpu'",
        "pipeline.yaml:15: enigne is no option; did you mean 'engine'?",
        "pipeline.yaml:16: runner is no option; did you mean engine.runner?",
    ):
        assert any(line.startswith(said) for line in lines), (said, lines)
    assert len(lines) == 12


def test_modalities_may_be_a_list_and_pools_have_labelers(tmp_path: Path) -> None:
    text = (
        "workspace: w\ncorpora: {photos: {source: x, modalities: rgb}}\n"
        "engine: {pools: {big: {labeler: [dpt], labelers: [dpt]}}}\n"
    )
    lines = mistakes_of(tmp_path, text)
    assert "corpora.photos.modalities is 'rgb'; expected a list of names, or a mapping" in lines[0]
    assert "engine.pools.big.labeler is no option; did you mean 'labelers'?" in lines[1]


def test_an_option_in_the_wrong_section_is_told_where_it_belongs(tmp_path: Path) -> None:
    text = "workspace: w\ncorpora: {photos: {source: x, min_side: 3, labeler: dpt, filter: {min_sid: 3}}}\n"
    assert {line.partition(": ")[2] for line in mistakes_of(tmp_path, text)} == {
        "corpora.photos.min_side is no option; did you mean corpora.NAME.filter.min_side?",
        "corpora.photos.labeler is no option; did you mean corpora.NAME.modalities.NAME.labeler or modalities.NAME.labeler?",
        "corpora.photos.filter.min_sid is no option; did you mean 'min_side'?",
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", "pipeline.yaml:2: b.c stands here again, after line 2"),
        (SMALL + "workspace: other\n", "pipeline.yaml:5: workspace stands here again, after line 1"),
        ("a: [1\n", "pipeline.yaml:2:1: no valid YAML"),
        ("a: 1\n\tb: 2\n", "pipeline.yaml:2:1: no valid YAML"),
        ("!!python/object:os.system {}\n", "could not determine a constructor"),
        ("", "pipeline.yaml is empty, expected a mapping"),
        ("- 1\n", "pipeline.yaml is a list, expected a mapping"),
        ("workspace: 2024-13-45\n", "month must be in 1..12"),
        ("a: \x00\n", "no valid YAML"),
        ("workspace: w\ncorpora: {}\n", "corpora is {}"),
    ],
)
def test_a_file_that_is_no_pipeline(tmp_path: Path, text: str, said: str) -> None:
    assert any(said in line for line in mistakes_of(tmp_path, text))


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(12), "more than 100,000 values, with those that aliases repeat"),
        (bomb(12) + "? [*a11]\n: 1\n", "more than 100,000 values"),
        (
            bomb(12).replace("[", "{<<: [").replace("]", "]}").replace("x,", "{},").replace("x]", "{}]"),
            "more than 100,000 values",
        ),
        ("a: " + "[" * 5000 + "]" * 5000 + "\n", "nested deeper than 50 levels"),
        ("a: " + "{b: " * 5000 + "1" + "}" * 5000 + "\n", "nested deeper than 50 levels"),
        ("\n".join("  " * level + "a:" for level in range(2000)), "nested deeper than 50 levels"),
        ("a: " + "[" * 60 + "]" * 60 + "\n", "nested deeper than 50 levels"),
        ("a: &a [*a]\n", "an alias stands within what it names"),
        ("a: &a {b: *a}\n", "an alias stands within what it names"),
    ],
)
def test_yaml_that_would_take_for_ever_is_refused_at_once(tmp_path: Path, text: str, said: str) -> None:
    began = time.process_time()
    assert said in "".join(mistakes_of(tmp_path, text))
    assert time.process_time() - began < 1
    override = file.parse_override(f"a={text}")
    with pytest.raises(ConfigError, match="no valid YAML"):
        file.override_value(override, tmp_path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such pipeline file; `modmill init FOLDER`"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        config.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("    kind: text\n    modalities: [rgb]\n", "corpora.photos.modalities.rgb is made of images"),
        ("    kind: text\n    table: t.csv\n", "corpora.photos.table is for images"),
        ("    text: body\n", "corpora.photos.text names a field of documents"),
        ("    url: url\n    table: t.csv\n", "corpora.photos.url says that the source is a list of URLs"),
        ("    kind: text\n    pack: true\n", "corpora.photos.pack is for images"),
        ("    modalities: []\n", "corpora.photos.modalities is empty"),
        ("    modalities: [rgb, rgb]\n", "corpora.photos.modalities names 'rgb' twice"),
        ("    modalities: [rgb, {edges: {}}]\n", "expected names of modalities"),
        ("    crop: {scale: [0.9, 0.1]}\n", "corpora.photos.crop.scale is [0.9, 0.1]"),
        ("    crop: {scale: [0.9, 1.1]}\n", "at most the whole area"),
        ("    modalities: {rgb: {parameters: {day: 2024-01-01}}}\n", "rgb.parameters holds what is no JSON value"),
        ("tokenizers: {boxes: {}}\n", "tokenizers.boxes: boxes shares the tokenizer `text`"),
        ("tokenizers: {egdes: {}}\n", "tokenizers.egdes: unknown modality 'egdes'; did you mean 'edges'?"),
        ("tokenizers: {rgb: {patch: 15}}\n", "pipeline.yaml:5: tokenizers.rgb.patch is 15"),
        ("modalities: {depth: {keep: true}}\n", "modalities.depth has options, but no corpus makes depth"),
        ("  books: {source: ., kind: text}\n", "lies inside corpora.books.source"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, text: str, said: str) -> None:
    lines = mistakes_of(tmp_path, SMALL + text)
    assert any(said in line for line in lines), lines


def test_options_of_every_corpus_and_of_one(tmp_path: Path) -> None:
    text = """\
workspace: work
modalities:
  edges: {keep: true, format: webdataset, parameters: {sigma: 2.0, low: 1}}
corpora:
  a: {source: a, modalities: {rgb: , edges: {keep: false, parameters: {low: 5}}}}
  b: {source: b, modalities: {edges: {labeler: "mine:Edges", parameters: {x: 1}}}}
"""
    loaded = config.load(written(tmp_path, text))
    of_a = loaded.modality_options("a")
    assert list(of_a) == ["rgb", "edges"]
    assert of_a["rgb"] == config.ModalityConfig()
    assert (of_a["edges"].keep, of_a["edges"].format) == (False, "webdataset")
    assert of_a["edges"].parameters == {"sigma": 2.0, "low": 5}
    of_b = loaded.modality_options("b")["edges"]
    assert (of_b.labeler, of_b.parameters, of_b.keep) == ("mine:Edges", {"x": 1}, True)


def test_modalities_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_bands.py").write_text(
        "from dataclasses import replace\nfrom modmill import MODALITIES\n"
        "BANDS = replace(MODALITIES['depth'], name='bands', tokenizer='grid')\nOTHER = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = SMALL + '    modalities: ["own_bands:BANDS", rgb@448]\ntokenizers: {"own_bands:BANDS": {steps: 7}}\n'
    loaded = config.load(written(tmp_path, text))
    assert loaded.fit_options("bands")["steps"] == 7
    assert list(loaded.modality_options("photos")) == ["own_bands:BANDS", "rgb@448"]
    lines = mistakes_of(tmp_path, SMALL + '    modalities: ["own_bands:OTHER", "own_bands:NONE", rgb@100]\n')
    assert len(lines) == 3
    assert all(line.startswith("pipeline.yaml:5: corpora.photos.modalities.") for line in lines)


def test_labelers_are_checked_all_at_once(tmp_path: Path) -> None:
    text = """\
workspace: work
corpora:
  a: {source: a, modalities: {rgb: {labeler: palete}, edges: {labeler: palette}}}
  b: {source: b, modalities: {edges: {parameters: {no_such: 1}}}}
engine: {pools: {heavy: {labelers: [palete]}}}
"""
    with pytest.raises(ConfigError) as caught:
        config.check_labelers(config.load(written(tmp_path, text)))
    lines = str(caught.value).splitlines()
    assert "corpora.a.modalities.rgb: unknown labeler 'palete'; did you mean 'palette'?" in lines[0]
    assert lines[1].startswith("corpora.a.modalities.edges: labeler 'palette' makes palette")
    assert lines[2].startswith("corpora.b.modalities.edges: labeler 'edges' has no parameter 'no_such'")
    assert lines[3] == f"engine.pools.heavy.labelers: {lines[0].partition(': ')[2]}"
    assert len(lines) == 4


def test_what_is_recorded_holds_no_credentials(tmp_path: Path) -> None:
    text = (
        "workspace: https://me:p@ss@host.org/work?token=secret\n"
        "corpora: {photos: {source: 'simplecache::s3://key:secret@bucket/photos'}}\n"
    )
    loaded = config.load(written(tmp_path, text))
    recorded = config.document(loaded)
    assert recorded["workspace"] == "https://host.org/work"
    assert recorded["corpora"]["photos"]["source"] == "simplecache::s3://bucket/photos"
    assert "secret" not in json.dumps(recorded)
    assert config.document(loaded.corpora["photos"]) == recorded["corpora"]["photos"]


def test_a_recorded_pipeline_is_a_pipeline(tmp_path: Path) -> None:
    loaded = config.load(EXAMPLE)
    path = tmp_path / "again.json"
    path.write_text(json.dumps(config.document(loaded)))
    assert config.load(path) == loaded


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4)))
def test_any_tree_is_loaded_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, tree: dict) -> None:
    path = tmp_path_factory.mktemp("any") / "pipeline.yaml"
    path.write_text(json.dumps({**tree, "corpora": tree}), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert str(caught.value).startswith(str(path))


names = st.text(st.characters(blacklist_characters='"=', blacklist_categories=["Cs"]), min_size=1)


@given(st.lists(names, min_size=1), st.text())
def test_an_override_is_read_as_it_is_spelled(path: list[str], value: str) -> None:
    spelled = ".".join(f'"{name}"' for name in path)
    assert file.parse_override(f"{spelled}={value}") == file.Override(path=tuple(path), text=value)


def test_config_needs_no_torch_and_no_ray() -> None:
    code = "import sys, engine.pipeline.config, engine.sources.scan\nprint(sorted({'torch', 'ray', 'duckdb'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_option_of_a_fit_is_one_that_the_fit_takes() -> None:
    from dataclasses import fields

    from engine.pipeline.sections import GridFit
    from train.fit.grid import GridOptions

    known = {field.name: field.default for field in fields(GridOptions)}
    for name, field in GridFit.model_fields.items():
        assert name in known, name
        assert field.default in (None, known[name]), name
