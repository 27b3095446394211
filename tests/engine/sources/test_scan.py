import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.ingest.intake import reader
from engine.pipeline import sections
from engine.pipeline.config import CorpusConfig
from engine.sources import listing
from engine.sources import scan as sources
from engine.sources.kinds import KINDS
from manifests.errors import ConfigError, SourceError


def put(root: Path, **files: bytes) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def images(root: Path, *names: str) -> None:
    put(root, **dict.fromkeys(names, b"not decoded here"))


def listed_names(source: object) -> set[str]:
    return {listed.source for listed in sources.scan(CorpusConfig(source=str(source))).samples}


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_what_is_passed_over_is_counted_by_kind(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg", "b.JFIF", "c.avif")
    others = ("a.txt", "a.json", "d.txt", "e.mov", "sub/f.MOV", "README", "h.heic", "x.tar", "y.tar.gz")
    put(tmp_path, **dict.fromkeys(others, b""))
    (tmp_path / "t.csv").write_text("file_name,caption\na.jpg,x\nb.JFIF,y\nc.avif,z\n")
    scan = sources.scan(CorpusConfig(source=str(tmp_path), table=str(tmp_path / "t.csv")))
    assert {listed.source for listed in scan.samples} == {"a.jpg", "b.JFIF", "c.avif"}
    assert sorted(scan.notes) == [
        "1 file of kind .heic, passed over (pip install 'modmill[heif]' reads it): h.heic",
        "1 file of kind .txt, passed over: d.txt",
        "1 file without a suffix, passed over: README",
        "2 files of kind .mov, passed over: e.mov, sub/f.MOV",
        "2 tars beside loose images, passed over (a corpus of its own takes what is in them): x.tar, y.tar.gz",
    ]
    # What a glob does not name is not passed over.
    assert sources.scan(CorpusConfig(source=str(tmp_path / "*.jpg"))).notes == []


def test_suffixes_are_told_of_files_members_and_urls() -> None:
    names = ["a.TIF", "b.tar#x/c.jpeg", "http://h.org/d.png?w=3", "http://h.org", "t.parquet#17", "README"]
    assert listing.suffixes_of(names) == {".tif", ".jpeg", ".png", ".org"}


def test_a_folder_with_all_below_it(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg", "sub/a.jpg", "sub/deep/b.PNG", "c.JPEG", "d.webp", "e.TIF", "f.gif", "g.bmp", "h.jpe")
    put(tmp_path, **{"text.jpg": b"this is text", "notes.md": b"", ".hidden.jpg": b"", ".git/x.jpg": b""})
    scan = sources.scan(CorpusConfig(source=str(tmp_path)))
    assert scan.root == str(tmp_path)
    assert {listed.source for listed in scan.samples} == {
        *("a.jpg", "sub/a.jpg", "sub/deep/b.PNG", "c.JPEG", "d.webp", "e.TIF", "f.gif", "g.bmp", "h.jpe", "text.jpg")
    }
    assert [listed.key for listed in scan.samples] == sorted(listed.key for listed in scan.samples)
    assert scan.notes == ["1 file of kind .md, passed over: notes.md"]
    a = next(listed for listed in scan.samples if listed.source == "sub/a.jpg")
    assert a.key == hashlib.sha256(b"sub/a.jpg").hexdigest()[:16]
    status = (tmp_path / "sub/a.jpg").stat()
    assert (a.size_bytes, a.mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert listing.read_file(scan.root, "text.jpg") == b"this is text"
    assert listing.uri(scan.root, a.source) == str(tmp_path / "sub/a.jpg")


def test_names_of_all_sorts(tmp_path: Path) -> None:
    names = {
        "é.jpg",
        "e\u0301.jpg",
        "it's.jpg",
        'a"b.jpg',
        "a;b.jpg",
        "new\nline.jpg",
        "日本/語.jpg",
        "a#1.jpg",
        "%20.jpg",
    }
    images(tmp_path, *names)
    assert listed_names(tmp_path) == names
    assert all(listing.read_file(str(tmp_path), name) for name in names)


def test_a_name_that_is_no_utf8_is_passed_over(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    scan = sources.scan(CorpusConfig(source=str(tmp_path)))
    assert [listed.source for listed in scan.samples] == ["a.jpg"]
    assert scan.notes == ["1 name not in UTF-8, passed over: caf\\xe9.jpg"]


def test_loops_and_links(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    images(root, "a/one.jpg", "b/two.jpg")
    images(outside, "three.jpg", "deep/four.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "across").symlink_to(root / "b")
    (root / "b" / "across").symlink_to(root / "a")
    (root / "self").symlink_to(root / "self")
    (root / "linked").symlink_to(outside)
    (root / "again").symlink_to(outside)
    (outside / "deep" / "back").symlink_to(outside)
    (root / "file.jpg").symlink_to(outside / "three.jpg")
    (root / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    scan = sources.scan(CorpusConfig(source=str(root), follow_links=True))
    assert {listed.source for listed in scan.samples} == {
        *("a/one.jpg", "b/two.jpg", "file.jpg", "again/three.jpg", "again/deep/four.jpg")
    }
    assert any("broken.jpg" in note for note in scan.notes)


def test_links_out_of_the_source_are_passed_over_unless_they_are_asked_for(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    images(root, "a.jpg", "sub/b.jpg")
    put(outside, **{"secret": b"a password", "c.jpg": b"c"})
    (root / "a.txt").symlink_to(outside / "secret")
    (root / "linked").symlink_to(outside)
    (root / "c.jpg").symlink_to(outside / "c.jpg")
    (root / "within.jpg").symlink_to(root / "sub" / "b.jpg")
    (tmp_path / "current").symlink_to(root)
    for source in (root, tmp_path / "current"):
        scan = sources.scan(CorpusConfig(source=str(source)))
        by_source = {listed.source: listed for listed in scan.samples}
        assert set(by_source) == {"a.jpg", "sub/b.jpg", "within.jpg"}
        assert scan.columns(by_source["a.jpg"]) == {}
        (note,) = scan.notes
        assert note.startswith(
            "3 links leading out of the source, passed over (`follow_links: true` takes what is there): "
        )
    followed = sources.scan(CorpusConfig(source=str(root), follow_links=True))
    assert len(followed.samples) == 5
    assert "a password" in [followed.columns(each).get("caption") for each in followed.samples]
    # A file that is named itself is taken, and a source of links alone says what it is.
    assert listed_names(root / "c.jpg") == {"c.jpg"}
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "c.jpg").symlink_to(outside / "c.jpg")
    with pytest.raises(ConfigError, match=r"holds no images.*1 links leading out of the source.*`follow_links: true`"):
        sources.scan(CorpusConfig(source=str(tmp_path / "links")))


def test_a_file_of_any_size_is_never_read_whole(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg")
    with open(tmp_path / "big.jpg", "wb") as file:
        file.truncate(3_000_000_000)
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(3_000_000_000)
    config = CorpusConfig(source=str(tmp_path))
    scan = sources.scan(config)
    source = reader(scan.root, config, scan.samples)
    by_source = {listed.source: place for place, listed in enumerate(scan.samples)}
    assert source.read(by_source["a.jpg"]) == b"not decoded here"
    with pytest.raises(
        SourceError, match=r"big\.jpg has 3,000,000,000 bytes, more than max_mb = 1024 of its corpus allows"
    ):
        source.read(by_source["big.jpg"])
    assert scan.columns(scan.samples[by_source["a.jpg"]]) == {}
    assert scan.notes == ["1 caption of more than 16 MiB, left out: a.txt"]
    # One that grew since it was listed.
    with open(tmp_path / "a.jpg", "ab") as file:
        file.truncate(2_000_000_000)
    with pytest.raises(SourceError, match="more than max_mb"):
        source.read(by_source["a.jpg"])
    assert CorpusConfig(source="x", max_mb=2).most_bytes == 2_000_000


def test_a_glob_is_taken_as_given(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg", "b.JPG", "x/a.jpg", "x/y/a.jpg", "photos [1]/c.jpg", ".h/d.jpg")
    put(tmp_path, **{"x/a.txt": b"beside"})
    assert listed_names(tmp_path / "*.jpg") == {"a.jpg"}
    assert listed_names(tmp_path / "**/*.jpg") == {"a.jpg", "x/a.jpg", "x/y/a.jpg", "photos [1]/c.jpg"}
    assert listed_names(tmp_path / "x*/?.jpg") == {"x/a.jpg"}
    assert listed_names(tmp_path / ".h/*.jpg") == {"d.jpg"}
    scan = sources.scan(CorpusConfig(source=str(tmp_path / "x/*.jpg")))
    assert scan.root == str(tmp_path / "x")
    assert scan.columns(scan.samples[0]) == {"caption": "beside"}
    # A folder whose name looks like a pattern is a folder.
    assert listed_names(tmp_path / "photos [1]") == {"c.jpg"}


def test_a_single_file(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg", "b.jpg")
    put(tmp_path, **{"a.txt": b"a caption"})
    scan = sources.scan(CorpusConfig(source=str(tmp_path / "a.jpg")))
    assert [listed.source for listed in scan.samples] == ["a.jpg"]
    assert scan.columns(scan.samples[0]) == {"caption": "a caption"}


def test_what_holds_no_image_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no images: found 0 files, expected \.jpg, .*hidden files"):
        sources.scan(CorpusConfig(source=str(tmp_path)))
    put(tmp_path, **{"a.heic": b"", "b.HEIC": b"", "README": b""})
    with pytest.raises(ConfigError, match=r"found 3 files \(2 with \.heic, 1 with no suffix\)"):
        sources.scan(CorpusConfig(source=str(tmp_path)))
    with pytest.raises(ConfigError, match="is not there; expected a folder, a file or a glob"):
        sources.scan(CorpusConfig(source=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="no file matches; 3 files were looked at"):
        sources.scan(CorpusConfig(source=str(tmp_path / "*.jpg")))


def test_a_key_never_depends_on_what_lies_beside(tmp_path: Path) -> None:
    images(tmp_path, "b/x.jpg")
    before = sources.scan(CorpusConfig(source=str(tmp_path))).samples
    images(tmp_path, "a/y.jpg", "b/w.jpg")
    after = sources.scan(CorpusConfig(source=str(tmp_path))).samples
    assert len(after) == 3
    assert set(before) <= set(after)


def test_a_file_that_is_gone_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"sub/a\.jpg is gone"):
        listing.read_file(str(tmp_path), "sub/a.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(SourceError, match="IsADirectoryError"):
        listing.read_file(str(tmp_path), "folder.jpg")


@pytest.mark.parametrize("path", ["../secret.jpg", "sub/../../secret.jpg", "{tmp_path}/secret.jpg"])
def test_a_path_that_leads_out_of_the_source_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"not of the source")
    (tmp_path / "photos/sub").mkdir(parents=True)
    path = path.format(tmp_path=tmp_path)
    for read in (listing.read_file, listing.open_file):
        with pytest.raises(SourceError, match="leads out of the source"):
            read(str(tmp_path / "photos"), path)


def test_a_store(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("a.jpg", "sub/é b.PNG", ".hidden/c.jpg", "notes.md"):
        memory.pipe_file(f"/bucket/photos/{name}", name.encode())
    memory.pipe_file("/bucket/photos/sub/é b.txt", "café".encode())
    memory.pipe_file("/bucket/t.csv", "file,n\na.jpg,3\n".encode("utf-16"))
    config = CorpusConfig(source="memory://bucket/photos", table="memory://bucket/t.csv")
    scan = sources.scan(config)
    found = {listed.source: listed for listed in scan.samples}
    assert set(found) == {"a.jpg", "sub/é b.PNG"}
    assert found["a.jpg"].size_bytes == 5
    assert found["a.jpg"].mtime_ns is None
    assert found["a.jpg"].key == hashlib.sha256(b"a.jpg").hexdigest()[:16]
    assert scan.columns(found["a.jpg"]) == {"n": 3}
    assert scan.columns(found["sub/é b.PNG"]) == {"caption": "café"}
    assert listing.read_file(scan.root, "sub/é b.PNG") == "sub/é b.PNG".encode()
    assert listing.uri(scan.root, "a.jpg") == "memory://bucket/photos/a.jpg"
    with pytest.raises(SourceError, match=r"gone\.jpg is gone"):
        listing.read_file(scan.root, "gone.jpg")
    assert listed_names("memory://bucket/photos/**/*.PNG") == {"sub/é b.PNG"}
    assert listed_names("memory://bucket/photos/a.jpg") == {"a.jpg"}
    with pytest.raises(ConfigError, match="is not there"):
        sources.scan(CorpusConfig(source="memory://bucket/none"))


def test_a_store_is_listed_anew(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/grown/a.jpg", b"")
    assert len(listed_names("memory://grown")) == 1
    memory.pipe_file("/grown/b.jpg", b"")
    assert len(listed_names("memory://grown")) == 2


def test_an_unknown_store_is_named_without_its_password() -> None:
    with pytest.raises(ConfigError, match=r"source nosuch://host/x: .*modmill\[s3\]") as caught:
        sources.scan(CorpusConfig(source="nosuch://me:secret@host/x?token=secret"))
    assert "secret" not in str(caught.value)


def test_no_file_is_looked_at_on_its_own(tmp_path: Path) -> None:
    for folder in range(10):
        (tmp_path / str(folder)).mkdir()
        for number in range(300):
            (tmp_path / str(folder) / f"{number}.jpg").touch()
            (tmp_path / str(folder) / f"{number}.txt").touch()
    real_stat, calls = os.stat, []

    def counted(*args: object, **kwargs: object) -> os.stat_result:
        calls.append(args)
        return real_stat(*args, **kwargs)  # pyright: ignore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "stat", counted)
        scan = sources.scan(CorpusConfig(source=str(tmp_path)))
    assert len(scan.samples) == 3000
    # One for each folder (and two for the root), none for a file: the listing has what is needed.
    assert len(calls) <= 15


@given(
    st.sets(
        st.text(st.characters(blacklist_characters="/\x00", blacklist_categories=["Cs"]), min_size=1, max_size=20)
        .filter(lambda name: not name.startswith(".") and len(name.encode()) < 200)
        .map(lambda name: f"{name}.jpg"),
        min_size=1,
        max_size=5,
    )
)
def test_every_name_round_trips(tmp_path_factory: pytest.TempPathFactory, names: set[str]) -> None:
    root = tmp_path_factory.mktemp("names")
    for name in names:
        (root / name).write_bytes(name.encode())
    scan = sources.scan(CorpusConfig(source=str(root)))
    assert {listing.read_file(scan.root, listed.source).decode() for listed in scan.samples} == names


def test_each_kind_of_the_pipeline_file_has_its_functions() -> None:
    assert KINDS.keys() == sections.KIND_DEFAULTS.keys() == set(get_args(CorpusConfig.model_fields["kind"].annotation))


@pytest.mark.parametrize("source", ["", "a.jpg", "sub", "sub/*.jpg", "**/*.jpg", "s*/b.jpg"])
def test_the_root_of_a_source_is_known_without_a_listing(tmp_path: Path, source: str) -> None:
    images(tmp_path, "a.jpg", "sub/b.jpg")
    text = str(tmp_path / source)
    assert listing.root_of(text) == listing.list_source(text, listing.Notes()).root
