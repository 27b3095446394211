"""What is told of the parameters of labelers and tokenizers: on the page, by the verb, in the JSON schema."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.cli import entry
from engine.pipeline import config as pipeline
from engine.show import parameters
from labelers import protocol
from manifests.errors import ConfigError

ROOT = Path(__file__).parents[3]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    with pytest.raises(SystemExit) as end:
        entry.main(["labelers", *arguments, "--format", "json"])
    assert end.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_the_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs/parameters.md").read_text() == parameters.page(), "run python docs/write_parameters.py"


@pytest.mark.parametrize("name", protocol.names())
def test_every_parameter_has_a_type_and_a_meaning(name: str) -> None:
    for parameter, kind, default, meaning in parameters.of_labeler(name):
        assert meaning, f"say what {parameter} means: Annotated[type, '...']"
        assert kind != "not told"
        assert default


def test_the_verb_shows_labelers_and_their_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["labeler"]: row["parameters"] for row in told(capsys)}["edges"] == "low, high"
    rows = told(capsys, "edges")
    assert [(row["parameter"], row["type"], row["default"]) for row in rows] == [
        ("low", "int", "100"),
        ("high", "int", "200"),
    ]
    assert rows[1]["meaning"] == "gradient over which a pixel is an edge"
    # The engine gives `modality`, so nobody has to.
    assert told(capsys, "files")[0]["parameter"] == "path"
    by_option = {(row["tokenizer"], row["parameter"]): row for row in told(capsys, "--tokenizers")}
    assert by_option["text", "vocabulary"]["default"] == "30000"
    for wrong in (["edgse"], ["edges", "--tokenizers"]):
        with pytest.raises(SystemExit) as end:
            entry.main(["labelers", *wrong])
        assert end.value.code == 2


def test_a_labeler_of_a_user_tells_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_labeler.py").write_text(
        "from typing import TYPE_CHECKING, Annotated\nfrom modmill import LabelerSpec\n"
        "if TYPE_CHECKING:\n    from nowhere import Nothing\n\n"
        "class Plain:\n"
        "    spec = LabelerSpec(name='my_labeler:Plain', version=1, scope='crop', outputs=('edges',))\n"
        "    def __init__(self, high, low: int = 3, most: Annotated[float | None, 'at most'] = None, device='cpu'): ...\n"
        "class Lazy(Plain):\n"
        "    def __init__(self, given: 'Nothing' = None): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert parameters.of_labeler("my_labeler:Plain") == [
        ("high", "not told", "must be given", ""),
        ("low", "int", "3", ""),
        ("most", "float | None", "none", "at most"),
    ]
    assert parameters.of_labeler("my_labeler:Lazy") == [("given", "Nothing", "none", "")]
    with pytest.raises(ConfigError, match="needs the parameter 'high'"):
        protocol.parameters(protocol.find("my_labeler:Plain"), {})


def test_defaults_that_are_told_in_words_are_those_of_the_fit() -> None:
    from tokenize_jobs.text import TextOptions
    from train.fit.grid import GridOptions

    for family, options in (("grid", GridOptions), ("text", TextOptions)):
        own = {field.name: field.default for field in dataclasses.fields(options)}
        for name, _, default, _ in parameters.of_tokenizer(family):
            if name in own:
                assert float(default.partition(",")[0]) == own[name], name


def test_editors_are_shown_the_parameters() -> None:
    schema = pipeline.schema()
    shown = schema["$defs"]["parameters of edges"]["properties"]["low"]
    assert (shown["type"], shown["default"]) == ("integer", 100)
    assert "gradient" in shown["description"]
    corpus = {"source": "photos", "modalities": {"edges": {"parameters": {"low": 50}}, "rgb": None}}
    document: dict[str, Any] = {"workspace": "w", "corpora": {"photos": corpus}}
    jsonschema.validate(document, schema)
    # Of a labeler that is named, of the modality's own, and of one that nobody here knows.
    of_edges = corpus["modalities"]["edges"]
    for labeler, low, is_right in (
        (None, "much", False),
        ("edges", "much", False),
        ("edges", 50, True),
        ("my_module:Edges", "much", True),
    ):
        of_edges.update({"parameters": {"low": low}, "labeler": labeler})
        assert jsonschema.Draft202012Validator(schema).is_valid(document) == is_right, (labeler, low)
    document["corpora"]["photos"]["modalities"] = ["edges", "rgb"]
    document["modalities"] = {"edges": {"parameters": {"low": "much"}}}
    assert not jsonschema.Draft202012Validator(schema).is_valid(document)
