"""The report of a workspace, read back as a browser would."""

import json
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from engine.pipeline import config as pipeline
from engine.plan.missing import is_judged
from engine.run import job
from engine.show.codebooks import codebook_use
from engine.show.report import QUESTIONS, Question, write_report
from manifests.catalog.catalog import Catalog
from manifests.errors import QueryError, WorkspaceError

HOSTILE = "<script>alert(1)</script> & \"quotes\" <img src=x onerror='alert(2)'> \u202e\u0007 caf\u00e9"
PIPELINE = """
workspace: work
corpora:
  photos:
    source: photos
    crops: 2
    modalities:
      rgb: {keep: true}
      edges:
      boxes:
      instances:
      palette:
      metadata:
      caption:
  notes: {source: notes.jsonl, kind: text, modalities: {text: {keep: true}}}
tokenizers:
  rgb: {steps: 2, batch: 4, codebook: 16, width: 16, depth: 1}
  edges: {steps: 2, batch: 4, codebook: 16, width: 16, depth: 1}
engine: {runner: local, workers: 1, batch: 4}
"""


class Page(HTMLParser):
    """What a browser finds in the page: tags, attributes, and the texts of some elements."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1] if self.tags else "", data))

    def text(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag and text.strip()]

    def values(self, name: str) -> list[str]:
        return [value for found, value in self.attributes if found == name]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, make_photos: Callable[..., Path]) -> Path:
    """Eight photographs, one with a hostile caption and name, a file that fails, and three documents."""
    folder = tmp_path_factory.mktemp("report")
    photos = make_photos(folder / "photos", 7)
    hostile = photos / "<img src=x onerror=alert(3)>&.jpg"
    hostile.write_bytes((photos / "photo000.jpg").read_bytes())
    hostile.with_suffix(".txt").write_text(HOSTILE)
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    lines = [{"text": f"{HOSTILE} {number}", "topic": "<b>bold</b>"} for number in range(3)]
    (folder / "notes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "pipeline.yaml").write_text(PIPELINE)
    job.run(pipeline.load(folder / "pipeline.yaml"), quiet=True)
    return folder / "work"


@pytest.fixture(scope="module")
def report(workspace: Path) -> Path:
    return write_report(workspace, workspace.parent / "out", most_samples=20)


def test_every_text_of_the_data_is_escaped(report: Path):
    page = Page(report)
    assert {"script", "b"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE.replace("\u0007", "\ufffd") in page.text("p")
    assert "<img src=x onerror=alert(3)>&.jpg" in page.text("h3")
    assert "topic: <b>bold</b>" in page.text("span")


def test_the_page_stands_alone_with_its_pictures(report: Path):
    page = Page(report)
    assert page.values("src")
    for path in {*page.values("src"), *(link for link in page.values("href") if not link.startswith("#"))}:
        with Image.open(report.parent / path) as image:
            image.verify()
    assert "http" not in report.read_text()


def test_links_within_the_page_lead_somewhere(report: Path):
    page = Page(report)
    anchors = {link[1:] for link in page.values("href") if link.startswith("#")}
    assert {"corpus-photos", "corpus-notes", "tokenizers", "coverage", "questions"} <= anchors
    assert anchors <= set(page.values("id"))


def test_each_modality_is_shown_as_label_and_from_tokens(report: Path):
    names = {path.name for path in (report.parent / "pictures").iterdir()}
    for modality in ("rgb", "boxes", "palette"):
        assert {f"photos-00-{modality}-label.png", f"photos-00-{modality}-tokens.png"} <= names
    # Edges are not kept, instances have no tokens: the page says so.
    assert "photos-00-edges-tokens.png" in names
    assert {"photos-00-edges-label.png", "photos-00-instances-tokens.png"}.isdisjoint(names)
    assert {"not kept", "no tokens"} <= set(Page(report).text("div"))
    with Image.open(report.parent / "pictures" / "photos-00-rgb-tokens.png") as image:
        assert image.size == (224, 224)


def test_samples_that_tokenizers_are_judged_on_say_so_and_come_first(report: Path, workspace: Path):
    with Catalog.open(workspace) as catalog:
        rows = catalog.sql("SELECT corpus, key FROM samples WHERE source <> 'broken.jpg'").to_pylist()
    page = Page(report)
    assert page.text("span").count("judged") == sum(is_judged(row["key"]) for row in rows)
    assert len([tag for tag in page.tags if tag == "article"]) == len(rows)


def test_failures_are_listed_and_not_shown_as_samples(report: Path):
    page = Page(report)
    assert "failures" in page.values("id")
    assert "DecodeError" in page.text("td")
    assert "broken.jpg" not in page.text("h3")


def test_codebooks_count_every_token(workspace: Path):
    with Catalog.open(workspace) as catalog:
        uses = {use.tokenizer.name: use for use in codebook_use(catalog)}
        rows = catalog.sql("SELECT modality, sum(tokens)::BIGINT AS n FROM shards GROUP BY ALL").to_pylist()
    counted = {row["modality"]: row["n"] for row in rows if row["n"]}
    assert set(uses) == {"rgb", "edges", "text"}
    assert uses["rgb"].counts.sum() == counted["rgb"]
    assert uses["text"].counts.sum() == sum(n for name, n in counted.items() if name not in ("rgb", "edges"))
    assert 1 <= uses["rgb"].perplexity <= uses["rgb"].used <= len(uses["rgb"].counts) == 16


def test_questions_are_shown_as_the_command_that_answers_them(report: Path, workspace: Path):
    shown = [shlex.split(text) for text in Page(report).text("pre")]
    assert [words[:3] for words in shown] == [["modmill", "sql", str(workspace)]] * 3
    assert [words[3] for words in shown] == [question.query for question in QUESTIONS]


def test_a_question_that_cannot_be_asked_is_an_error(workspace: Path, tmp_path: Path):
    with pytest.raises(QueryError, match="nowhere"):
        write_report(workspace, tmp_path, questions=[Question(words="?", query="SELECT * FROM nowhere")])
    assert not (tmp_path / "report.html").exists()


def test_a_workspace_where_nothing_was_made_yet_has_a_report(workspace: Path, tmp_path: Path):
    config = pipeline.load(workspace.parent / "pipeline.yaml", [f"workspace={tmp_path / 'work'}"])
    job.run(config, steps=("ingest",), quiet=True)
    page = Page(write_report(tmp_path / "work", tmp_path / "out"))
    assert "Nothing was made of its samples yet." in page.text("p")
    assert "img" not in page.tags


def test_the_report_says_what_it_cannot_read(workspace: Path, tmp_path: Path):
    with Catalog.open(workspace) as catalog:
        known = catalog.tokenizer("edges")
    assert known is not None
    weights = workspace / known.path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    try:
        page = Page(write_report(workspace, tmp_path))
    finally:
        weights.write_bytes(whole)
    assert any(text.startswith("Not shown: photos, edges (token)") for text in page.text("p"))
    assert "not shown" in page.text("div")


def test_where_there_is_no_workspace_there_is_no_report(tmp_path: Path):
    with pytest.raises(WorkspaceError):
        write_report(tmp_path / "nothing", tmp_path / "out")
