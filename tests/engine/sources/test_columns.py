import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.pipeline.config import CorpusConfig
from engine.sources import scan as sources
from engine.sources.values import decoded, plain
from manifests.errors import ConfigError


def folder_with(root: Path, *images: str, **others: bytes) -> Path:
    for name, data in {**dict.fromkeys(images, b""), **others}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def columns_of(root: Path, table: str | Path | None = None, key: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Columns by source, and the notes."""
    location = None if table is None else str(root / table)
    scan = sources.scan(CorpusConfig(source=str(root), table=location, key=key))
    return {listed.source: scan.columns(listed) for listed in scan.samples}, scan.notes


def test_sidecars(tmp_path: Path) -> None:
    exif = {"camera": "x", "iso": 100, "exposure": 0.5, "tags": ["a", {"b": None}], "flash": False}
    folder_with(
        tmp_path,
        *("a.jpg", "a.png", "b.v2.jpg", "sub/a.jpg", "none.jpg"),
        **{"a.txt": b"  a dog\n", "a.json": json.dumps(exif).encode(), "b.v2.TXT": b"\xef\xbb\xbfcaf\xc3\xa9"},
    )
    columns, notes = columns_of(tmp_path)
    assert columns["a.jpg"] == columns["a.png"] == {"caption": "a dog", **exif}
    assert columns["b.v2.jpg"] == {"caption": "café"}
    assert columns["sub/a.jpg"] == columns["none.jpg"] == {}
    assert notes == []


def test_hostile_sidecars_become_notes(tmp_path: Path) -> None:
    folder_with(
        tmp_path,
        *(f"{name}.jpg" for name in "abcdefgh"),
        **{
            "a.txt": b"caf\xe9",
            "b.txt": "日本".encode("utf-16"),
            "c.txt": b"\x80\x81",
            "d.json": b"{broken",
            "e.json": b"[1, 2]",
            "f.json": b'{"x": NaN, "y": Infinity, "half": "\\ud83d", "big": 123456789012345678901234567890}',
            "g.json": b"[" * 100_000,
            "h.txt": b"",
        },
    )
    columns, notes = columns_of(tmp_path)
    assert columns["a.jpg"] == {"caption": "caf\ufffd"}
    assert columns["b.jpg"] == {"caption": "日本"}
    assert columns["d.jpg"] == columns["e.jpg"] == columns["g.jpg"] == {}
    assert columns["f.jpg"] == {"x": None, "y": None, "half": "\ufffd", "big": 123456789012345678901234567890}
    assert columns["h.jpg"] == {"caption": ""}
    assert len(notes) == 3
    encoding = next(note for note in notes if "replacement" in note)
    assert encoding.startswith("2 captions not in UTF-8")
    assert "a.txt" in encoding
    assert "c.txt" in encoding
    assert any(note.startswith("2 sidecars without valid JSON, left out: ") and "d.json (" in note for note in notes)
    assert "1 sidecar without a JSON object, left out: e.json" in notes


def test_a_sidecar_that_goes_away(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.jpg", **{"a.txt": b"x"})
    scan = sources.scan(CorpusConfig(source=str(tmp_path)))
    (tmp_path / "a.txt").unlink()
    assert scan.columns(scan.samples[0]) == {}
    assert any("a.txt" in note for note in scan.notes)


def test_a_csv_is_joined_and_typed(tmp_path: Path) -> None:
    text = (
        "\ufefffile,caption,width,score,zip,mixed,day,empty,flag\r\n"
        'sub/a.jpg,"a dog, ""big""\nand wet",640,0.5,007,1,2024-01-01,,true\r\n'
        "b.jpg,,480,1,010,x,2024-01-02,,false\r\n"
        "zz.jpg,nobody,1,1,1,1,1,,1\r\n"
    )
    folder_with(tmp_path, "sub/a.jpg", "b.jpg", "c.jpg", **{"t.csv": text.encode(), "b.txt": b"beside"})
    columns, notes = columns_of(tmp_path, "t.csv")
    assert columns["sub/a.jpg"] == {
        "caption": 'a dog, "big"\nand wet',
        "width": 640,
        "score": 0.5,
        "zip": "007",
        "mixed": "1",
        "day": "2024-01-01",
        "empty": None,
        "flag": "true",
    }
    assert columns["b.jpg"]["score"] == 1.0
    assert isinstance(columns["b.jpg"]["score"], float)
    assert columns["b.jpg"]["caption"] is None
    assert columns["c.jpg"] == {}
    assert notes == ["1 row of t.csv without an image: zz.jpg", "1 image without a row in t.csv: c.jpg"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("t.csv", b"file;caption\na.jpg;one\n"),
        ("t.csv", b",file,caption\n0,a.jpg,one\n"),
        ("t.tsv", b"file\tcaption\na.jpg\tone\n"),
        ("t.csv", "file,caption\na.jpg,one\n".encode("utf-16")),
        ("t.CSV", b"caption,filename\none,a.jpg"),
        ("t.jsonl", b'{"file": "a.jpg", "caption": "one"}\n\n'),
        ("t.ndjson", b'{"image": "./a.jpg", "caption": "one"}'),
        ("t.csv", b"path,caption\n.\\a.jpg,one\n"),
    ],
)
def test_tables_of_all_sorts(tmp_path: Path, name: str, data: bytes) -> None:
    folder_with(tmp_path, "a.jpg", **{name: data})
    columns, notes = columns_of(tmp_path, name)
    assert columns["a.jpg"] == {"caption": "one"}
    assert notes == []


def test_a_name_matches_a_path_or_a_bare_name_that_is_unique(tmp_path: Path) -> None:
    rows = f"image,n\na.jpg,1\nx/a.jpg,2\nc.jpg,3\n{tmp_path}/y/d.jpg,4\ne\u0301.jpg,5\n"
    folder_with(tmp_path, "a.jpg", "x/a.jpg", "x/y/c.jpg", "y/d.jpg", "é.jpg", **{"t.csv": rows.encode()})
    columns, notes = columns_of(tmp_path, "t.csv")
    assert {name: column["n"] for name, column in columns.items()} == {
        "a.jpg": 1,
        "x/a.jpg": 2,
        "x/y/c.jpg": 3,
        "y/d.jpg": 4,
        "é.jpg": 5,
    }
    assert notes == []


def test_an_ambiguous_name_is_refused(tmp_path: Path) -> None:
    folder_with(tmp_path, "x/a.jpg", "y/a.jpg", **{"t.csv": b"file,n\na.jpg,1\n"})
    with pytest.raises(ConfigError, match=r"'a\.jpg' may be 'x/a\.jpg' or 'y/a\.jpg'; write the path below the source"):
        columns_of(tmp_path, "t.csv")


def test_rows_that_do_not_fit_become_notes(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.jpg", **{"t.csv": b"file,n\na.jpg,1\na.jpg,2\n\nb.jpg\nc.jpg,3,4\n", "t.jsonl": b""})
    columns, notes = columns_of(tmp_path, "t.csv")
    assert columns["a.jpg"] == {"n": 1}
    assert notes == [
        "2 rows of t.csv without the header's 2 fields, left out: row 5, row 6",
        "1 row of t.csv for an image that has one already, left out: a.jpg",
        "1 file of kind .jsonl, passed over: t.jsonl",
    ]
    (tmp_path / "t.jsonl").write_bytes(b'{"file": "a.jpg", "n": {"x": [1]}}\n{broken\n3\n{"file": null}\n')
    columns, notes = columns_of(tmp_path, "t.jsonl")
    assert columns["a.jpg"] == {"n": {"x": [1]}}
    assert notes == [
        "2 lines of t.jsonl without a JSON object, left out: line 2, line 3",
        "1 row of t.jsonl without an image: None",
        "1 file of kind .csv, passed over: t.csv",
    ]


@pytest.mark.parametrize(
    ("name", "data", "key", "said"),
    [
        ("t.csv", b"picture,n\na.jpg,1\n", None, "none of the columns path, file, file_name.*it has picture, n"),
        ("t.csv", b"file,n\na.jpg,1\n", "fil", "has no column 'fil'.*did you mean 'file'"),
        ("t.csv", b"file,n,n\na.jpg,1,2\n", None, "two columns 'n'"),
        ("t.csv", b"file,n\nother,1\n", None, "none of its 1 rows names an image; its column 'file' holds 'other'"),
        ("t.csv", b"", None, "it has none"),
        ("t.parquet", b"no parquet", None, "no valid Parquet"),
        ("t.xlsx", b"", None, r"suffix '\.xlsx', expected \.csv"),
        ("", b"", None, "suffix"),
    ],
)
def test_a_table_that_does_not_fit(tmp_path: Path, name: str, data: bytes, key: str | None, said: str) -> None:
    folder_with(tmp_path, "a.jpg", **({name: data} if name else {}))
    with pytest.raises(ConfigError, match=said):
        columns_of(tmp_path, name or "none", key)


def test_a_missing_table(tmp_path: Path) -> None:
    folder_with(tmp_path, "a.jpg")
    with pytest.raises(ConfigError, match=r"table .*none\.csv: none\.csv is gone"):
        columns_of(tmp_path, "none.csv")


def test_a_parquet_table_keeps_its_types(tmp_path: Path) -> None:
    folder_with(tmp_path, "1.jpg", "2.jpg")
    table = pa.table(
        {
            "id": ["1.jpg", "2.jpg"],
            "n": pa.array([1, None], pa.int8()),
            "x": [0.5, float("nan")],
            "ok": [True, False],
            "tags": [["a"], []],
            "box": [{"x": 1, "y": None}, None],
            "day": [datetime.date(2024, 1, 2), None],
            "time": [datetime.datetime(2024, 1, 2, 3, 4, 5), None],
            "price": [decimal.Decimal("1.50"), None],
            "bytes": [b"\xff", b""],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    columns, notes = columns_of(tmp_path, "t.parquet", "id")
    assert columns["1.jpg"] == {
        "n": 1,
        "x": 0.5,
        "ok": True,
        "tags": ["a"],
        "box": {"x": 1, "y": None},
        "day": "2024-01-02",
        "time": "2024-01-02T03:04:05",
        "price": 1.5,
    }
    assert columns["2.jpg"]["x"] is None
    assert notes == ["1 column of t.parquet with binary values, left out: bytes"]
    json.dumps(columns, allow_nan=False)


def test_the_table_goes_before_sidecars(tmp_path: Path) -> None:
    folder_with(
        tmp_path,
        "a.jpg",
        **{"a.txt": b"of the text", "a.json": b'{"caption": "of the json", "b": 1}', "t.csv": b"file,b\na.jpg,2\n"},
    )
    columns, _ = columns_of(tmp_path, "t.csv")
    assert columns["a.jpg"] == {"caption": "of the json", "b": 2}


@given(st.binary())
def test_any_bytes_become_text(data: bytes) -> None:
    text, exact = decoded(data)
    text.encode()
    if not exact:
        assert "\ufffd" in text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_json_values_stay_as_they_are(value: Any) -> None:
    assert plain(value) == value


@given(st.text(st.characters()), st.floats())
def test_what_json_cannot_hold_is_made_plain(text: str, number: float) -> None:
    json.dumps(plain({text: [number]}), allow_nan=False).encode()
