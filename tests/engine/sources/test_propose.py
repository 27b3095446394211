import io
import json
import tarfile
from pathlib import Path

import fsspec
import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from engine.pipeline import config
from engine.sources import scan as sources
from engine.sources.propose import write_pipeline, write_schema
from manifests.errors import ConfigError


def files(root: Path, **contents: bytes) -> Path:
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_a_folder_of_photographs(tmp_path: Path) -> None:
    table = b"file_name,likes\na.jpg,3\nsub/b.PNG,4\n"
    other = b"who,when\nme,now\n"
    photos = files(
        tmp_path / "My Photos",
        **{
            "a.jpg": b"",
            "sub/b.PNG": b"",
            "c.jpg": b"",
            "a.txt": b"x",
            "z.txt": b"",
            "likes.csv": table,
            "0.csv": other,
        },
    )
    out = tmp_path / "photos.yaml"
    said = write_pipeline(str(photos), out).splitlines()
    assert said[0] == (
        f"wrote {out}: 3 images (2 .jpg, 1 .png), 1 captions (.txt beside the image), a table, likes.csv"
    )
    assert said[1] == "1 image without a row in likes.csv: c.jpg"
    assert said[2:4] == ["1 file of kind .csv, passed over: 0.csv", "1 file of kind .txt, passed over: z.txt"]
    assert said[-1] == f"modmill run {out}"
    loaded = config.load(out)
    assert loaded.workspace == str(tmp_path / "my_photos-workspace")
    corpus = loaded.corpora["my_photos"]
    assert corpus.source == str(photos)
    scan = sources.scan(corpus)
    assert {tuple(scan.columns(listed).items()) for listed in scan.samples} == {
        (("caption", "x"), ("likes", 3)),
        (("likes", 4),),
        (),
    }
    assert list(corpus.modalities) == ["rgb", "edges", "boxes", "metadata", "palette", "caption"]
    jsonschema.validate(yaml.safe_load(out.read_text()), config.schema())


def test_it_can_be_moved_with_its_folder(tmp_path: Path) -> None:
    files(tmp_path / "here" / "photos", **{"a.jpg": b""})
    write_pipeline(str(tmp_path / "here" / "photos"), tmp_path / "here" / "p.yaml")
    (tmp_path / "here").rename(tmp_path / "there")
    assert config.load(tmp_path / "there" / "p.yaml").corpora["photos"].source == str(tmp_path / "there" / "photos")


@pytest.mark.parametrize(
    "name", ["it's; rm -rf", '"quoted" #1', "a: b", "~", "日本", "1e3", "1e3.0", "null", "[x]*", "new\nline"]
)
def test_folders_of_all_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files(tmp_path / "in" / name, **{"a.jpg": b""})
    monkeypatch.chdir(tmp_path / "in")
    write_pipeline(f"./{name}", tmp_path / "in" / "p.yaml")
    (corpus,) = config.load(tmp_path / "in" / "p.yaml").corpora.values()
    assert corpus.source == str(tmp_path / "in" / name)
    assert [listed.source for listed in sources.scan(corpus).samples] == ["a.jpg"]


def test_a_folder_of_documents(tmp_path: Path) -> None:
    rows = b'{"text": "a"}\n{"text": "b"}\n'
    books = files(tmp_path / "books", **{"a.txt": b"x", "b.jsonl": rows})
    # The pipeline file lies in the source: its workspace must not, or its Parquet files would be taken for documents.
    out = books / "p.yaml"
    assert write_pipeline(str(books), out).startswith(f"wrote {out}: 3 documents")
    loaded = config.load(out)
    assert loaded.workspace == str(tmp_path / "books-workspace")
    assert loaded.corpora["books"].kind == "text"


def test_images_in_tars_and_in_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        for name in ("0.jpg", "0.txt", "1.jpg"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    (tmp_path / "hub").mkdir()
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": None}]}), tmp_path / "hub" / "train.parquet")
    for name, found in (("tars", "2 images in 1 tar"), ("hub", "1 images in 1 Parquet file")):
        out = tmp_path / f"{name}.yaml"
        assert write_pipeline(str(tmp_path / name), out).splitlines()[0] == f"wrote {out}: {found}"
        (corpus,) = config.load(out).corpora.values()
        assert (corpus.kind, "rgb" in corpus.modalities) == ("image", True)


def test_parquet_files_of_documents_and_of_neither(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "books" / "a.parquet")
    assert "2 documents" in write_pipeline(str(tmp_path / "books"), tmp_path / "books.yaml")
    (tmp_path / "laion").mkdir()
    pq.write_table(pa.table({"url": ["http://a/b.jpg"]}), tmp_path / "laion" / "a.parquet")
    with pytest.raises(ConfigError, match=r"'text'.*for images, .*name it with `url:`"):
        write_pipeline(str(tmp_path / "laion"), tmp_path / "laion.yaml")


def test_a_store(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/shop/photos/a.jpg", b"")
    write_pipeline("memory://shop/photos", tmp_path / "p.yaml")
    loaded = config.load(tmp_path / "p.yaml")
    assert loaded.corpora["photos"].source == "memory://shop/photos"
    assert loaded.workspace == str(tmp_path / "photos-workspace")
    fs.rm("/shop", recursive=True)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    files(tmp_path, **{"photos/a.jpg": b"", "p.yaml": b"mine"})
    with pytest.raises(ConfigError, match="exists already"):
        write_pipeline(str(tmp_path / "photos"), tmp_path / "p.yaml")
    assert (tmp_path / "p.yaml").read_text() == "mine"


def test_a_folder_of_neither(tmp_path: Path) -> None:
    files(tmp_path, **{"x/a.mp4": b""})
    with pytest.raises(
        ConfigError, match=r"holds no documents: found 1 files \(1 with \.mp4\).*for images, expected \.jpg"
    ):
        write_pipeline(str(tmp_path / "x"), tmp_path / "p.yaml")
    with pytest.raises(ConfigError, match="is not there"):
        write_pipeline(str(tmp_path / "none"), tmp_path / "p.yaml")
    assert not (tmp_path / "p.yaml").exists()


def test_the_schema_in_a_file(tmp_path: Path) -> None:
    write_schema(tmp_path / "sub" / "schema.json")
    assert json.loads((tmp_path / "sub" / "schema.json").read_text()) == config.schema()
