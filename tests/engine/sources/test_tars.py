"""Images in WebDataset tars: what their headers tell, what is wrong with them, and their bytes read in place."""

import io
import json
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ingest import ingest
from engine.ingest.intake import reader
from engine.pipeline.config import CorpusConfig
from engine.sources import scan as sources
from engine.sources.kinds import open_source
from engine.sources.listing import File, Notes
from engine.sources.tars import _samples, read_directory
from manifests.catalog.catalog import Catalog
from manifests.errors import ConfigError, SourceError
from manifests.formats.shards import SourcePlace, read_samples
from manifests.log import entries as log
from manifests.store.storage import Storage, open_storage


def write_tar(
    path: Path, members: Mapping[str, bytes | tarfile.TarInfo], format: int = tarfile.USTAR_FORMAT
) -> dict[str, int]:
    """A tar of these members; where the header of each begins."""
    begins = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            begins[name] = tar.offset
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return begins


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd"
    return info


def scan(source: Path | str, **options: str) -> sources.Scan:
    return sources.scan(CorpusConfig(source=str(source), **options))  # pyright: ignore[reportArgumentType]


def read_all(found: sources.Scan, config: CorpusConfig) -> list[bytes | str | None]:
    source = reader(found.root, config, found.samples)
    values: list[bytes | str | None] = []
    for place in range(len(found.samples)):
        try:
            values.append(source.read(place))
        except SourceError as error:
            values.append(str(error))
    return values


def test_members_are_samples_by_key(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "b.tar",
        {"0003.jpg": b"three", "0003.txt": b" a cat\n", "0003.json": b'{"width": 5, "tags": ["x"]}', "0003.cls": b"7"},
    )
    write_tar(tmp_path / "sub/a.tar", {"x/1.seg.png": b"seg", "x/1.PNG": b"one", "._1.jpg": b"", "only.txt": b"text"})
    found = scan(tmp_path)
    assert [(each.key, each.source) for each in found.samples] == [
        ("0003", "b.tar#0003.jpg"),
        ("x/1", "sub/a.tar#x/1.PNG"),
    ]
    assert read_all(found, CorpusConfig(source="x")) == [b"three", b"one"]
    assert found.columns(found.samples[0]) == {"caption": "a cat", "width": 5, "tags": ["x"]}
    assert found.columns(found.samples[1]) == {}
    assert found.notes == [
        "1 member of kind .cls beside an image, passed over: b.tar#0003.cls",
        "1 member of kind .seg.png beside an image, passed over: sub/a.tar#x/1.seg.png",
        "1 sample without an image, passed over: sub/a.tar#only",
    ]
    assert [each.source for each in scan(tmp_path, image="seg.png").samples] == ["sub/a.tar#x/1.seg.png"]
    assert [len(each.key) for each in scan(tmp_path, key="source").samples] == [16, 16]


def test_names_with_a_dot_of_their_own_are_photographs(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "2020.01.02 sea.jpg": b"sea",
            "2020.01.02 sea.txt": b"the sea",
            "2020.01.03 hill.JPG": b"hill",
            "v1.5/IMG_1.5x.png": b"zoomed",
            "v1.5/IMG_1.5x.json": b'{"zoom": 1.5}',
            "photo.final.jpg": b"final",
            "plain.jpg": b"plain",
            "plain.seg.png": b"seg",
        },
    )
    found = scan(tmp_path)
    assert [each.key for each in found.samples] == [
        "2020.01.02 sea",
        "2020.01.03 hill",
        "v1.5/IMG_1.5x",
        "photo.final",
        "plain",
    ]
    assert read_all(found, CorpusConfig(source="x")) == [b"sea", b"hill", b"zoomed", b"final", b"plain"]
    assert [found.columns(each) for each in found.samples] == [{"caption": "the sea"}, {}, {"zoom": 1.5}, {}, {}]
    assert found.notes == ["1 member of kind .seg.png beside an image, passed over: a.tar#plain.seg.png"]


def test_fields_of_several_words_are_no_photographs_unless_they_are_asked_for(tmp_path: Path) -> None:
    members = {f"{number}.{kind}.png": kind.encode() for number in range(2) for kind in ("rgb", "depth")}
    write_tar(tmp_path / "a.tar", {**members, "2.jpg": b"photo"})
    found = scan(tmp_path)
    assert [each.key for each in found.samples] == ["2"]
    hint = "its images are of more than one word; `image: depth.png` takes those"
    assert found.notes == [f"2 samples without an image, passed over ({hint}): a.tar#0, a.tar#1"]
    assert [each.key for each in scan(tmp_path, image="rgb.png").samples] == ["0", "1"]


def test_the_image_of_a_sample_stays_the_one_it_was_before_more_kinds_were_read(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.avif": b"avif", "1.jpg": b"jpg", "2.avif": b"avif", "3.jfif": b"jfif"})
    assert [each.source for each in scan(tmp_path).samples] == ["a.tar#1.jpg", "a.tar#2.avif", "a.tar#3.jfif"]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_unicode_names(tmp_path: Path, format: int) -> None:
    names = {f"{'d' * 90}/{'e' * 120}{number}.jpg": str(number).encode() * 700 for number in range(3)} | {
        "é 雪.jpg": b"snow"
    }
    write_tar(tmp_path / "a.tar", names, format)
    found = scan(tmp_path / "a.tar")
    assert [each.source.partition("#")[2] for each in found.samples] == list(names)
    assert read_all(found, CorpusConfig(source="x")) == list(names.values())


def test_names_that_lead_out_and_links_are_passed_over(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {
            "../up.jpg": b"x",
            "/etc/abs.jpg": b"x",
            "a/../../b.jpg": b"x",
            "soft.jpg": link("soft.jpg", tarfile.SYMTYPE),
            "hard.jpg": link("hard.jpg", tarfile.LNKTYPE),
            "dev.jpg": link("dev.jpg", tarfile.CHRTYPE),
            "folder": link("folder", tarfile.DIRTYPE),
            "line\nbreak.jpg": b"x",
            "good.jpg": b"good",
        },
    )
    found = scan(tmp_path)
    assert [each.key for each in found.samples] == ["good"]
    assert read_all(found, CorpusConfig(source="x")) == [b"good"]
    told = "\n".join(found.notes)
    assert "4 members of an absolute name, or one with .. or control characters, passed over" in told
    assert "1 member being no plain file but a symbolic link, passed over: a.tar#soft.jpg" in told
    assert "but a hard link" in told
    assert "but a device" in told
    assert "../up.jpg" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"]


def test_a_truncated_tar(tmp_path: Path) -> None:
    begins = write_tar(tmp_path / "a.tar", {f"{number}.jpg": bytes([number]) * 3000 for number in range(5)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: begins["3.jpg"] + 512 + 100])
    found = scan(tmp_path)
    *good, last = read_all(found, CorpusConfig(source="x"))
    assert good == [bytes([number]) * 3000 for number in range(3)]
    assert last == "a.tar#3.jpg is cut short: 100 of 3,000 bytes; mend the tar"
    assert found.notes == [f"1 tar cut short: a.tar at byte {begins['3.jpg'] + 612:,}: it ends within 3.jpg"]
    # Without an end mark, all members are whole.
    (tmp_path / "a.tar").write_bytes(whole[: begins["3.jpg"]])
    assert len(scan(tmp_path).samples) == 3
    assert "without an end mark" in scan(tmp_path).notes[0]


def test_a_flipped_header(tmp_path: Path) -> None:
    begins = write_tar(tmp_path / "a.tar", {name: b"x" * 600 for n in range(4) for name in (f"{n}.jpg", f"{n}.txt")})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[begins["2.txt"] + 3] ^= 0x40
    (tmp_path / "a.tar").write_bytes(data)
    found = scan(tmp_path)
    # Sample 2 may have more members than can be seen: it is taken in when the tar is mended.
    assert [each.key for each in found.samples] == ["0", "1"]
    assert found.notes == [
        "1 tar broken, what follows in it is lost: "
        f"a.tar at byte {begins['2.txt']:,}: the checksum of a header is wrong",
        "1 sample before the damage, left out until its tar is mended: a.tar#2",
    ]


def test_keys_that_stand_twice(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": b"a", "2.jpg": b"b"})
    write_tar(tmp_path / "b.tar", {"1.jpg": b"c"})
    with pytest.raises(ConfigError, match=r"b\.tar#1\.jpg has the key '1', as has a\.tar#1\.jpg; with `key: source`"):
        scan(tmp_path)
    assert len(scan(tmp_path, key="source").samples) == 3
    with pytest.raises(ConfigError, match="`key: source`"):
        scan(tmp_path, key="id")
    # One that stands twice among many costs one sample.
    write_tar(tmp_path / "c" / "c.tar", {"1.jpg": b"a", "2.jpg": b"b"})
    write_tar(tmp_path / "c" / "d.tar", {"3.jpg": b"c", "1.jpg": b"again", "4.jpg": b"d"})
    found = scan(tmp_path / "c")
    assert [each.source for each in found.samples] == ["c.tar#1.jpg", "c.tar#2.jpg", "d.tar#3.jpg", "d.tar#4.jpg"]
    assert found.notes == [
        "1 sample with a key that stands earlier, passed over (with `key: source` keys are made of tar and name): d.tar#1.jpg"
    ]


def test_members_of_a_sample_may_stand_apart(tmp_path: Path) -> None:
    pictures = {f"{number}.jpg": bytes([number]) * 900_000 for number in range(3)}
    captions = {f"{number}.txt": f"cap {number}".encode() for number in range(3)}
    write_tar(tmp_path / "a.tar", {**pictures, **captions, "sub/1.jpg": b"x"})
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        again = tarfile.TarInfo("1.jpg")
        tar.addfile(again)
    found = scan(tmp_path)
    assert [each.key for each in found.samples] == ["0", "1", "2", "sub/1"]
    assert found.notes == ["1 member of a name that stands twice, the later left out: a.tar#1.jpg"]
    assert [found.columns(each) for each in found.samples[:3]] == [{"caption": f"cap {number}"} for number in range(3)]
    assert read_all(found, CorpusConfig(source="x")) == [*pictures.values(), b"x"]
    # What is far from a picture is not read with it.
    beside = [each.beside for each in found.samples]
    source = open_source(found.root, CorpusConfig(source="x"), places(found), beside=beside)
    assert [source.read_beside(place) for place in range(3)] == [{}, {"txt": b"cap 1"}, {"txt": b"cap 2"}]


def places(found: sources.Scan) -> list[SourcePlace]:
    return [
        SourcePlace(source=each.source, size_bytes=each.size_bytes, source_offset=each.offset) for each in found.samples
    ]


def pax(name: str, **records: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.pax_headers = records
    return info


@pytest.mark.parametrize("size", ["9" * 5000, "9" * 30, "-5", "1e3", str(2**63), str(10**30), ""])
def test_a_size_that_no_member_has_ends_its_tar_alone(tmp_path: Path, size: str) -> None:
    write_tar(tmp_path / "a.tar", {"1.jpg": b"a"})
    write_tar(tmp_path / "b.tar", {"2.jpg": b"b", "3.jpg": b"c", "4.jpg": pax("4.jpg", size=size)}, tarfile.PAX_FORMAT)
    found = scan(tmp_path)
    assert [each.key for each in found.samples] == ["1", "2"]
    assert "an extended header says" in found.notes[0]


@pytest.mark.parametrize("size", [2**64, 2**86, -5, -(2**63)])
def test_a_binary_size_that_no_member_has(tmp_path: Path, size: int) -> None:
    begins = write_tar(tmp_path / "a.tar", {"1.jpg": b"a", "2.jpg": b"b", "3.jpg": b"c"})
    field = (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[begins["3.jpg"] :] = with_field(bytes(data[begins["3.jpg"] :]), 124, field)
    (tmp_path / "a.tar").write_bytes(data)
    assert [each.key for each in scan(tmp_path).samples] == ["1"]


def with_field(data: bytes, at: int, field: bytes) -> bytes:
    """A tar with a field of its first header replaced, and a checksum that fits."""
    header = bytearray(data[:512])
    header[at : at + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def test_many_records_of_an_extended_header_take_no_time(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        {"1.jpg": pax("1.jpg", **{f"{number:x}": "" for number in range(60_000)})},
        tarfile.PAX_FORMAT,
    )
    began = time.process_time()
    assert len(scan(tmp_path).samples) == 1
    assert time.process_time() - began < 1


# -- any header -------------------------------------------------------------------------------------------------------

_PIECES = st.one_of(
    st.builds(
        lambda name, field, at: with_field(member(name), at, field),
        st.text("ab./\0é", max_size=20),
        st.one_of(st.binary(max_size=12), st.integers(0, 8**12 - 1).map(lambda size: b"%012o" % size), st.just(b"x")),
        st.sampled_from([0, 124, 156, 345]),
    ),
    st.builds(
        lambda key, value, length: member("x", b"%d %s=%s\n" % (length, key, value), b"x"),
        st.sampled_from([b"size", b"path", b"mtime", b""]),
        st.one_of(st.binary(max_size=30), st.integers().map(lambda size: b"%d" % size), st.just(b"9" * 5000)),
        st.integers(0, 6000),
    ),
    st.binary(max_size=600),
    st.just(bytes(512)),
)


def member(name: str, data: bytes = b"data", kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo("name.jpg")
    info.size, info.type = len(data), kind
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return with_field(header, 0, name.encode()[:100]) + data + bytes(-len(data) % 512)


def check_any_headers(pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    found = read_directory(io.BytesIO(data), len(data))
    ends = [each.offset + each.size for each in found.members]
    assert all(0 <= each.size <= 1 << 48 for each in found.members)
    assert all(end <= len(data) for end in ends[:-1]), "only the last may be cut"
    file = File(path="a.tar", size_bytes=len(data), mtime_ns=0)
    notes = Notes()
    listed = list(_samples(file, found, CorpusConfig(source="x"), notes))
    assert sum(each.size_bytes or 0 for each in listed) < 2**63
    assert all(len(line.encode()) for line in notes.lines())


_any_headers = given(st.lists(_PIECES, max_size=6))
test_any_headers_are_listed_or_told_of = settings(max_examples=200, deadline=None)(_any_headers(check_any_headers))


@pytest.mark.long
@settings(max_examples=10_000, deadline=None)
@_any_headers
def test_ten_thousand_tars(pieces: list[bytes]) -> None:
    check_any_headers(pieces)


def test_a_tar_of_any_name(tmp_path: Path) -> None:
    write_tar(tmp_path / "İstanbul.TAR", {"0.jpg": b"a", "0.txt": b"cap"})
    found = scan(tmp_path)
    assert read_all(found, CorpusConfig(source="x")) == [b"a"]
    assert found.columns(found.samples[0]) == {"caption": "cap"}


def test_compressed_tars_and_others(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ConfigError, match=r"a\.tar\.gz is a compressed tar.*unpack it"):
        scan(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(ConfigError, match=r"1 tars hold no images.*compressed"):
        scan(tmp_path)
    (tmp_path / "c.tar").write_bytes(b"")
    write_tar(tmp_path / "d.tar", {"1.jpg": b"a"})
    found = scan(tmp_path)
    assert [each.key for each in found.samples] == ["1"]
    assert "2 tars compressed, passed over (unpack it: members are read in place): a.tar.gz, b.tar" in found.notes
    with pytest.raises(ConfigError, match="table is for folders"):
        scan(tmp_path, table="x.csv")


def test_headers_of_a_tar_are_read_alone(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{number}.jpg": bytes(1_000_000) for number in range(20)})
    read = []

    class Counted(io.FileIO):
        def readinto(self, buffer: Any) -> int:
            read.append(len(buffer))
            return super().readinto(buffer) or 0

    size = (tmp_path / "a.tar").stat().st_size
    with io.BufferedReader(Counted(tmp_path / "a.tar")) as stream:
        assert len(read_directory(stream, size).members) == 20
    assert sum(read) < 0.02 * size


class CountedReads:
    """How many requests reach a store."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        import s3fs

        self.ranges: list[tuple[int, int]] = []
        original = s3fs.S3FileSystem._cat_file

        async def counted(
            store: object, path: str, version_id: object = None, start: int = 0, end: int = 0, **more: object
        ) -> bytes:
            self.ranges.append((start, end))
            return await original(store, path, version_id=version_id, start=start, end=end, **more)  # pyright: ignore

        patch.setattr(s3fs.S3FileSystem, "_cat_file", counted)


def test_a_store_is_asked_for_few_ranges(tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    members = {
        name: data
        for n in range(120)
        for name, data in ((f"{n:03d}.jpg", b"%03d" % n * 20_000), (f"{n:03d}.txt", b"number %d" % n))
    }
    write_tar(tmp_path / "a.tar", members)
    s3fs.S3FileSystem().put(str(tmp_path / "a.tar"), f"{s3_bucket}/tars/a.tar")
    counted = CountedReads(monkeypatch)
    config = CorpusConfig(source=f"{s3_bucket}/tars", part_rows=80)
    with Catalog(created(tmp_path / "work")) as catalog:
        found = ingest.ingest(catalog, "photos", config, run="r")
        assert (found.samples, found.new_parts) == (120, 2)
        rows = catalog.sql("SELECT * FROM samples WHERE corpus = 'photos' ORDER BY part, row").to_pylist()
    assert [row["caption"] for row in rows] == [f"number {n}" for n in range(120)]
    # 7 MB with their captions, in blocks of up to 8 MB.
    assert len(counted.ranges) <= 4


def created(path: Path) -> Storage:
    storage = open_storage(path)
    log.create_workspace(storage)
    return storage


def test_ingest_keeps_where_members_lie(tmp_path: Path, make_photos: Callable[..., Path]) -> None:
    photos = sorted(make_photos(tmp_path / "made", 5).glob("*.jpg"))
    members: dict[str, bytes | tarfile.TarInfo] = {}
    for number, photo in enumerate(photos):
        members[f"{number}.jpg"] = photo.read_bytes()
        members[f"{number}.json"] = json.dumps({"n": number, "source_offset": "mine"}).encode()
    write_tar(tmp_path / "tars/a.tar", members)
    config = CorpusConfig(source=str(tmp_path / "tars"), part_rows=3)
    storage = created(tmp_path / "work")
    with Catalog(storage) as catalog:
        assert ingest.ingest(catalog, "photos", config, run="r").new == 5
        parts = catalog.parts("photos")
        rows = [row for part in parts for row in read_samples(storage.read(part.path))]
        whole = (tmp_path / "tars/a.tar").read_bytes()
        for row, photo in zip(rows, photos, strict=True):
            begin = row.source_offset
            assert whole[begin : begin + row.size_bytes] == photo.read_bytes()
            assert row.columns["source_source_offset"] == "mine"
        # A tar that grew: new samples are a new part, all others stay.
        write_tar(tmp_path / "tars/a.tar", {**members, "9.jpg": photos[0].read_bytes()})
        again = ingest.ingest(catalog, "photos", config, run="r")
        assert (again.new, again.changed, again.vanished) == (1, 0, 0)
        assert catalog.parts("photos")[:2] == parts
        # Its members moved: rows that name their old places are told.
        write_tar(tmp_path / "tars/a.tar", {"first.jpg": b"x", **members})
        moved = ingest.ingest(catalog, "photos", config, run="r")
        assert (moved.new, moved.changed, moved.vanished) == (1, 5, 1)
