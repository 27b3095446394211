"""Shards come back as they went in, equal rows give equal bytes, and plain tools read them without our code."""

import io
import json
import math
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manifests.errors import ShardError
from manifests.formats import shards
from manifests.formats.shards import Status, TarWriter, read_parquet, read_tar, token_type, write_labels, write_tokens
from manifests.modality import MODALITIES

STRUCTURED = sorted(name for name, modality in MODALITIES.items() if modality.is_structured)
HOSTILE_KEYS = [
    "plain_key-1",
    "a.b.c",
    ".hidden",
    "folder/sub/photo.jpg",
    "../../etc/passwd",
    "/absolute",
    "photo",
    "photo.json",
    "photo%2Ejson",
    "50%",
    "a~b",
    "naïve café",
    "写真",
    "📷" * 30,
    "x" * 80,
    "x" * 81,
    "x" * 5000,
    " leading and trailing ",
    "line\nbreak",
    "nul\0byte",
]

# -- strategies -------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
FIELD_VALUES = {
    "string": TEXTS,
    "float32": st.floats(width=32, allow_nan=False),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "uint8": st.integers(0, 255),
    "list<uint32>": st.lists(st.integers(0, 2**32 - 1), max_size=4),
    "list<float32>": st.lists(st.floats(width=32, allow_nan=False), max_size=4),
}
NOT_OK = st.sampled_from([Status.FAILED, Status.ABSENT, Status.NOT_SELECTED, Status.FORGOTTEN])
KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


def label_values(name: str) -> st.SearchStrategy[Any]:
    """Labels of a structured modality, as labelers make them."""
    modality = MODALITIES[name]
    if modality.kind == "text":
        return TEXTS
    record = st.fixed_dictionaries({field: FIELD_VALUES[kind] for field, kind in modality.fields.items()})
    return st.lists(record, max_size=3) if modality.many else record


@st.composite
def rows(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> tuple[list[str], list[int], list[Any]]:
    """Keys, statuses and values of some rows; the values of rows that are not ok are None."""
    keys = draw(st.lists(KEYS, unique=True, max_size=6))
    statuses = [int(draw(st.just(Status.OK) | NOT_OK)) for _ in keys]
    return keys, statuses, [draw(values) if status == Status.OK else None for status in statuses]


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "expected"),
    [
        (1, "uint8"),
        (255, "uint8"),
        (256, "uint8"),
        (257, "uint16"),
        (65536, "uint16"),
        (65537, "uint32"),
        (2**32, "uint32"),
    ],
)
def test_tokens_have_the_narrowest_type_that_holds_the_vocabulary(vocabulary: int, expected: str) -> None:
    assert str(token_type(vocabulary)) == expected
    data = write_tokens(["a"], [0], [[0, vocabulary - 1]], vocabulary, {})
    assert str(pq.read_schema(io.BytesIO(data)).field("tokens").type.value_type) == expected
    assert read_parquet(io.BytesIO(data)).values == [[0, vocabulary - 1]]


@given(data=st.data(), vocabulary=st.sampled_from([2, 256, 1024, 30_000, 65_536, 65_537, 2**32]))
@settings(max_examples=60, deadline=None)
def test_tokens_come_back(data: st.DataObject, vocabulary: int) -> None:
    keys, statuses, values = data.draw(rows(st.lists(st.integers(0, vocabulary - 1), max_size=9)))
    arrays = [None if value is None else np.array(value, np.int64) for value in values]
    shard = write_tokens(keys, statuses, arrays, vocabulary, {"modality": "depth"})
    found = read_parquet(io.BytesIO(shard))
    assert (found.keys, found.statuses, found.values) == (keys, statuses, values)
    assert write_tokens(keys, statuses, values, vocabulary, {"modality": "depth"}) == shard
    assert read_parquet(io.BytesIO(shard), values=False) == shards.ShardRows(keys=keys, statuses=statuses, values=None)


def test_a_token_over_its_type_is_refused() -> None:
    with pytest.raises(pa.ArrowInvalid):
        write_tokens(["a"], [0], [[256]], 256, {})
    with pytest.raises((pa.ArrowInvalid, OverflowError)):
        write_tokens(["a"], [0], [[-1]], 256, {})


def test_tokens_are_packed_near_their_entropy() -> None:
    rows, tokens, vocabulary = 2048, 196, 1024
    values = np.random.default_rng(0).integers(0, vocabulary, (rows, tokens))
    shard = write_tokens([f"{row:016x}" for row in range(rows)], [0] * rows, list(values), vocabulary, {})
    file = pq.ParquetFile(io.BytesIO(shard))
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [1024, 1024]
    for group in groups:
        columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
        packed = columns["tokens.list.element"]
        assert "DELTA_BINARY_PACKED" in packed.encodings
        assert not any("DICTIONARY" in encoding for encoding in packed.encodings)
        assert packed.compression == "ZSTD"
    # Random 10-bit tokens cannot be smaller than 10 bits; measured: 1.143 of that, keys and all.
    smallest = rows * tokens * math.log2(vocabulary) / 8
    assert 1.0 < len(shard) / smallest < 1.2


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURED)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_labels_come_back(name: str, data: st.DataObject) -> None:
    keys, statuses, values = data.draw(rows(label_values(name)))
    shard = write_labels(keys, statuses, values, MODALITIES[name], {"modality": name})
    found = read_parquet(io.BytesIO(shard))
    assert (found.keys, found.statuses, found.values) == (keys, statuses, values)
    assert write_labels(keys, statuses, values, MODALITIES[name], {"modality": name}) == shard


def test_a_shard_says_what_it_is() -> None:
    shard = write_labels(["k"], [0], ["a dog"], MODALITIES["caption"], {"corpus": "photos", "part": 3})
    metadata = pq.read_schema(io.BytesIO(shard)).metadata
    assert json.loads(metadata[b"modmill"]) == {"corpus": "photos", "format": 1, "part": 3}


def test_a_null_row_keeps_its_place() -> None:
    statuses = [Status.OK, Status.FAILED, Status.ABSENT, Status.NOT_SELECTED, Status.FORGOTTEN]
    values = ["a dog", None, None, None, None]
    shard = write_labels(list("abcde"), statuses, values, MODALITIES["caption"], {})
    table = pq.read_table(io.BytesIO(shard))
    assert table.to_pydict() == {"key": list("abcde"), "status": [0, 1, 2, 3, 4], "label": values}


# -- plain readers ----------------------------------------------------------------------------------------------------


def test_pyarrow_and_duckdb_read_tokens_as_integers(tmp_path: Path) -> None:
    path = tmp_path / "part-0000000.parquet"
    path.write_bytes(write_tokens(["a", "b", "c"], [0, 1, 0], [[1, 1023], None, []], 1024, {}))
    assert pq.read_table(path).to_pydict() == {
        "key": ["a", "b", "c"],
        "status": [0, 1, 0],
        "tokens": [[1, 1023], None, []],
    }
    with duckdb.connect() as connection:
        answer = connection.execute(f"SELECT key, status, tokens, typeof(tokens) FROM '{path}'").fetchall()
    assert answer == [
        ("a", 0, [1, 1023], "USMALLINT[]"),
        ("b", 1, None, "USMALLINT[]"),
        ("c", 0, [], "USMALLINT[]"),
    ]


def test_duckdb_reads_labels_as_records(tmp_path: Path) -> None:
    path = tmp_path / "boxes.parquet"
    box = {"class": "dog", "score": 0.5, "x0": 0.0, "y0": 0.25, "x1": 0.5, "y1": 1.0}
    path.write_bytes(write_labels(["a", "b"], [0, 2], [[box, box], None], MODALITIES["boxes"], {}))
    with duckdb.connect() as connection:
        answer = connection.execute(f"SELECT key, unnest(label, recursive := true) FROM '{path}'").fetchall()
    assert answer == [("a", "dog", 0.5, 0.0, 0.25, 0.5, 1.0)] * 2


WEBDATASET = """
import base64, json, sys
sys.modules["torch"] = None
import webdataset
for row in webdataset.WebDataset(sys.argv[1], shardshuffle=False):
    values = {name: base64.b64encode(data).decode() for name, data in row.items() if not name.startswith("__")}
    print(json.dumps(values))
"""


def test_webdataset_reads_tars_without_our_code(tmp_path: Path) -> None:
    import base64

    keys = [key for key in HOSTILE_KEYS if "\0" not in key]
    path = tmp_path / "part-0000000.c00.tar"
    expected = []
    writer = TarWriter("png")
    for number, key in enumerate(keys):
        value = None if number % 5 == 1 else b"pixels of " + key.encode()
        writer.add(key, Status.OK if value else Status.FAILED, value)
        expected.append(({"key": key, "status": 0 if value else 1}, value))
    with writer.finish() as stream:
        path.write_bytes(stream.read())
    output = subprocess.run(
        [sys.executable, "-c", WEBDATASET, str(path)], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    found = []
    for line in output.splitlines():
        row = {name: base64.b64decode(data) for name, data in json.loads(line).items()}
        found.append((json.loads(row["json"]), row.get("png")))
    assert found == expected


# -- tars -------------------------------------------------------------------------------------------------------------


def tar_of(keys: list[str], statuses: list[int], values: list[bytes | None], extension: str = "npy") -> bytes:
    writer = TarWriter(extension)
    for key, status, value in zip(keys, statuses, values, strict=True):
        writer.add(key, status, value)
    with writer.finish() as stream:
        return stream.read()


@given(content=rows(st.binary(max_size=1500)))
@example(content=(HOSTILE_KEYS, [0] * len(HOSTILE_KEYS), [b"x"] * len(HOSTILE_KEYS)))
@settings(max_examples=60, deadline=None)
def test_tars_come_back(content: tuple[list[str], list[int], list[bytes | None]]) -> None:
    keys, statuses, values = content
    data = tar_of(keys, statuses, values)
    assert read_tar(io.BytesIO(data)) == shards.ShardRows(keys=keys, statuses=statuses, values=values)
    assert read_tar(io.BytesIO(data), values=False) == shards.ShardRows(keys=keys, statuses=statuses, values=None)
    assert tar_of(keys, statuses, values) == data


def test_members_are_ustar_of_no_time_and_no_owner() -> None:
    data = tar_of(HOSTILE_KEYS, [0] * len(HOSTILE_KEYS), [b"x"] * len(HOSTILE_KEYS), "png")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    assert len({member.name for member in members}) == 2 * len(HOSTILE_KEYS)
    for member in members:
        assert member.isreg()
        assert member.name.isascii()
        assert "/" not in member.name
        assert len(member.name) <= 100
        assert member.name.count(".") == 1
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert member.mode == 0o644
    stems = [member.name.split(".")[0] for member in members]
    assert stems[0::2] == stems[1::2] == [shards.member_name(key) for key in HOSTILE_KEYS]
    assert [member.name.split(".")[1] for member in members] == ["json", "png"] * len(HOSTILE_KEYS)


@given(keys=st.lists(KEYS, unique=True, min_size=2, max_size=20))
@example(keys=HOSTILE_KEYS)
def test_different_keys_have_different_members(keys: list[str]) -> None:
    names = [shards.member_name(key) for key in keys]
    assert len(set(names)) == len(keys)


def member(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = "/etc/passwd"
    return info, data


def status_of(key: str, status: int = 0) -> tuple[tarfile.TarInfo, bytes]:
    return member(f"{key}.json", json.dumps({"key": key, "status": status}).encode())


def handmade(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    file.seek(0)
    return file


def test_a_tar_made_elsewhere_is_read_in_either_order_of_members() -> None:
    found = read_tar(handmade(status_of("b"), member("b.png", b"B"), member("a.png", b"A"), status_of("a")))
    assert found == shards.ShardRows(keys=["b", "a"], statuses=[0, 0], values=[b"B", b"A"])


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        tarfile.CONTTYPE,
    ],
)
def test_what_is_no_plain_file_is_refused(kind: bytes) -> None:
    with pytest.raises(ShardError, match=r"member 'a\.png' of the tar is no plain file"):
        read_tar(handmade(status_of("a"), member("a.png", b"", kind)))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([status_of("a"), status_of("b"), member("a.png")], "row 'a' stands twice"),
        ([status_of("a"), status_of("a")], "row 'a' stands twice"),
        ([status_of("a"), member("a.png"), member("a.png")], "row 'a' stands twice"),
        ([status_of("a"), member("a.png"), member("a.npy")], "more than one value"),
        ([status_of("a"), member("b.png")], "row 1 of the tar has no .json member"),
        ([member("a.json", b"not json")], "no WebDataset shard"),
        ([member("a.json", b'{"key": "a"}')], "no WebDataset shard"),
        ([member("a.json", b"[1, 2]")], "no WebDataset shard"),
        ([member("a.json", b"\xff")], "no WebDataset shard"),
    ],
)
def test_a_tar_that_is_no_shard_is_refused(members: list[tuple[tarfile.TarInfo, bytes]], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        read_tar(handmade(*members))


def test_a_tar_cut_anywhere_is_refused() -> None:
    data = tar_of(list("abc"), [0, 1, 0], [b"A" * 700, None, b"C" * 10])
    end = len(data.rstrip(b"\0"))
    # Every block's edge, where tarfile sees a clean end, and places between.
    cuts = sorted({*range(0, end + 512, 512), *range(1, end, 301)})
    for cut in cuts:
        with pytest.raises(ShardError):
            read_tar(io.BytesIO(data[:cut]))


def test_a_tar_with_a_broken_header_is_refused() -> None:
    data = tar_of(list("abc"), [0, 0, 0], [b"A" * 700, b"B", b"C" * 10])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        headers = [info.offset for info in tar]
    for offset in headers:
        broken = bytearray(data)
        broken[offset + 3] ^= 1
        with pytest.raises(ShardError):
            read_tar(io.BytesIO(bytes(broken)))


@pytest.mark.parametrize("data", [b"", b"x" * 3000, b"PAR1", bytes(100)])
def test_what_is_no_tar_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError):
        read_tar(io.BytesIO(data))


def test_a_tar_over_memory_spools_to_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SPOOL_BYTES", 1000)
    assert read_tar(io.BytesIO(tar_of(["a"], [0], [b"A" * 5000]))).values == [b"A" * 5000]


# -- Parquet that is no shard -----------------------------------------------------------------------------------------


def parquet_of(columns: dict[str, list[Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1",
        bytes(2000),
        write_tokens(["a"] * 50, [0] * 50, [[1, 2, 3]] * 50, 256, {})[:-20],
        parquet_of({"key": ["a"], "label": ["x"]}),
        parquet_of({"status": [0], "label": ["x"]}),
        parquet_of({"key": ["a"], "status": [0]}),
    ],
    ids=["empty", "magic", "zeros", "cut", "no status", "no key", "no value"],
)
def test_parquet_that_is_no_shard_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError, match="no Parquet shard"):
        read_parquet(io.BytesIO(data))


def test_a_shard_that_is_not_there_is_a_shard_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no Parquet shard"):
        read_parquet(str(tmp_path / "nowhere.parquet"))


# -- keys, samples, failures ------------------------------------------------------------------------------------------


def test_keys_digest_is_of_the_rows_in_their_order() -> None:
    # The rule may never change: parts and shards in every log hold its result.
    expected = "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"
    assert shards.keys_digest(["a", "b"]) == expected
    assert len({shards.keys_digest(keys) for keys in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}) == 5


def test_samples_come_back_with_their_source_columns() -> None:
    rows = [
        {
            "corpus": "photos",
            "part": 1,
            "row": row,
            "key": f"k{row}",
            "source": f"{row}.jpg",
            "size_bytes": 2**40 + row,
            "sha256": bytes(32),
            "caption": None if row else "a dog",
            "tags": ["x", "y"],
        }
        for row in range(3)
    ]
    columns = pa.schema([("caption", pa.string()), ("tags", pa.list_(pa.string()))])
    data = shards.write_samples(rows, columns)
    read = [
        shards.Sample(
            **{name: row[name] for name in shards.SAMPLE_COLUMNS},
            columns={"caption": row["caption"], "tags": row["tags"]},
        )
        for row in rows
    ]
    assert shards.read_samples(data) == read
    assert shards.write_samples(rows, columns) == data
    assert tuple(pq.read_schema(io.BytesIO(data)).names) == (*shards.SAMPLE_COLUMNS, "caption", "tags")
    with pytest.raises(ShardError, match="no samples file"):
        shards.read_samples(data[:-9])


@pytest.mark.parametrize("kind", ["text", "record", "list"])
def test_samples_without_a_value_are_found_by_sql(kind: str, tmp_path: Path) -> None:
    """DuckDB 2.0 misses them in columns of one text and nulls that have no dictionary."""
    types = {"text": pa.string(), "record": pa.struct([("x", pa.string())]), "list": pa.list_(pa.string())}
    values = {"text": ["x", None], "record": [{"x": "x"}, {"x": None}], "list": [["x"], None]}[kind]
    table = pa.table({"key": ["a", "b"], "found": pa.array(values, types[kind])})
    path = tmp_path / "samples.parquet"
    path.write_bytes(shards.encode_samples(table))
    column = "found.x" if kind == "record" else "found"
    query = f"SELECT key FROM '{path}' WHERE {column} IS NULL"
    assert duckdb.execute(query).fetchall() == [("b",)]
    read = pq.ParquetFile(path).metadata.row_group(0)
    encodings = {read.column(at).path_in_schema: read.column(at).encodings for at in range(read.num_columns)}
    assert [any("DICTIONARY" in name for name in encoding) for encoding in encodings.values()] == [False, True]


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_vectors_are_lists_of_one_length(dtype: str, tmp_path: Path) -> None:
    modality = replace(MODALITIES["clip_global"], channels=3, dtype=dtype)
    values = [np.array([1, 2, 3], dtype), None, np.array([4, 5, 6], dtype)]
    data = write_labels(list("abc"), [0, 1, 0], values, modality, {})
    assert write_labels(list("abc"), [0, 1, 0], values, modality, {}) == data
    found = read_parquet(io.BytesIO(data))
    assert (found.statuses, found.values) == ([0, 1, 0], [[1, 2, 3], None, [4, 5, 6]])
    assert pq.read_schema(io.BytesIO(data)).field("label").type == pa.list_(pa.from_numpy_dtype(dtype), 3)
    path = tmp_path / "vectors.parquet"
    path.write_bytes(data)
    query = f"SELECT key, list_sum(label) FROM '{path}' WHERE label IS NOT NULL"
    assert duckdb.execute(query).fetchall() == [("a", 6), ("c", 15)]
    with pytest.raises(pa.ArrowInvalid):
        write_labels(["a"], [0], [np.zeros(4, dtype)], modality, {})


def test_failures_have_the_columns_of_the_view() -> None:
    record = {
        "corpus": "photos",
        "part": 0,
        "row": 3,
        "key": "k3",
        "modality": "rgb",
        "form": "label",
        "crop": None,
        "stage": "decode",
        "class": "DecodeError",
        "message": "cut short",
    }
    data = shards.write_failures([record])
    assert pq.read_table(io.BytesIO(data)).to_pylist() == [record]
    assert pq.read_table(io.BytesIO(shards.write_failures([]))).schema == pq.read_schema(io.BytesIO(data))
