"""Images in Parquet files: which column, which rows, and how little of a file is read for a part of it."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from engine.ingest import ingest
from engine.ingest.intake import reader
from engine.ingest.part import typed_columns
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


def test_one_bad_file_row_or_value_costs_no_other(tmp_path: Path) -> None:
    write(
        tmp_path / "a.parquet",
        {
            "image": pa.array([b"one", b"two", b"three", b"four"]),
            "id": pa.array(["a", None, "a", "b"]),
            "taken": pa.array([0, 1, 2, 2**53], pa.int64()).cast(pa.timestamp("ms")),
            "day": pa.array([0, 1, 2, 2**31 - 1], pa.int32()).view(pa.date32()),
            "name": pa.array([b"x", b"y", b"z", b"\xff"]).view(pa.string()),
            "ns": pa.array([0, 1, 2, 1_700_000_000_000_000_001]).cast(pa.timestamp("ns")),
        },
    )
    whole = write(tmp_path / "b.parquet", {"image": pa.array([b"five"]), "id": pa.array(["c"])}).read_bytes()
    (tmp_path / "c.parquet").write_bytes(b"")
    (tmp_path / "d.parquet").write_bytes(whole[:-20])
    write(tmp_path / "e.parquet", {"words": pa.array(["no image"]), "id": pa.array(["d"])})
    config = CorpusConfig(source=str(tmp_path), key="id")
    found = scan.scan(config)
    assert [(each.key, each.source) for each in found.samples] == [
        ("a", "a.parquet#0"),
        ("b", "a.parquet#3"),
        ("c", "b.parquet#0"),
    ]
    source = reader(found.root, config, found.samples)
    assert [source.read(place) for place in range(3)] == [b"one", b"four", b"five"]
    assert [found.columns(each) for each in found.samples] == [
        {"taken": "1970-01-01T00:00:00", "day": "1970-01-01", "name": "x", "ns": "1970-01-01T00:00:00"},
        {"taken": None, "day": None, "name": None, "ns": "2023-11-14T22:13:20"},
        {},
    ]
    told = "\n".join(found.notes)
    assert "1 row without a key, passed over: a.parquet#1: the key column 'id' is None" in told
    assert "1 sample with a key that stands earlier, passed over (the field 'id' must be unique): a.parquet#2" in told
    assert "3 Parquet files that cannot be used, passed over: c.parquet cannot be read as Parquet" in told
    assert "3 values that cannot be held, left out: a.parquet#3 (taken), a.parquet#3 (day), a.parquet#3 (name)" in told
    assert [file.path for file, _ in found.findings.passed_over] == ["c.parquet", "d.parquet", "e.parquet"]


def test_columns_of_names_that_are_empty_or_stand_twice_are_left_out(tmp_path: Path) -> None:
    names = ["image", "n", "n", "", "a.b", "jpg", "jpg"]
    columns = [pa.array([b"one"]), *(pa.array([number]) for number in range(4)), pa.array([b"x"]), pa.array([b"y"])]
    pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "a.parquet")
    config = CorpusConfig(source=str(tmp_path))
    found = scan.scan(config)
    assert reader(found.root, config, found.samples).read(0) == b"one"
    assert found.columns(found.samples[0]) == {"a.b": 3}
    assert sum("of a name that is empty or stands twice" in note for note in found.notes) == 3
    with pytest.raises(ConfigError, match="has twice the column 'jpg'"):
        scan.scan(CorpusConfig(source=str(tmp_path), image="jpg"))
    # The same in a table beside images.
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"")
    days = pa.array([2**31 - 1], pa.int32()).view(pa.date32())
    columns = [pa.array(["one.jpg"]), pa.array([1]), pa.array([2]), pa.array([3]), pa.array([4]), days]
    pq.write_table(pa.Table.from_arrays(columns, names=["file_name", "n", "n", "", "m", "day"]), tmp_path / "t.parquet")
    found = scan.scan(CorpusConfig(source=str(tmp_path / "photos"), table=str(tmp_path / "t.parquet")))
    assert found.columns(found.samples[0]) == {"m": 4, "day": None}


def test_images_of_a_dictionary(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"image": pa.array([b"one", b"two", b"one"]).dictionary_encode()})
    config = CorpusConfig(source=str(tmp_path))
    found = scan.scan(config)
    assert [reader(found.root, config, found.samples).read(place) for place in range(3)] == [b"one", b"two", b"one"]


def test_a_group_of_rows_that_cannot_be_read_costs_its_own_rows(tmp_path: Path) -> None:
    names = pa.array([f"name {number} " + "x" * 200 for number in range(6)])
    images = pa.array([bytes([number]) * 300 for number in range(6)])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images, "name": names}), path, row_group_size=2, compression="zstd")
    data = bytearray(path.read_bytes())
    for number in range(2):
        column = pq.read_metadata(path).row_group(1).column(number)
        at = column.data_page_offset
        data[at : at + 40] = bytes(40)
    path.write_bytes(data)
    config = CorpusConfig(source=str(tmp_path))
    found = scan.scan(config)
    source = reader(found.root, config, found.samples)
    read = []
    for place in range(6):
        try:
            read.append(source.read(place))
        except SourceError:
            read.append(None)
    assert read == [*images.to_pylist()[:2], None, None, *images.to_pylist()[4:]]
    assert [found.columns(each).get("name") for each in found.samples] == [
        *names.to_pylist()[:2],
        *(None, None),
        *names.to_pylist()[4:],
    ]
    assert any("group of rows whose columns cannot be read, left out: a.parquet#2" in note for note in found.notes)


# -- any file ---------------------------------------------------------------------------------------------------------

_WIDTHS: dict[Any, int] = {
    **{pa.timestamp(unit): 8 for unit in ("s", "ms", "us", "ns")},
    **{pa.timestamp("ms", zone): 8 for zone in ("UTC", "+99:99", "Nowhere/Land")},
    **{pa.duration(unit): 8 for unit in ("s", "ms", "us", "ns")},
    **{pa.date32(): 4, pa.date64(): 8, pa.time32("ms"): 4, pa.time64("us"): 8, pa.time64("ns"): 8},
    **{pa.int8(): 1, pa.uint64(): 8, pa.float16(): 2, pa.float64(): 8, pa.decimal128(38, 2): 16},
}
_ROWS = 3


@st.composite
def any_column(draw: st.DrawFn) -> pa.Array:
    """A column of any type and of any bits."""
    if draw(st.booleans()):
        texts = draw(st.lists(st.binary(max_size=4), min_size=_ROWS, max_size=_ROWS))
        column = pa.array(texts, pa.binary()).view(pa.string())
    else:
        kind = draw(st.sampled_from(list(_WIDTHS)))
        bits = draw(st.one_of(st.binary(min_size=16 * _ROWS, max_size=16 * _ROWS), st.just(b"\0" * 16 * _ROWS)))
        column = pa.Array.from_buffers(kind, _ROWS, [None, pa.py_buffer(bits[: _WIDTHS[kind] * _ROWS])])
    match draw(st.sampled_from(["plain", "list", "struct"])):
        case "list":
            return pa.ListArray.from_arrays([0, 1, 2, 3], column)
        case "struct":
            return pa.StructArray.from_arrays([column], [draw(st.sampled_from(["a", "", "bytes", "path"]))])
    return column


_FILES = st.tuples(
    st.lists(st.tuples(st.sampled_from(["a", "b", "a.b", "", "image.path", "corpus", "é"]), any_column()), max_size=4),
    st.one_of(st.none(), st.tuples(st.integers(0, 2000), st.integers(0, 255))),
)


def check_any_file(file: tuple[list[tuple[str, pa.Array]], tuple[int, int] | None]) -> None:
    """Lists and reads a file beside a good one, and writes what comes of it as a samples file."""
    columns, flip = file
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "good.parquet", {"image": pa.array([b"good"]), "n": pa.array([7])})
        table = pa.Table.from_arrays(
            [pa.array([b"x"] * _ROWS), *(column for _, column in columns)],
            names=["image", *(name for name, _ in columns)],
        )
        try:
            pq.write_table(table, Path(folder) / "a.parquet")
        except (pa.ArrowException, OverflowError):
            reject()
        if flip is not None:
            data = bytearray((Path(folder) / "a.parquet").read_bytes())
            data[flip[0] % len(data)] ^= flip[1]
            (Path(folder) / "a.parquet").write_bytes(data)
        config = CorpusConfig(source=folder)
        found = scan.scan(config)
        source = reader(found.root, config, found.samples)
        rows = []
        for place, listed in enumerate(found.samples):
            try:
                assert source.read(place) is not None or flip is not None
            except SourceError:
                assert flip is not None
            rows.append(found.columns(listed))
        assert rows[-1] == {"n": 7}
        json.dumps(rows, allow_nan=False)
        arrays = typed_columns(rows, {})
        assert all(len(array) == len(rows) for array in arrays.values())
        pq.write_table(pa.table(arrays), pa.BufferOutputStream())


_any_files = given(_FILES)
_quickly = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
test_any_file_is_read_or_told_of = _quickly(_any_files(check_any_file))


@pytest.mark.long
@settings(max_examples=5_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@_any_files
def test_five_thousand_files(file: tuple[list[tuple[str, pa.Array]], tuple[int, int] | None]) -> None:
    check_any_file(file)


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
