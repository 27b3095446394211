"""Images in Parquet files: which column, which rows, and how little of a file is read for a part of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.ingest import ingest
from engine.ingest.intake import reader
from engine.pipeline.config import CorpusConfig
from engine.sources import scan
from engine.sources.listing import key_of
from engine.sources.read import SourceBytes
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, SourceError
from manifests.formats.shards import SourcePlace, read_samples
from manifests.log import entries as log
from manifests.store.storage import Storage, open_storage

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(path: Path, columns: dict[str, pa.Array], rows: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def created(path: Path) -> Storage:
    storage = open_storage(path)
    log.create_workspace(storage)
    return storage


def test_a_column_of_bytes_and_its_neighbors(tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet",
        {
            "id": pa.array([7, 8, 9]),
            "jpg": pa.array([b"one", None, b"three"]),
            "caption": pa.array(["a", None, "c"]),
            "thumb": pa.array([b"t", b"t", b"t"]),
        },
    )
    config = CorpusConfig(source=str(tmp_path), key="id")
    found = scan.scan(config)
    assert [(each.key, each.source, each.size_bytes) for each in found.samples] == [
        ("7", "a.parquet#0", None),
        ("8", "a.parquet#1", None),
        ("9", "a.parquet#2", None),
    ]
    assert [found.columns(each) for each in found.samples] == [{"caption": "a"}, {"caption": None}, {"caption": "c"}]
    assert found.columns(found.samples[0]) == {"caption": "a"}
    source = reader(found.root, config, found.samples)
    assert [source.read(place) for place in (0, 1, 2)] == [b"one", None, b"three"]
    # Again, and from the end.
    assert [source.read(place) for place in (2, 0)] == [b"three", b"one"]
    assert found.notes == ["1 column of bytes beside the images (thumb), left out: a.parquet"]
    without_key = scan.scan(CorpusConfig(source=str(tmp_path))).samples[0]
    assert without_key.key == key_of("a.parquet#0")
    other = CorpusConfig(source=str(tmp_path), image="thumb")
    assert reader(str(tmp_path), other, found.samples).read(1) == b"t"


def test_the_struct_of_hugging_face(tmp_path: Path) -> None:
    images = pa.array([{"bytes": b"one", "path": "one.jpg"}, None, {"bytes": None, "path": "x.jpg"}], STRUCT)
    write(tmp_path / "a.parquet", {"image": images, "label": pa.array([1, 2, 3])})
    config = CorpusConfig(source=str(tmp_path / "a.parquet"))
    found = scan.scan(config)
    source = reader(found.root, config, found.samples)
    assert [source.read(place) for place in range(3)] == [b"one", None, None]
    assert [found.columns(each) for each in found.samples] == [
        {"label": 1, "image_path": "one.jpg"},
        {"label": 2, "image_path": None},
        {"label": 3, "image_path": "x.jpg"},
    ]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"url": pa.array(["http://x"])}, {}, r"has no column of image bytes, its columns are url; .*`url:`"),
        ({"a": pa.array([b""]), "b": pa.array([b""])}, {}, "several columns of bytes: a, b; say which"),
        ({"a": pa.array([b""])}, {"image": "c"}, "has no column 'c' \\(`image`\\)"),
        ({"a": pa.array([b""])}, {"key": "c"}, "no column 'c' \\(`key`\\)"),
        ({"a": pa.array([b"", b""]), "k": pa.array(["x", None])}, {"key": "k"}, "#1: the key column 'k' is None"),
        ({"a": pa.array([b"", b""]), "k": pa.array(["x", "x"])}, {"key": "k"}, "must be unique"),
    ],
)
def test_mistakes(tmp_path: Path, columns: dict[str, pa.Array], options: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.parquet", columns)
    with pytest.raises(ConfigError, match=message):
        scan.scan(CorpusConfig(source=str(tmp_path), **options))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read as Parquet"):
        scan.scan(CorpusConfig(source=str(tmp_path)))


@pytest.mark.parametrize(
    ("option", "what"), [("key", "a column of `table`"), ("image", "what holds images in Parquet")]
)
def test_options_that_a_folder_of_images_does_not_take(
    tmp_path: Path, make_photos: Callable[..., Path], option: str, what: str
) -> None:
    config = CorpusConfig.model_validate({"source": str(make_photos(tmp_path / "photos", 1)), option: "x"})
    with pytest.raises(ConfigError, match=f"{option} names {what}"):
        scan.scan(config)


def test_only_row_groups_with_wanted_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", {"image": pa.array([b"%d" % number for number in range(1000)])}, rows=100)
    groups = []
    original = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: Any, **options: Any) -> Any:
        groups.append(options["row_groups"])
        return original(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    rows = [SourcePlace(source=f"{path.name}#{number}", size_bytes=1) for number in range(250, 340)]
    source = SourceBytes(str(tmp_path), CorpusConfig(source="x"), rows)
    assert [source.read(place) for place in range(90)] == [b"%d" % number for number in range(250, 340)]
    assert groups == [[2], [3]]
    gone = SourceBytes(str(tmp_path), CorpusConfig(source="x"), [SourcePlace(source=f"{path.name}#1000", size_bytes=1)])
    with pytest.raises(SourceError, match="#1000 is gone"):
        gone.read(0)


def test_threads_share_a_file(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = write(tmp_path / "a.parquet", {"image": pa.array([b"%d" % number for number in range(600)])}, rows=64)
    rows = [SourcePlace(source=f"{path.name}#{number}", size_bytes=1) for number in range(600)]
    source = SourceBytes(str(tmp_path), CorpusConfig(source="x"), rows)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, range(600))) == [b"%d" % number for number in range(600)]
    source.prefetch(100)
    assert source.read(0) == b"0"
    source.close()


def test_ingest(tmp_path: Path, make_photos: Callable[..., Path], s3_bucket: str) -> None:
    import s3fs

    photos = [photo.read_bytes() for photo in sorted(make_photos(tmp_path / "made", 4).glob("*.jpg"))]
    write(tmp_path / "a.parquet", {"image": pa.array([*photos, None]), "n": pa.array(range(5))}, rows=2)
    s3fs.S3FileSystem().put(str(tmp_path / "a.parquet"), f"{s3_bucket}/parquet/a.parquet")
    config = CorpusConfig(source=f"{s3_bucket}/parquet", part_rows=3)
    storage = created(tmp_path / "work")
    with Catalog(storage) as catalog:
        assert ingest.ingest(catalog, "photos", config, run="r").new == 5
        rows = [row for part in catalog.parts("photos") for row in read_samples(storage.read(part.path))]
        again = ingest.ingest(catalog, "photos", config, run="r")
        assert (again.new, again.changed, again.vanished) == (0, 0, 0)
    assert [row.size_bytes for row in rows] == [*map(len, photos), 0]
    assert [row.columns["n"] for row in rows] == list(range(5))
    assert rows[0].source_offset is None
    source = SourceBytes(config.source, config, rows)
    assert [source.read(place) for place in range(5)] == [*photos, None]
