import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.pipeline.config import CorpusConfig
from engine.sources import scan as sources
from engine.sources.kinds import open_source
from manifests.errors import ConfigError, SourceError
from manifests.formats.shards import SourcePlace


def config_of(source: object, key: str | None = None, text: str = "text") -> CorpusConfig:
    return CorpusConfig(source=str(source), kind="text", key=key, text=text)


def lines(path: Path, *rows: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))


def read_documents(root: str, names: Sequence[str], config: CorpusConfig) -> list[dict[str, Any] | SourceError]:
    source = open_source(root, config, [SourcePlace(source=name) for name in names])
    found: list[dict[str, Any] | SourceError] = []
    for place in range(len(names)):
        try:
            found.append(source.fields(place))
            assert source.read(place) == found[-1][config.text].encode()
        except SourceError as error:
            found.append(error)
    source.close()
    return found


def key_of(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def test_text_files_and_rows_by_path_then_row(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("héllo")
    lines(tmp_path / "sub/d.JSONL", {"text": "one", "n": 1}, {"text": "twö", "n": 2, "tags": ["x"]})
    pq.write_table(pa.table({"text": ["p", None], "n": [7, 8]}), tmp_path / "c.parquet")
    config = config_of(tmp_path)
    scan = sources.scan(config)
    assert [listed.source for listed in scan.samples] == [
        *("b.txt", "c.parquet#0", "c.parquet#1", "sub/d.JSONL#0", "sub/d.JSONL#1")
    ]
    assert [listed.key for listed in scan.samples] == [key_of(listed.source) for listed in scan.samples]
    assert [listed.size_bytes for listed in scan.samples] == [6, 1, 0, 3, 4]
    assert scan.samples[0].mtime_ns == (tmp_path / "b.txt").stat().st_mtime_ns
    assert [scan.columns(listed) for listed in scan.samples] == [
        *({}, {"n": 7}, {"n": 8}, {"n": 1}, {"n": 2, "tags": ["x"]})
    ]
    found = read_documents(scan.root, [listed.source for listed in reversed(scan.samples)], config)
    assert found[0] == {"text": "twö", "n": 2, "tags": ["x"]}
    assert found[1] == {"text": "one", "n": 1}
    assert isinstance(found[2], SourceError)
    assert "c.parquet#1 has no text in the field 'text': found NoneType" in str(found[2])
    assert found[3:] == [{"text": "p", "n": 7}, {"text": "héllo"}]
    assert scan.notes == []
    (tmp_path / "page.html").write_text("<p>")
    assert sources.scan(config).notes == ["1 file of kind .html, passed over: page.html"]


def test_keys_of_a_field(tmp_path: Path) -> None:
    lines(tmp_path / "d.jsonl", {"id": "a", "body": "x", "n": 1}, {"id": 17, "body": "y"})
    pq.write_table(pa.table({"id": ["c"], "body": ["z"]}), tmp_path / "e.parquet")
    scan = sources.scan(config_of(tmp_path, key="id", text="body"))
    assert [listed.key for listed in scan.samples] == ["a", "17", "c"]
    assert scan.columns(scan.samples[0]) == {"n": 1}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (({"id": "a", "text": ""}, {"id": "a", "text": ""}), r"d\.jsonl#1 has the key 'a', as has d\.jsonl#0"),
        (({"id": "a", "text": ""}, {"text": ""}), r"d\.jsonl#1: the key field 'id' is None"),
        (({"id": " ", "text": ""},), r"d\.jsonl#0: the key field 'id' is ' '"),
        (({"id": True, "text": ""},), r"d\.jsonl#0: the key field 'id' is True"),
        (({"id": ["x"], "text": ""},), r"d\.jsonl#0: the key field 'id' is \['x'\]"),
    ],
)
def test_a_key_must_be_there_and_unique(tmp_path: Path, rows: tuple[object, ...], said: str) -> None:
    lines(tmp_path / "d.jsonl", *rows)
    with pytest.raises(ConfigError, match=said):
        sources.scan(config_of(tmp_path, key="id"))


def test_one_bad_row_or_file_costs_no_other(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", *({"id": key, "text": "x"} for key in ("a", None, "a", "b", "c")))
    days = pa.array([0, 2**31 - 1], pa.int32()).view(pa.date32())
    texts = pa.array([b"good", b"\xff"]).view(pa.string())
    columns = [pa.array(["d", "e"]), texts, days, days, days]
    pq.write_table(pa.Table.from_arrays(columns, names=["id", "text", "day", "n", "n"]), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"other": [1]}), tmp_path / "d.parquet")
    config = config_of(tmp_path, key="id")
    scan = sources.scan(config)
    assert [listed.key for listed in scan.samples] == ["a", "b", "c", "d", "e"]
    assert [scan.columns(listed) for listed in scan.samples[3:]] == [{"day": "1970-01-01"}, {"day": None}]
    good, bad = read_documents(scan.root, ["b.parquet#0", "b.parquet#1"], config)
    assert good == {"id": "d", "text": "good", "day": "1970-01-01"}
    assert isinstance(bad, SourceError)
    told = "\n".join(scan.notes)
    assert "1 row without a key, passed over: a.jsonl#1: the key field 'id' is None" in told
    assert "1 sample with a key that stands earlier, passed over (the field 'id' must be unique): a.jsonl#2" in told
    assert "2 files that cannot be used, passed over: c.parquet cannot be read as Parquet" in told


def test_broken_lines_are_rows_that_fail(tmp_path: Path) -> None:
    rows = (
        {"text": "ok"},
        b"{broken",
        b"",
        b"[1]",
        {"body": "x"},
        {"text": 3},
        b'{"text": "caf\xe9"}',
        b'{"text": "\\ud83d!"}',
    )
    lines(tmp_path / "d.jsonl", *rows)
    config = config_of(tmp_path)
    scan = sources.scan(config)
    # The blank line is no document, and the others keep their numbers.
    assert [listed.source for listed in scan.samples] == [f"d.jsonl#{row}" for row in (0, 1, 3, 4, 5, 6, 7)]
    found = read_documents(scan.root, [listed.source for listed in scan.samples], config)
    assert [isinstance(document, SourceError) for document in found] == [False, True, True, True, True, True, False]
    assert found[-1] == {"text": "\ufffd!"}
    for document, said in zip(found[1:6], ("no JSON", "list", "fields body", "found int", "no JSON"), strict=True):
        assert said in str(document)
    assert [scan.columns(listed) for listed in scan.samples][:5] == [{}, {}, {}, {"body": "x"}, {}]


def test_files_that_changed_since_the_scan(tmp_path: Path) -> None:
    lines(tmp_path / "d.jsonl", {"text": "a"}, {"text": "b"})
    pq.write_table(pa.table({"text": ["p", "q"]}), tmp_path / "e.parquet")
    (tmp_path / "f.txt").write_text("x")
    config = config_of(tmp_path)
    names = [listed.source for listed in sources.scan(config).samples]
    assert read_documents(str(tmp_path), names[1:2], config) == [{"text": "b"}]
    lines(tmp_path / "d.jsonl", {"text": "longer than it was"})
    (tmp_path / "e.parquet").write_bytes(b"truncated")
    (tmp_path / "f.txt").unlink()
    found = read_documents(str(tmp_path), names, config)
    assert found[0] == {"text": "longer than it was"}
    assert "has 1 lines now" in str(found[1])
    assert all("cannot be read as Parquet" in str(document) for document in found[2:4])
    assert "f.txt is gone" in str(found[4])
    assert all(isinstance(document, SourceError) for document in found[1:])


def test_a_text_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "wide.txt").write_bytes("日本".encode("utf-16"))
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfx")
    config = config_of(tmp_path)
    scan = sources.scan(config)
    assert scan.notes == ["1 document not in UTF-8, read with replacement characters: latin.txt"]
    found = read_documents(scan.root, [listed.source for listed in scan.samples], config)
    assert found == [{"text": "caf\ufffd"}, {"text": "x"}, {"text": "日本"}]
    assert [listed.size_bytes for listed in scan.samples] == [6, 1, 6]


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("body", None, r"e\.parquet has no column 'body' \(`text`\); it has text, n"),
        ("text", "id", r"e\.parquet has no column 'id' \(`key`\)"),
        ("n", None, r"column 'n' \(`text`\) is int64, expected strings"),
    ],
)
def test_a_parquet_file_without_what_is_asked(tmp_path: Path, text: str, key: str | None, said: str) -> None:
    pq.write_table(pa.table({"text": ["x"], "n": [1]}), tmp_path / "e.parquet")
    with pytest.raises(ConfigError, match=said):
        sources.scan(config_of(tmp_path, key=key, text=text))


def test_what_holds_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.md").touch()
    with pytest.raises(
        ConfigError, match=r"holds no documents: found 1 files \(1 with \.md\), expected \.txt, \.jsonl"
    ):
        sources.scan(config_of(tmp_path))
    lines(tmp_path / "d.jsonl")
    with pytest.raises(ConfigError, match="have no rows"):
        sources.scan(config_of(tmp_path))
    lines(tmp_path / "d.jsonl", {"body": "x"}, {"title": "y"})
    with pytest.raises(ConfigError, match=r"none of 2 rows has the field 'text'.*they have body, title"):
        sources.scan(config_of(tmp_path))
    (tmp_path / "d.jsonl").unlink()
    (tmp_path / "e.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"e\.parquet cannot be read as Parquet"):
        sources.scan(config_of(tmp_path))


def test_rows_of_many_row_groups(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(1000)]
    table = pa.table({"text": pa.array(texts).dictionary_encode(), "n": range(1000)})
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=64)
    config = config_of(tmp_path)
    scan = sources.scan(config)
    wanted = [999, 0, 64, 63, 500]
    found = read_documents(scan.root, [f"e.parquet#{number}" for number in wanted], config)
    assert found == [{"text": texts[number], "n": number} for number in wanted]
    assert [listed.size_bytes for listed in scan.samples] == [len(text) for text in texts]


def test_documents_of_a_store() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/books/a.jsonl", b'{"text": "x", "n": 1}\n{"text": "y", "n": 2}')
    fs.pipe_file("/books/b.txt", b"z")
    config = config_of("memory://books")
    scan = sources.scan(config)
    assert [scan.columns(listed) for listed in scan.samples] == [{"n": 1}, {"n": 2}, {}]
    found = read_documents(scan.root, [listed.source for listed in scan.samples], config)
    assert found == [{"text": "x", "n": 1}, {"text": "y", "n": 2}, {"text": "z"}]
    fs.rm("/books", recursive=True)
